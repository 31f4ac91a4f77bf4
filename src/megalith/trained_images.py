"""A trained ViT from its run directory, and how often it is right about images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalith.checkpoint.index import Index
from megalith.config import Run
from megalith.corpora import shapes_folder
from megalith.data.images import ImageBatches, class_names, open_folder
from megalith.models.vit import VisionTransformer
from megalith.tasks.vit import FOLDERS, digest_of_classes
from megalith.trained import compute_type, load_weights, run_of

IMAGES_AT_ONCE = 64


def measure_images(
    directory: str, *, split: str | None, files: Sequence[str], step: int | None, device: str
) -> dict[str, Any]:
    """Loss and accuracy over all images of a split of the run's data, or of an image folder, as one object.

    Raises ValueError for no run directory, a split that images do not have, or classes that are not
    those that the model was trained on.
    """
    run = run_of(directory)
    if run.data.mock_data:
        raise ValueError(f"{directory}: was trained with --mock-data, on images of nothing. Name a run of real ones.")
    place, name = _place(run, split or "valid", files)
    device_of, dtype = compute_type(run, device)
    classes: list[str] = []

    def build(index: Index) -> VisionTransformer:
        classes[:] = _classes(run, place, index)
        model = VisionTransformer(run.model, dtype=dtype, finetune=run.checkpoint.finetune, device="meta")
        return model.to_empty(device=device_of)

    model, found_step = load_weights(directory, build, step=step)
    batches = ImageBatches(
        open_folder(place, classes),
        side=run.model.img_dim,
        num_channels=run.model.num_channels,
        augmentation="none",
        seed=run.train.seed,
        workers=run.data.num_workers,
    )
    loss, right = _sums(model.eval(), batches, device_of)
    return {
        "run": directory,
        "step": found_step,
        "data": name,
        "images": len(batches),
        "loss": loss / len(batches),
        "accuracy": right / len(batches),
    }


@torch.no_grad()
def _sums(model: VisionTransformer, batches: ImageBatches, device: torch.device) -> tuple[float, float]:
    """The sum of the losses of all images, and how many are classed rightly."""
    total = np.zeros(2)
    for first in range(0, len(batches), IMAGES_AT_ONCE):
        numbers = np.arange(first, min(first + IMAGES_AT_ONCE, len(batches)))
        batch = {entry: torch.from_numpy(array).to(device) for entry, array in batches.read(numbers, numbers).items()}
        sums = model(batch["images"], labels=batch["labels"], loss_weights=batch["loss_mask"])
        total += sums.double().cpu().numpy()
    return float(total[0]), float(total[1])


def _place(run: Run, split: str, files: Sequence[str]) -> tuple[Path, str]:
    """The folder of the images asked for, and what it is called."""
    if len(files) > 1:
        raise ValueError(f"--file = {' '.join(files)}: a vit is measured on one folder of images. Give one.")
    if not files and split not in FOLDERS:
        raise ValueError(f"--split = {split}: images have no such part. Use {' or '.join(FOLDERS)}.")
    place, name = (Path(files[0]), files[0]) if files else (_root(run) / FOLDERS[split], split)
    if not place.is_dir():
        raise ValueError(f"{place}: is not a directory. {'Correct' if files else 'Restore it, or give'} --file.")
    return place, name


def _root(run: Run) -> Path:
    return shapes_folder(run) if run.data.corpus is not None else Path((run.data.data_path or ("",))[0])


def _classes(run: Run, place: Path, index: Index) -> list[str]:
    """The classes that a checkpoint's model knows, in the order of their numbers.

    Their names are those of the training images, or if these are gone those of the images to measure, where they are
    the checkpoint's by digest. Raises ValueError if neither are.
    """
    trained_on = _root(run) / FOLDERS["train"]
    known = next((entry.get("classes_sha256") for entry in index.state.get("data") or ()), None)
    found = [class_names(folder) for folder in (trained_on, place) if folder.is_dir()]
    for classes in found:
        if known == digest_of_classes(classes):
            return classes
    if known is None and trained_on.is_dir() and len(found[0]) == run.model.num_classes:
        return found[0]  # a checkpoint from elsewhere does not say
    if trained_on.is_dir():
        raise ValueError(
            f"{trained_on}: has other classes than the {run.model.num_classes} that the model of step {index.step} was "
            "trained on. Give them their names again."
        )
    raise ValueError(
        f"{trained_on}: is gone, and {place} does not have just the {run.model.num_classes} classes that the model of "
        f"step {index.step} was trained on, which would tell their order. Restore it, or give such a folder as --file."
    )
