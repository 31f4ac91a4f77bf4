"""Pictures of eight shapes, drawn here: a set of images that needs no download.

A picture is a function of its shape and number: place, size, angle and colours vary, and there is noise over all. Most
of them can be told apart at a glance, but not by any single pixel.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from megalith.data.augment import Draws
from megalith.data.images import SHAPES
from megalith.data.mock import mix_words
from megalith.files import DISK, sync_directory

SIDE = 32  # pixels
FINER = 4  # drawn so many times as large, for smooth edges
NOISE = 24  # the most that a pixel is off, of 255
TURNED = 0.5  # the largest angle, radians
SEED = 2718
TRAINED, VALIDATED = 1000, 50  # pictures of each shape

Points = list[tuple[float, float]]


def _ring_of(count: int, radii: Sequence[float]) -> Points:
    """count points around the origin, at the radii in turn, the first on top."""
    turns = [2 * math.pi * number / count - math.pi / 2 for number in range(count)]
    at = [radii[number % len(radii)] for number in range(count)]
    return [(radius * math.cos(turn), radius * math.sin(turn)) for radius, turn in zip(at, turns, strict=True)]


ARROW: Points = [(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)]
CROSS: Points = [(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)]
CROSS += [(-x, -y) for x, y in CROSS]

# Outlines around the origin, about 1 in radius; a second one is cut out of the first.
OUTLINES: dict[str, tuple[Points, Points]] = {
    "arrow": (ARROW, []),
    "circle": (_ring_of(48, [1.0]), []),
    "crescent": (_ring_of(48, [1.0]), [(x * 0.85 + 0.5, y * 0.85) for x, y in _ring_of(48, [1.0])]),
    "cross": (CROSS, []),
    "ring": (_ring_of(48, [1.0]), _ring_of(48, [0.55])),
    "square": (_ring_of(4, [1.1]), []),
    "star": (_ring_of(10, [1.1, 0.45]), []),
    "triangle": (_ring_of(3, [1.1]), []),
}


def draw_set(folder: Path) -> None:
    """Draw all pictures into folder/train/SHAPE and folder/val/SHAPE; the folder gets its name when all are there."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    for part, first, count in (("train", 0, TRAINED), ("val", TRAINED, VALIDATED)):
        for shape in SHAPES:
            of_shape = unfinished / part / shape
            of_shape.mkdir(parents=True)
            for number in range(first, first + count):
                (of_shape / f"{number:04}.png").write_bytes(draw_shape(shape, number))
    DISK.rename(unfinished, folder)
    sync_directory(folder.parent)


def draw_shape(shape: str, number: int) -> bytes:
    """A picture as the bytes of a PNG file."""
    draws = Draws(SEED, number * len(SHAPES) + SHAPES.index(shape))
    size = SIDE * FINER
    behind, front = _colours(draws)
    radius = draws.uniform(0.2, 0.42) * size
    x, y = (draws.uniform(radius, size - radius) for _ in range(2))
    angle = draws.uniform(-TURNED, TURNED)
    placed = _placing(x, y, radius, angle)
    stencil = Image.new("L", (size, size), 0)
    drawing = ImageDraw.Draw(stencil)
    outline, hole = OUTLINES[shape]
    drawing.polygon(placed(outline), fill=255)
    if hole:
        drawing.polygon(placed(hole), fill=0)
    image = Image.composite(
        Image.new("RGB", (SIDE, SIDE), front), Image.new("RGB", (SIDE, SIDE), behind), stencil.reduce(FINER)
    )
    where = np.uint64(int(draws.uniform() * 2**53))
    numbers: NDArray[np.uint64] = np.arange(SIDE * SIDE * 3, dtype=np.uint64)
    words = mix_words(where + numbers).reshape(SIDE, SIDE, 3)
    noise = (words % np.uint64(2 * NOISE + 1)).astype(np.int64) - NOISE
    pixels = (np.asarray(image, np.int64) + noise).clip(0, 255).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _placing(x: float, y: float, radius: float, angle: float) -> Callable[[Points], Points]:
    cosine, sine = radius * math.cos(angle), radius * math.sin(angle)
    return lambda points: [(x + a * cosine - b * sine, y + a * sine + b * cosine) for a, b in points]


def _colours(draws: Draws) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Two colours that differ well in brightness, either of them the brighter."""
    dark = tuple(draws.below(110) for _ in range(3))
    bright = tuple(255 - draws.below(110) for _ in range(3))
    pair = (dark, bright) if draws.chance(0.5) else (bright, dark)
    return pair  # type: ignore[return-value]
