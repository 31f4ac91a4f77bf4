"""A small folder of images for tests: pictures of three shapes."""

from pathlib import Path

from megalith.data.shapes import draw_shape

CLASSES = ("circle", "cross", "ring")


def write_images(folder: Path, *, trained: int = 12, validated: int = 4, classes: tuple[str, ...] = CLASSES) -> Path:
    """An image folder with so many pictures of each class below train and val; give its path."""
    root = folder / "images"
    for part, first, count in (("train", 0, trained), ("val", trained, validated)):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for number in range(first, first + count):
                (root / part / name / f"{number}.png").write_bytes(draw_shape(name, number))
    return root
