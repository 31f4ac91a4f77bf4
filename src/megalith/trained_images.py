"""A trained ViT from its run directory, and how often it is right about images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalith.config import Run
from megalith.corpora import shapes_folder
from megalith.data.images import ImageBatches, ImageFolder, open_folder
from megalith.models.vit import VisionTransformer
from megalith.tasks.vit import FOLDERS
from megalith.trained import compute_type, load_weights, run_of

IMAGES_AT_ONCE = 64


def measure_images(
    directory: str, *, split: str | None, files: Sequence[str], step: int | None, device: str
) -> dict[str, Any]:
    """Loss and accuracy over all images of a split of the run's data, or of an image folder, as one object.

    Raises ValueError for no run directory, a split that images do not have, or classes that the model does not know.
    """
    run = run_of(directory)
    folder, name = _folder(run, split or "valid", files)
    device_of, dtype = compute_type(run, device)
    model, found_step = load_weights(
        directory,
        lambda index: VisionTransformer(
            run.model, dtype=dtype, finetune=run.checkpoint.finetune, device="meta"
        ).to_empty(device=device_of),
        step=step,
    )
    batches = ImageBatches(
        folder,
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


def _folder(run: Run, split: str, files: Sequence[str]) -> tuple[ImageFolder, str]:
    """The images asked for, and what they are called. Classes are those of the run's training images."""
    root = shapes_folder(run) if run.data.corpus is not None else Path((run.data.data_path or ("",))[0])
    if len(files) > 1:
        raise ValueError(f"--file = {' '.join(files)}: a vit is measured on one folder of images. Give one.")
    if not files and split not in FOLDERS:
        raise ValueError(f"--split = {split}: images have no such part. Use {' or '.join(FOLDERS)}.")
    classes = open_folder(root / FOLDERS["train"]).classes
    if len(classes) != run.model.num_classes:
        raise ValueError(f"{root}: has {len(classes)} classes, the model has {run.model.num_classes}")
    return open_folder(Path(files[0]) if files else root / FOLDERS[split], classes), files[0] if files else split
