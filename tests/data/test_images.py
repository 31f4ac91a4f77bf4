"""Image folders: which images and classes they have, how they are read, and what is refused by name."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image

import megalith.data.shapes
from megalith.data.images import SHAPES, ImageBatches, ImageFolder, MockImages, open_folder, read_image
from megalith.data.shapes import draw_set, draw_shape


def write(path: Path, colour: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (12, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    for number in range(6):
        pixels = np.random.RandomState(number).randint(0, 256, (20, 16, 3), dtype=np.uint8)
        path = tmp_path / "set" / ("even", "odd")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return open_folder(tmp_path / "set")


def batches(folder: ImageFolder, augmentation: str = "all", *, workers: int = 1, channels: int = 3) -> ImageBatches:
    return ImageBatches(folder, side=8, num_channels=channels, augmentation=augmentation, seed=5, workers=workers)


def test_classes_and_images_are_numbered_by_name(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.JPG", "a/z.png", "a/deep/er.png", "C/1.png"):
        write(tmp_path / name)
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / "list.csv").write_text("no class")
    found = open_folder(tmp_path)
    assert found.classes == ("C", "a", "b")
    assert found.paths == ("C/1.png", "a/deep/er.png", "a/z.png", "b/1.JPG", "b/2.png")
    assert found.labels.tolist() == [0, 1, 1, 2, 2]


def test_a_class_without_images_and_an_unknown_class_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no folder"):
        open_folder(tmp_path)
    write(tmp_path / "a" / "1.png")
    assert open_folder(tmp_path, ["a", "b"]).labels.tolist() == [0]
    assert open_folder(tmp_path, ["0", "a"]).labels.tolist() == [1]
    with pytest.raises(ValueError, match=r"/a: is a class that the training images do not have"):
        open_folder(tmp_path, ["b"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"/empty: holds no image"):
        open_folder(tmp_path)


@pytest.mark.parametrize("augmentation", ["all", "crop", "none"])
def test_an_image_follows_from_its_sample_alone(folder: ImageFolder, augmentation: str) -> None:
    indices, samples = np.array([3, 0, 5, 1, 4]), np.array([100, 7, 2**33, 8, 9])
    whole = batches(folder, augmentation).read(indices, samples)
    assert whole["images"].shape == (5, 8, 8, 3) and whole["images"].dtype == np.uint8
    assert whole["labels"].tolist() == [folder.labels[index] for index in indices]
    assert whole["samples"].tolist() == samples.tolist() and whole["loss_mask"].tolist() == [1.0] * 5
    beside = batches(folder, augmentation, workers=3).read(indices, samples)
    assert np.array_equal(whole["images"], beside["images"])
    for place in range(5):
        alone = batches(folder, augmentation).read(indices[place : place + 1], samples[place : place + 1])
        assert np.array_equal(alone["images"][0], whole["images"][place])


def test_the_next_epoch_shows_another_view_unless_nothing_is_random(folder: ImageFolder) -> None:
    indices = np.arange(6)
    for augmentation, is_random in (("all", True), ("crop", True), ("none", False)):
        first = batches(folder, augmentation).read(indices, np.arange(6))["images"]
        second = batches(folder, augmentation).read(indices, np.arange(6, 12))["images"]
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True)) != is_random


def test_one_channel_is_the_brightness(folder: ImageFolder) -> None:
    images = batches(folder, "none", channels=1).read(np.arange(6), np.arange(6))["images"]
    assert images.shape == (6, 8, 8, 1)
    coloured = batches(folder, "none").read(np.arange(6), np.arange(6))["images"]
    assert np.abs(coloured @ [0.299, 0.587, 0.114] - images[..., 0]).max() < 1.5


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_images_of_every_mode_become_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    image = Image.new(mode, (5, 4))
    if mode == "P":
        image.info["transparency"] = b"\0\1\2"
    image.save(path)
    if mode == "P":
        with Image.open(path) as written:
            assert "transparency" in written.info
    read = read_image(path)
    assert (read.mode, read.size) == ("RGB", (5, 4))


@pytest.mark.parametrize("name", ["image.png", "image.tiff", "image.pgm"])
def test_grey_levels_of_16_bits_keep_their_order(name: str, tmp_path: Path) -> None:
    levels = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    if name.endswith(".pgm"):  # which older versions of Pillow read and do not write
        (tmp_path / name).write_bytes(b"P5 5 1 65535\n" + levels.astype(">u2").tobytes())
    else:
        Image.fromarray(levels).save(tmp_path / name)
    assert np.asarray(read_image(tmp_path / name))[0].tolist() == [[level] * 3 for level in (0, 0, 1, 128, 255)]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grey_levels_without_a_known_white_are_refused(dtype: type, tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1]], dtype)).save(tmp_path / "image.tiff")
    with pytest.raises(ValueError, match=r"image\.tiff: cannot be read as an image \(grey levels of 32 bits have no"):
        read_image(tmp_path / "image.tiff")


def huge_png() -> bytes:
    """A PNG whose header promises 60000 x 60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped", "cut jpeg", "huge", "large", "gone", "pipe"])
def test_a_damaged_image_is_refused_by_name(damage: str, folder: ImageFolder) -> None:
    path = folder.root / folder.paths[2]
    whole = path.read_bytes()
    if damage == "cut jpeg":
        Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)).save(path, "JPEG")
        path.write_bytes(path.read_bytes()[:700])
    elif damage == "large":
        path.write_bytes(huge_png().replace(struct.pack(">II", 60000, 60000), struct.pack(">II", 9000, 9000)))
    elif damage in ("gone", "pipe"):
        path.unlink()
        if damage == "pipe":
            os.mkfifo(path)
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
        contents = {"empty": b"", "text": b"not an image", "cut": whole[:middle], "flipped": flipped}
        path.write_bytes({**contents, "huge": huge_png()}[damage])
    with pytest.raises(ValueError, match=r"/even/4\.png: cannot be read as an image"):
        batches(folder, workers=2).read(np.arange(6), np.arange(6))


def test_pictures_are_the_same_wherever_they_are_drawn() -> None:
    assert draw_shape("star", 3) == draw_shape("star", 3)
    pictures = {draw_shape(shape, number) for shape in SHAPES for number in range(20)}
    assert len(pictures) == 160


def test_a_set_of_pictures_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megalith.data.shapes, "TRAINED", 3)
    monkeypatch.setattr(megalith.data.shapes, "VALIDATED", 2)
    drawn: list[int] = []

    def draw_some(shape: str, number: int) -> bytes:
        drawn.append(number)
        if len(drawn) == 10:
            raise KeyboardInterrupt
        return draw_shape(shape, number)

    monkeypatch.setattr(megalith.data.shapes, "draw_shape", draw_some)
    with pytest.raises(KeyboardInterrupt):
        draw_set(tmp_path / "shapes")
    assert not (tmp_path / "shapes").exists()
    draw_set(tmp_path / "shapes")
    train = open_folder(tmp_path / "shapes" / "train")
    valid = open_folder(tmp_path / "shapes" / "val", train.classes)
    assert train.classes == SHAPES and (len(train), len(valid)) == (24, 16)
    assert not {path.read_bytes() for path in (tmp_path / "shapes" / "train").rglob("*.png")} & {
        path.read_bytes() for path in (tmp_path / "shapes" / "val").rglob("*.png")
    }


def test_made_up_images_follow_from_their_numbers() -> None:
    source = MockImages(10, side=5, num_channels=3, num_classes=7, seed=1)
    whole = source.read(np.arange(10), np.arange(10))
    again = source.read(np.array([4]), np.array([99]))
    assert whole["images"].shape == (10, 5, 5, 3) and whole["images"].dtype == np.uint8
    assert np.array_equal(again["images"][0], whole["images"][4]) and again["labels"][0] == whole["labels"][4]
    assert whole["labels"].min() >= 0 and whole["labels"].max() < 7
    assert 90 < whole["images"].mean() < 165
