"""Folders of images, a class each, read as batches; Pillow decodes, and numpy is all else that runs in threads.

The layout is torchvision's ImageFolder: ROOT/CLASS/..., classes numbered in the order of their names. What a sample
looks like follows from (seed, number of the sample in the run) alone.
"""

import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megalith.data.mock import mix_words
from megalith.files import open_at_once

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
MOST_PIXELS = 1 << 26  # of a file: decoded it takes 3 to 4 bytes a pixel, 200 MB
MODES = {1: "L", 3: "RGB"}  # Pillow's name for images of so many channels
WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # its names for grey levels of more than 8 bits
FORMATS_OF_16 = ("PNG", "PPM")  # have no more, under whichever of these names
# The classes of --corpus shapes, which shapes.py draws.
SHAPES = ("arrow", "circle", "crescent", "cross", "ring", "square", "star", "triangle")


def has_pillow() -> bool:
    """Whether images can be read here: Pillow comes with the extra `vision`."""
    return find_spec("PIL") is not None


def class_names(folder: Path) -> list[str]:
    """The classes of an image folder, sorted. Raises OSError if it cannot be read."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder and their classes, in the order of class and path."""

    root: Path
    classes: tuple[str, ...]
    paths: tuple[str, ...]  # below root
    labels: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.paths)


def open_folder(root: Path, classes: Sequence[str] | None = None) -> ImageFolder:
    """List an image folder. classes: those known already, of which it may lack some but may not have others.

    Raises ValueError naming the folder where there is no class, a class without images, or an unknown class.
    """
    found = class_names(root)
    known = found if classes is None else list(classes)
    if not found:
        raise ValueError(f"{root}: has no folder. An image folder has one for each class, with its images.")
    if unknown := sorted(set(found) - set(known)):
        raise ValueError(f"{root / unknown[0]}: is a class that the training images do not have ({len(known)} classes)")
    paths: list[str] = []
    labels: list[int] = []
    for name in found:
        images = sorted(_images_below(root / name))
        if not images:
            raise ValueError(f"{root / name}: holds no image ({', '.join(sorted(SUFFIXES))}). Add some, or remove it.")
        paths += [os.path.join(name, image) for image in images]
        labels += [known.index(name)] * len(images)
    return ImageFolder(root, tuple(known), tuple(paths), np.array(labels, np.int32))


def _images_below(folder: Path) -> Iterator[str]:
    for directory, _, files in os.walk(folder):
        for name in files:
            if os.path.splitext(name)[1].lower() in SUFFIXES:
                yield os.path.relpath(os.path.join(directory, name), folder)


class ImageBatches:
    """Batches of an image folder: `images` uint8 [B, side, side, channel], `labels` int64 B, `loss_mask` fp32 B.

    augmentation: of --image-augmentation; "none", a crop of the middle, gives the same image of a file every time.
    workers: threads that decode a batch's images beside each other; Pillow lets others run while it decodes.
    """

    def __init__(
        self, folder: ImageFolder, *, side: int, num_channels: int, augmentation: str, seed: int, workers: int
    ) -> None:
        self.folder = folder
        self.side = side
        self.mode = MODES[num_channels]
        self.augmentation = augmentation
        self.seed = seed
        self.workers = workers

    def __len__(self) -> int:
        return len(self.folder)

    def read(self, indices: NDArray[np.int64], samples: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The samples with these indices; samples are their numbers in the run, of which the randomness is made.

        Raises ValueError naming a file that is damaged or gone.
        """
        numbered = list(zip(indices.tolist(), samples.tolist(), strict=True))
        if self.workers > 1 and len(numbered) > 1:
            with ThreadPoolExecutor(min(self.workers, len(numbered)), thread_name_prefix="megalith-image") as pool:
                images = list(pool.map(self._image, *zip(*numbered, strict=True)))
        else:
            images = [self._image(index, sample) for index, sample in numbered]
        return {
            "images": np.stack(images),
            "labels": self.folder.labels[indices].astype(np.int64),
            "loss_mask": np.ones(len(indices), np.float32),
            "samples": samples,
        }

    def _image(self, index: int, sample: int) -> NDArray[np.uint8]:
        """uint8 [side, side, channel]."""
        from megalith.data.augment import Draws, augmented, central_crop

        image = read_image(self.folder.root / self.folder.paths[index])
        if self.augmentation == "none":
            image = central_crop(image, self.side)
        else:
            image = augmented(image, self.side, Draws(self.seed, sample), colours=self.augmentation == "all")
        pixels = np.asarray(image.convert(self.mode), np.uint8)
        return pixels.reshape(self.side, self.side, -1)


def read_image(path: Path) -> "Image.Image":
    """A file's image as RGB. Raises ValueError naming the file if it is damaged, gone or too large."""
    from PIL import Image

    try:
        with open(open_at_once(path), "rb") as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MOST_PIXELS}")
            if image.mode in WIDE_MODES:
                return _narrowed(image).convert("RGB")
            # Pillow warns of a palette with transparency unless it is asked for the transparency first.
            whole = image.convert("RGBA") if "transparency" in image.info else image
            return whole.convert("RGB")
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        IndexError,
        TypeError,
        struct.error,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        # Which of these Pillow raises depends on the format and on where the damage is.
        raise ValueError(f"{path}: cannot be read as an image ({error}). Replace it, or take it away.") from error


def _narrowed(image: "Image.Image") -> "Image.Image":
    """Grey levels of 16 bits by their upper 8, as Pillow reads colours of 16; its own conversion makes all above 255
    white. Raises ValueError for levels of 32 bits, of which nothing says which is white."""
    from PIL import Image

    if image.mode in ("I", "F") and image.format not in FORMATS_OF_16:
        raise ValueError("grey levels of 32 bits have no known white; save it with 8 or 16")
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


class MockImages:
    """Batches of made-up images and classes, for measuring; the same for the same seed, anywhere."""

    def __init__(self, num_samples: int, *, side: int, num_channels: int, num_classes: int, seed: int) -> None:
        self.num_samples = num_samples
        self.shape = (side, side, num_channels)
        self.num_classes = num_classes
        self.seed = seed

    def __len__(self) -> int:
        return self.num_samples

    def read(self, indices: NDArray[np.int64], samples: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The samples with these indices."""
        size = int(np.prod(self.shape))
        num_words = -(-size // 8)
        run = mix_words(np.array([self.seed], np.uint64))
        where = mix_words(indices.astype(np.uint64) ^ run)
        numbers: NDArray[np.uint64] = np.arange(num_words, dtype=np.uint64)
        words = mix_words(where[:, None] + numbers)
        return {
            "images": words.view(np.uint8)[:, :size].reshape(-1, *self.shape),
            "labels": (where % np.uint64(self.num_classes)).astype(np.int64),
            "loss_mask": np.ones(len(indices), np.float32),
            "samples": samples,
        }
