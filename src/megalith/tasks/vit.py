"""ViT: a transformer over the patches of images that learns which class each belongs to."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megalith.config import Run
from megalith.data.images import ImageBatches, MockImages, class_names, open_folder
from megalith.data.loader import BatchSource
from megalith.data.tokenizer import Tokenizer
from megalith.datasets import Report
from megalith.files import digest_of_bytes
from megalith.models.shape import shape_of
from megalith.models.vit import VisionTransformer, num_patches, num_places, resized_positions
from megalith.parallel.apply import BuildPart
from megalith.parallel.step import Batch
from megalith.task import Baseline, Fit, Task, chance_among, made_up, stack_flops

# Where the images of a part of the data lie, below --data-path. There is no test set.
FOLDERS = {"train": "train", "valid": "val"}


def build_part(run: Run, vocab_size: int, dtype: torch.dtype) -> BuildPart:
    """What builds a part of a ViT, without weights yet."""
    return partial(VisionTransformer, run.model, dtype=dtype, finetune=run.checkpoint.finetune, device="meta")


def identify_data(run: Run, tokenizer: Tokenizer | None, *, vocab_size: int, report: Report) -> list[dict[str, Any]]:
    """The folder of images and its classes; the images themselves are only listed when they are opened."""
    root = Path((run.data.data_path or ("",))[0])
    try:
        classes = class_names(root / FOLDERS["train"])
    except OSError as error:
        raise ValueError(
            f"{root / FOLDERS['train']}: cannot be read ({error.strerror}). Correct --data-path."
        ) from error
    return [{"name": root.name, "classes_sha256": digest_of_classes(classes)}]


def digest_of_classes(classes: Sequence[str]) -> str:
    """What tells the classes, in the order of their numbers, from others."""
    return digest_of_bytes(json.dumps(list(classes)))


def build_parts(
    run: Run,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    targets: Mapping[str, int],
    report: Report,
    moved: Callable[[], None],
) -> dict[str, ImageBatches]:
    """The images of every part that is asked for samples.

    Raises ValueError naming the folder that is missing or does not fit --num-classes.
    """
    root = Path((run.data.data_path or ("",))[0])
    train = open_folder(root / FOLDERS["train"])
    if len(train.classes) != run.model.num_classes:
        raise ValueError(
            f"--num-classes = {run.model.num_classes}: {train.root} has {len(train.classes)} folders of classes. Give "
            "their number."
        )
    parts = {}
    for name, below in FOLDERS.items():
        if targets[name]:
            folder = train if name == "train" else open_folder(root / below, train.classes)
            parts[name] = ImageBatches(
                folder,
                side=run.model.img_dim,
                num_channels=run.model.num_channels,
                augmentation=run.data.image_augmentation if name == "train" else "none",
                seed=run.train.seed,
                workers=run.data.num_workers,
            )
    return parts


def build_mock(run: Run, vocab_size: int, targets: Mapping[str, int]) -> dict[str, MockImages]:
    """Made-up images of every part that is asked for samples; each part has images of its own."""
    model = run.model
    sizes = {"side": model.img_dim, "num_channels": model.num_channels, "num_classes": model.num_classes}
    return made_up(run, targets, lambda num_samples, seed: MockImages(num_samples, **sizes, seed=seed))


def run_part(part: nn.Module, entering: Tensor, batch: Batch) -> Tensor:
    """The stream, or from the last part the loss and the accuracy."""
    leaving: Tensor = part(entering, rows=batch.get("rows"), labels=batch["labels"], loss_weights=batch["loss_mask"])
    return leaving


def step_flops(run: Run, vocab_size: int, batch: int) -> float:
    """Operations of a step, by Megatron's convention; no gradient goes back to the images."""
    shape = shape_of(run.model)
    blocks = stack_flops(run, batch, length=num_places(run.model))
    patch = 2 * run.model.patch_dim**2 * run.model.num_channels * shape.width
    head = 2 * shape.width * run.model.num_classes
    if not run.checkpoint.finetune:
        head += 2 * shape.width**2
    return blocks + float(batch * (2 * num_patches(run.model) * patch + 3 * head))


def chance_baseline(run: Run, source: BatchSource) -> Baseline:
    """What guessing costs."""
    return chance_among(run.model.num_classes)


def identity(run: Run) -> dict[str, Any]:
    """What the weights depend on beside the sizes of the transformer."""
    model = run.model
    return {
        "img_dim": model.img_dim,
        "patch_dim": model.patch_dim,
        "num_channels": model.num_channels,
        "num_classes": model.num_classes,
        "head": "fine-tuning" if run.checkpoint.finetune else "pretraining",
    }


def begins_anew(name: str) -> bool:
    """Whether fine-tuning starts a parameter anew: the class that is asked for is another."""
    return name.startswith("finetuning_head.")


def resized(name: str, stored: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A weight of the model that was trained on images of another size, made to fit this one.

    Raises ValueError for a weight that cannot be.
    """
    if name != "position_embedding.weight":
        raise ValueError(f"{name} is {tuple(stored.shape)} in the checkpoint and {shape} in this run")
    return resized_positions(stored, shape[0])


TASK = Task(
    title="VIT",
    build_part=build_part,
    build_parts=build_parts,
    identify_data=identify_data,
    run_part=run_part,
    losses=lambda run: ("loss", "accuracy"),
    masks=lambda run: ("loss_mask", "loss_mask"),
    num_places=lambda run: num_places(run.model),
    step_flops=step_flops,
    build_mock=build_mock,
    entering="images",
    has_tokenizer=False,
    is_tied=lambda run: False,
    baseline=chance_baseline,
    identity=identity,
    fit=Fit(
        may_differ=("img_dim", "num_classes", "head", "max_position_embeddings"),
        begins_anew=begins_anew,
        resized=resized,
    ),
    next_commands=(
        ("measure", "megalith evaluate {save}"),
        ("finetune", "megalith pretrain vit --finetune --load {save} --num-classes N --data-path FOLDER ..."),
    ),
)
