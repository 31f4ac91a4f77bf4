"""Augmentation: what it may do to an image, and that it follows from the seed and the sample's number alone."""

import colorsys
import math

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("PIL")

from PIL import Image

from megalith.data.augment import (
    IMAGENET_POLICY,
    OPERATIONS,
    Draws,
    augmented,
    auto_augment,
    central_crop,
    jitter_colours,
    random_resized_crop,
    turn_hue,
)


def noise(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (height, width, 3), dtype=np.uint8))


def places(width: int, height: int) -> Image.Image:
    """An image whose pixels say where they are: red is the column, green the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


def array(image: Image.Image) -> NDArray[np.int64]:
    return np.asarray(image).astype(np.int64)


def drawn(seed: int, sample: int, count: int = 16) -> list[float]:
    draws = Draws(seed, sample)
    return [draws.uniform() for _ in range(count)]


def test_the_numbers_drawn_follow_from_seed_and_sample() -> None:
    assert drawn(1, 5) == drawn(1, 5)
    numbers = [tuple(drawn(seed, sample)) for seed in (1, 2) for sample in (*range(50), 2**40)]
    assert len(set(numbers)) == 102


def test_the_numbers_drawn_are_evenly_distributed_and_unrelated() -> None:
    table = np.array([drawn(7, sample) for sample in range(4000)])
    assert table.min() >= 0 and table.max() < 1
    # Means of 4000 uniform numbers, whose standard deviation is 0.0046, and correlations, 0.016.
    assert np.abs(table.mean(0) - 0.5).max() < 5 * 0.0046
    correlations = np.corrcoef(table.T) - np.eye(16)
    assert np.abs(correlations).max() < 5 * 0.016


def test_a_sample_gives_the_same_image_again_and_another_sample_another() -> None:
    def image(sample: int) -> bytes:
        return augmented(noise(), 16, Draws(3, sample), colours=True).tobytes()

    assert image(8) == image(8)
    assert len({image(sample) for sample in range(20)}) == 20


def test_a_crop_has_the_area_and_the_ratio_that_it_may_have() -> None:
    areas, ratios = [], []
    for sample in range(300):
        pixels = array(random_resized_crop(places(200, 160), 64, Draws(1, sample)))
        assert pixels.shape == (64, 64, 3)
        # The first and the last pixel are the means of about 1/64 of the crop each.
        wide = (pixels[0, -1, 0] - pixels[0, 0, 0]) * 64 / 63
        high = (pixels[-1, 0, 1] - pixels[0, 0, 1]) * 64 / 63
        areas.append(wide * high / (200 * 160))
        ratios.append(wide / high)
    assert 0.06 < min(areas) < 0.15 and 0.8 < max(areas) <= 1.05
    assert 0.7 < min(ratios) < 0.85 and 1.2 < max(ratios) < 1.4


def test_an_image_too_long_for_any_crop_gives_its_middle() -> None:
    pixels = array(random_resized_crop(places(240, 3), 8, Draws(1, 1)))
    assert pixels[..., 0].min() >= 116 and pixels[..., 0].max() <= 124


def test_validation_sees_the_middle_of_the_shorter_sides_length() -> None:
    assert np.array_equal(array(central_crop(places(90, 30), 30)), array(places(90, 30))[:, 30:60])
    assert np.array_equal(array(central_crop(places(30, 90), 30)), array(places(30, 90))[30:60])
    assert central_crop(noise(33, 70), 16).size == (16, 16)


@pytest.mark.parametrize("shape", [(1, 10_000_000, 3), (10_000_000, 1, 3)], ids=["wide", "high"])
def test_only_the_middle_of_a_very_long_image_is_resized(shape: tuple[int, int, int]) -> None:
    pixels = np.zeros(shape, np.uint8)  # resized whole, 1.5 TB
    pixels.reshape(-1, 3)[4_999_900:5_000_100] = 9
    image = central_crop(Image.fromarray(pixels), 224)
    assert image.size == (224, 224) and (array(image) == 9).all()


def test_every_sample_finds_enough_numbers() -> None:
    # No crop of a line fits, so all tries are made.
    for sample in range(300):
        augmented(noise(60, 1), 4, Draws(2, sample), colours=True)


def test_the_policy_is_25_pairs_of_known_operations() -> None:
    assert len(IMAGENET_POLICY) == 25
    for pair in IMAGENET_POLICY:
        for name, probability, strength in pair:
            assert name in OPERATIONS and 0 <= probability <= 1 and 0 <= strength <= 9


def apply(name: str, strength: float) -> NDArray[np.int64]:
    operation, weakest, strongest, _ = OPERATIONS[name]
    return array(operation(noise(), weakest + (strongest - weakest) * strength / 9))


def test_the_operations_are_their_formulas() -> None:
    pixels = array(noise())
    assert np.array_equal(apply("posterize", 9), pixels & 0b11110000)
    assert np.array_equal(apply("posterize", 0), pixels)
    assert np.array_equal(apply("invert", 0), 255 - pixels)
    assert np.array_equal(apply("solarize", 0), pixels)  # no pixel reaches 256
    assert np.array_equal(apply("solarize", 9), 255 - pixels)
    half = apply("solarize", 4.5)
    assert np.array_equal(half, np.where(pixels < 128, pixels, 255 - pixels))
    for name in ("color", "contrast", "sharpness", "rotate", "shear-x"):
        assert np.abs(apply(name, 0) - pixels).max() <= 1, name
        assert np.abs(apply(name, 9) - pixels).max() > 20, name
    grey = array(noise().convert("L"))[..., None]
    assert np.abs(array(OPERATIONS["color"][0](noise(), -1.0)) - grey).max() <= 1


def test_hue_is_turned_and_brightness_kept() -> None:
    colours = np.random.RandomState(1).randint(0, 256, (1, 50, 3), dtype=np.uint8)
    turned = np.asarray(turn_hue(Image.fromarray(colours), 0.1))
    for before, after in zip(colours[0] / 255, turned[0] / 255, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        expected = colorsys.hsv_to_rgb((hue + 25 / 255) % 1, saturation, value)
        # Hue, saturation and value are bytes in between.
        assert np.abs(np.array(expected) - after).max() < 0.035


def test_jitter_and_policy_change_most_images() -> None:
    changed = sum(jitter_colours(noise(), Draws(1, n)).tobytes() != noise().tobytes() for n in range(50))
    assert changed == 50
    untouched = sum(auto_augment(noise(), Draws(1, n)).tobytes() == noise().tobytes() for n in range(400))
    # Both operations of a pair are left out with the product of their probabilities; some change nothing at all.
    left_out = [math.prod(1 - probability for _, probability, _ in pair) for pair in IMAGENET_POLICY]
    share = sum(left_out) / 25
    assert share - 0.1 < untouched / 400 < share + 0.15
