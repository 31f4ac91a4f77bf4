"""One row per pretraining task: which model, data and losses belong together. A new task is a new row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalith.config import Run
from megalith.data.causal import CausalBatches
from megalith.datasets import build_causal_parts
from megalith.models.decoder import Decoder

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """What the train loop needs to know of a task, and all that it knows."""

    title: str  # as Megatron-LM's log spells it
    # The model on the meta device for a padded vocabulary size and the type of its activations.
    build_model: Callable[[Run, int, torch.dtype], nn.Module]
    # Batches by part of the data, for the number of samples wanted of each.
    build_parts: Callable[..., Mapping[str, CausalBatches]]
    # The weighted sum of each loss of a batch, by the name under which it is logged.
    losses: Callable[[nn.Module, Batch], dict[str, Tensor]]
    # The entries of a batch that weight its losses.
    masks: tuple[str, ...]


def build_gpt(run: Run, vocab_size: int, dtype: torch.dtype) -> Decoder:
    """A GPT without weights yet."""
    return Decoder(
        run.model,
        vocab_size,
        dtype=dtype,
        untie_embeddings_and_output_weights=run.model.untie_embeddings_and_output_weights,
        device="meta",
    )


def gpt_losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The loss of predicting each next token."""
    loss: Tensor = model(
        batch["tokens"],
        batch["positions"],
        documents=batch.get("documents"),
        rows=batch.get("rows"),
        labels=batch["labels"],
        loss_weights=batch["loss_mask"],
    )
    return {"lm loss": loss}


# The tasks that can be trained.
TASK_ROWS = {
    "gpt": Task("GPT", build_gpt, build_causal_parts, gpt_losses, masks=("loss_mask",)),
}
