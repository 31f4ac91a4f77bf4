"""Classification: a trained BERT learns which class a pair of sentences is of. `megalith finetune` trains this task."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megalith.config import Run
from megalith.data.loader import BatchSource
from megalith.data.pair_files import LAYOUTS, ClassBatches, Layout, read_pairs
from megalith.data.tokenizer import Tokenizer
from megalith.datasets import Report, identify_training_files
from megalith.derived import sequence_length
from megalith.models.bert import Bert
from megalith.models.shape import shape_of
from megalith.monitor.events import Warned
from megalith.parallel.apply import BuildPart
from megalith.parallel.step import Batch
from megalith.task import Baseline, Fit, Task, chance_among, stack_flops


def layout_of(run: Run) -> Layout:
    """How the files of pairs are laid out."""
    assert run.data.pairs_format is not None, "check_classify.py saw to it"
    return LAYOUTS[run.data.pairs_format]


def build_part(run: Run, vocab_size: int, dtype: torch.dtype) -> BuildPart:
    """What builds a part of a BERT with a head for classes, without weights yet."""
    num_classes = len(layout_of(run).classes)

    return partial(
        Bert, run.model, vocab_size, dtype=dtype, head="classification", num_classes=num_classes, device="meta"
    )


def build_parts(
    run: Run,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    targets: Mapping[str, int],
    report: Report,
    moved: Callable[[], None],
) -> dict[str, ClassBatches]:
    """The pairs of the files for training and for validation, where they are asked for samples.

    Raises ValueError naming the line of a file that is not as its format says; what is left out is reported.
    """
    files = {"train": run.data.train_data or (), "valid": run.data.valid_data or ()}
    length = sequence_length(run)
    return {
        name: ClassBatches(
            read_pairs(paths, layout_of(run), warn=lambda text: report(Warned(text))), tokenizer, length=length
        )
        for name, paths in files.items()
        if paths and targets[name]
    }


def run_part(part: nn.Module, entering: Tensor, batch: Batch) -> Tensor:
    """The stream, or from the last part the loss and the accuracy."""
    leaving: Tensor = part(
        entering,
        batch["types"],
        padding=batch["padding"],
        rows=batch.get("rows"),
        classes=batch["classes"],
        class_weights=batch["class_mask"],
    )
    return leaving


def step_flops(run: Run, vocab_size: int, batch: int) -> float:
    """Operations of a step, by Megatron's convention."""
    shape = shape_of(run.model)
    blocks = stack_flops(run, batch, length=sequence_length(run))
    return blocks + float(6 * batch * shape.width * (shape.width + len(layout_of(run).classes)))


def chance_baseline(run: Run, source: BatchSource) -> Baseline:
    """What guessing costs."""
    return chance_among(len(layout_of(run).classes))


def identity(run: Run) -> dict[str, Any]:
    """What the weights depend on beside the sizes of the transformer."""
    model = run.model
    return {
        "bert_binary_head": model.bert_binary_head,
        "norm_after_residual": model.norm_after_residual,
        "num_classes": len(layout_of(run).classes),
    }


def begins_anew(name: str) -> bool:
    """Whether fine-tuning starts a parameter anew: what is asked for is another thing."""
    return name.startswith("classification_head.")


def may_be_missing(name: str) -> bool:
    """A model that was trained without the binary head has no pooler."""
    return name.startswith("pooler.")


TASK = Task(
    title="BERT classification",
    build_part=build_part,
    build_parts=build_parts,
    run_part=run_part,
    losses=lambda run: ("loss", "accuracy"),
    masks=lambda run: ("class_mask", "class_mask"),
    num_places=sequence_length,
    step_flops=step_flops,
    is_tied=lambda run: False,
    validates_all=True,
    baseline=chance_baseline,
    identity=identity,
    identify_data=identify_training_files,
    fit=Fit(
        may_differ=("task", "num_classes"),
        begins_anew=begins_anew,
        may_be_missing=may_be_missing,
    ),
    next_commands=(("measure", "megalith evaluate {save}"),),
)
