"""What is checked for ViT alone: images, patches and classes."""

import os
from collections.abc import Iterator
from pathlib import Path

from megalith.config import Fault, Run, fault
from megalith.data.images import MODES, SHAPES, class_names, has_pillow
from megalith.models.vit import num_places


def vit_faults(run: Run) -> Iterator[Fault]:
    """Every fault of a ViT's settings."""
    yield from _patches(run)
    if run.data.mock_data:
        return
    if not has_pillow():
        yield Fault(
            "vit", None, "reads images with Pillow, which is not installed", "Run pip install 'megalith[vision]'"
        )
    if run.data.corpus == "shapes":
        yield from _classes(run, len(SHAPES), "--corpus shapes")
    elif run.data.data_path:
        yield from _folders(run)


def _patches(run: Run) -> Iterator[Fault]:
    model, parallel = run.model, run.parallel
    side, patch = model.img_dim, model.patch_dim
    if model.num_channels not in MODES:
        yield fault("num_channels", model.num_channels, "must be 3 (colour) or 1 (grey)", "Give one of them")
    if side < 1 or patch < 1:
        return
    if side % patch:
        near = [patch * (side // patch), patch * (side // patch + 1)]
        rule = f"is not divisible by --patch-dim = {patch}"
        yield fault("img_dim", side, rule, f"Nearest that are: {[size for size in near if size]}")
        return
    places, tensor = num_places(model), parallel.tensor_model_parallel_size
    for name in ("sequence_parallel", "distribute_checkpointed_activations"):
        if getattr(parallel, name) and tensor > 0 and places % tensor:
            rule = (
                f"cuts {places} places (patches and class token) over {tensor} tensor ranks, which does not come even"
            )
            yield fault(name, None, rule, "Leave it out, or change --img-dim or --patch-dim")


def _folders(run: Run) -> Iterator[Fault]:
    words = run.data.data_path or ()
    if len(words) > 1:
        rule = f"has {len(words)} words; a vit has one folder of images, with train and val in it"
        yield fault("data_path", " ".join(words), rule, "Give one")
        return
    wanted = ["train"] if run.evaluate.eval_iters == 0 else ["train", "val"]
    missing = [name for name in wanted if not os.path.isdir(os.path.join(words[0], name))]
    if missing:
        rule = f"has no folder {' and no folder '.join(missing)} with a folder of images for each class"
        yield fault("data_path", words[0], rule, "Correct the path")
        return
    yield from _classes(run, len(class_names(Path(words[0]) / "train")), words[0])


def _classes(run: Run, count: int, where: str) -> Iterator[Fault]:
    if count and run.model.num_classes != count:
        rule = f"does not fit {where}, which has {count} classes"
        yield fault("num_classes", run.model.num_classes, rule, f"Give --num-classes {count}")
