"""How an image becomes a training sample: cropped, flipped, recoloured at random, with Pillow.

What happens to an image follows from the numbers drawn for it, and these from (seed, number of the sample in the run)
alone: not from a worker, a generator's state or the images before.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from megalith.data.mock import mix_words

Picture = Image.Image

MOST_DRAWS = 48  # numbers that a sample may need: about 15 as a rule, 36 at most
CROP_TRIES = 10
LONGEST_SIDE = 64  # times the shorter one, of an image that is resized whole
GREY = (128, 128, 128)  # where a moved image leaves nothing


class Draws:
    """The random numbers of one sample, one after the other: hashes of (seed, sample, how many were drawn before)."""

    def __init__(self, seed: int, sample: int) -> None:
        run = mix_words(np.array([seed], np.uint64))
        where = mix_words(np.array([sample], np.uint64) ^ run)
        numbers: NDArray[np.uint64] = np.arange(MOST_DRAWS, dtype=np.uint64)
        words = mix_words(where + numbers)
        self._left: Iterator[float] = iter(((words >> np.uint64(11)) * 2.0**-53).tolist())

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * next(self._left)

    def below(self, count: int) -> int:
        """A whole number from 0 to count - 1."""
        return int(next(self._left) * count)

    def chance(self, probability: float) -> bool:
        return next(self._left) < probability


def random_resized_crop(image: Picture, side: int, draws: Draws) -> Picture:
    """A part of 8 to 100 % of the area, 3:4 to 4:3 wide, resized to a square of this side (Szegedy et al. 2014)."""
    width, height = image.size
    for _ in range(CROP_TRIES):
        area = width * height * draws.uniform(0.08, 1.0)
        ratio = math.exp(draws.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = draws.below(width - wide + 1), draws.below(height - high + 1)
            return _resized(image, (left, top, left + wide, top + high), side)
    # A very long image: the middle, as much of it as the ratios allow.
    wide = min(width, round(height * 4 / 3))
    high = min(height, round(width * 4 / 3))
    left, top = (width - wide) // 2, (height - high) // 2
    return _resized(image, (left, top, left + wide, top + high), side)


def central_crop(image: Picture, side: int) -> Picture:
    """The middle square, after the shorter side was resized to this side: what validation sees."""
    width, height = image.size
    longest = LONGEST_SIDE * min(width, height)
    if max(width, height) > longest:
        # Resized whole, a small file of one long row would take any amount of memory.
        left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
        image = image.crop((left, top, left + min(width, longest), top + min(height, longest)))
        width, height = image.size
    if width <= height:
        sizes = (side, max(side, int(side * height / width)))
    else:
        sizes = (max(side, int(side * width / height)), side)
    image = image.resize(sizes, Image.Resampling.BILINEAR)
    left, top = round((sizes[0] - side) / 2), round((sizes[1] - side) / 2)
    return image.crop((left, top, left + side, top + side))


def _resized(image: Picture, box: tuple[int, int, int, int], side: int) -> Picture:
    return image.crop(box).resize((side, side), Image.Resampling.BILINEAR)


def jitter_colours(image: Picture, draws: Draws) -> Picture:
    """Brightness, contrast and saturation times 0.6 to 1.4, hue turned by up to a tenth, in a random order."""
    left: list[Callable[[Picture], Picture]] = [
        partial(brightness, factor=draws.uniform(0.6, 1.4)),
        partial(contrast, factor=draws.uniform(0.6, 1.4)),
        partial(saturation, factor=draws.uniform(0.6, 1.4)),
        partial(turn_hue, turn=draws.uniform(-0.1, 0.1)),
    ]
    while left:
        image = left.pop(draws.below(len(left)))(image)
    return image


def brightness(image: Picture, factor: float) -> Picture:
    return ImageEnhance.Brightness(image).enhance(factor)


def contrast(image: Picture, factor: float) -> Picture:
    return ImageEnhance.Contrast(image).enhance(factor)


def saturation(image: Picture, factor: float) -> Picture:
    return ImageEnhance.Color(image).enhance(factor)


def sharpness(image: Picture, factor: float) -> Picture:
    return ImageEnhance.Sharpness(image).enhance(factor)


def turn_hue(image: Picture, turn: float) -> Picture:
    """turn: of the whole circle of hues, between -0.5 and 0.5."""
    hue, *rest = image.convert("HSV").split()
    table = [(value + int(turn * 255)) % 256 for value in range(256)]
    return Image.merge("HSV", (hue.point(table), *rest)).convert("RGB")


def _moved(image: Picture, matrix: tuple[float, float, float, float, float, float]) -> Picture:
    """The image whose pixel (x, y) is that at (a x + b y + c, d x + e y + f) of the given one, grey outside."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=GREY
    )


def _shear_x(image: Picture, amount: float) -> Picture:
    return _moved(image, (1, amount, 0, 0, 1, 0))


def _rotate(image: Picture, degrees: float) -> Picture:
    return image.rotate(degrees, fillcolor=GREY)


def _posterize(image: Picture, bits: float) -> Picture:
    return ImageOps.posterize(image, round(bits))


def _solarize(image: Picture, threshold: float) -> Picture:
    return ImageOps.solarize(image, threshold)  # type: ignore[arg-type]


def _enhanced(image: Picture, change: float, *, enhance: Callable[[Picture, float], Picture]) -> Picture:
    return enhance(image, 1 + change)


# By name: the operation, its amount at strength 0 and at strength 9, and whether the amount has a random sign.
OPERATIONS: dict[str, tuple[Callable[[Picture, float], Picture], float, float, bool]] = {
    "shear-x": (_shear_x, 0.0, 0.3, True),
    "rotate": (_rotate, 0.0, 30.0, True),
    "color": (partial(_enhanced, enhance=saturation), 0.0, 0.9, True),
    "contrast": (partial(_enhanced, enhance=contrast), 0.0, 0.9, True),
    "sharpness": (partial(_enhanced, enhance=sharpness), 0.0, 0.9, True),
    "posterize": (_posterize, 8.0, 4.0, False),
    "solarize": (_solarize, 256.0, 0.0, False),
    "autocontrast": (lambda image, _: ImageOps.autocontrast(image), 0.0, 0.0, False),
    "equalize": (lambda image, _: ImageOps.equalize(image), 0.0, 0.0, False),
    "invert": (lambda image, _: ImageOps.invert(image), 0.0, 0.0, False),
}
STRONGEST = 9

# AutoAugment's policy for ImageNet (Cubuk et al. 2018, arXiv:1805.09501, table 9): one of the 25 pairs is drawn for
# each image; each operation of it is (name, probability, strength).
IMAGENET_POLICY: tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...] = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 4), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 7)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 2)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 8), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("color", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 2)),
    (("equalize", 0.0, 7), ("equalize", 0.8, 8)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("color", 1.0, 2)),
    (("color", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 8)),
    (("shear-x", 0.6, 5), ("equalize", 1.0, 9)),
    (("color", 0.4, 0), ("equalize", 0.6, 3)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
)


def auto_augment(image: Picture, draws: Draws) -> Picture:
    """The image after a random pair of the ImageNet policy."""
    for name, probability, strength in IMAGENET_POLICY[draws.below(len(IMAGENET_POLICY))]:
        if draws.chance(probability):
            operation, weakest, strongest, signed = OPERATIONS[name]
            amount = weakest + (strongest - weakest) * strength / STRONGEST
            if signed and draws.chance(0.5):
                amount = -amount
            image = operation(image, amount)
    return image


def augmented(image: Picture, side: int, draws: Draws, *, colours: bool) -> Picture:
    """A random square of this side from an RGB image, flipped at random; with colours recoloured as well.

    In the order of Megatron-LM: crop, flip, colour jitter, AutoAugment.
    """
    image = random_resized_crop(image, side, draws)
    if draws.chance(0.5):
        image = ImageOps.mirror(image)
    if colours:
        image = auto_augment(jitter_colours(image, draws), draws)
    return image
