"""One row per pretraining task: which model, data and losses belong together. A new task is a new row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalith.config import Run
from megalith.data.causal import CausalBatches
from megalith.datasets import build_causal_parts
from megalith.models.decoder import Decoder
from megalith.parallel.apply import BuildPart
from megalith.parallel.step import Batch, RunPart


@dataclass(frozen=True)
class Task:
    """What the train loop needs to know of a task, and all that it knows."""

    title: str  # as Megatron-LM's log spells it
    # A part of the model on the meta device: (run, padded vocabulary size, type of activations) -> what builds it.
    build_part: Callable[[Run, int, torch.dtype], BuildPart]
    # Batches by part of the data, for the number of samples wanted of each.
    build_parts: Callable[..., Mapping[str, CausalBatches]]
    # What leaves a part of the model for what enters it; the last part gives the vector of weighted losses.
    run_part: RunPart
    losses: tuple[str, ...]  # under which names they are logged
    masks: tuple[str, ...]  # the entries of a batch that weight them


def gpt_part(run: Run, vocab_size: int, dtype: torch.dtype) -> BuildPart:
    """What builds a part of a GPT, without weights yet."""

    def build(layers: range, first: bool, last: bool) -> Decoder:
        return Decoder(
            run.model,
            vocab_size,
            dtype=dtype,
            untie_embeddings_and_output_weights=run.model.untie_embeddings_and_output_weights,
            layers=layers,
            first=first,
            last=last,
            device="meta",
        )

    return build


def run_gpt_part(part: nn.Module, entering: Tensor, batch: Batch) -> Tensor:
    """The stream, or from the last part the loss of predicting each next token."""
    leaving: Tensor = part(
        entering,
        batch["positions"],
        documents=batch.get("documents"),
        rows=batch.get("rows"),
        labels=batch["labels"],
        loss_weights=batch["loss_mask"],
    )
    return leaving.reshape(1) if leaving.dim() == 0 else leaving


# The tasks that can be trained.
TASK_ROWS = {
    "gpt": Task("GPT", gpt_part, build_causal_parts, run_gpt_part, losses=("lm loss",), masks=("loss_mask",)),
}
