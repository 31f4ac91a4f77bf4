"""GPT: a decoder that predicts each next token of a stream of documents."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megalith.config import Run
from megalith.data.causal import CausalBatches, CausalDataset
from megalith.data.loader import BatchSource
from megalith.data.mock import MockRows
from megalith.datasets import build_causal_parts
from megalith.derived import sequence_length
from megalith.evaluate.loss import unigram_entropy
from megalith.models.decoder import Decoder
from megalith.models.shape import options_of, rotary_width
from megalith.parallel.apply import BuildPart
from megalith.parallel.step import Batch
from megalith.task import Baseline, Task, made_up, stack_flops

MOST_COUNTED = 20_000_000  # tokens looked at for the frequencies


def build_part(run: Run, vocab_size: int, dtype: torch.dtype) -> BuildPart:
    """What builds a part of a GPT, without weights yet."""
    return partial(Decoder, run.model, vocab_size, dtype=dtype, device="meta")


def run_part(part: nn.Module, entering: Tensor, batch: Batch) -> Tensor:
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


def build_mock(run: Run, vocab_size: int, targets: Mapping[str, int]) -> dict[str, CausalBatches]:
    """Made-up batches of every part that is asked for samples; each part has rows of its own."""

    def make(num_samples: int, seed: int) -> CausalBatches:
        size = run.data.vocab_size or vocab_size
        rows = MockRows(num_samples, sequence_length=sequence_length(run), vocab_size=size, seed=seed)
        return CausalBatches(rows, eod=None, reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False)

    return made_up(run, targets, make)


def step_flops(run: Run, vocab_size: int, batch: int, *, causal: bool = False) -> float:
    """By Megatron's convention, or the causal one, see monitor/flops.py."""
    return stack_flops(run, batch, length=sequence_length(run), vocab_size=vocab_size, causal=causal)


def unigram_baseline(run: Run, source: BatchSource) -> Baseline | None:
    """Nats per token of the documents' frequencies; None for data that is no single corpus."""
    if not isinstance(source, CausalBatches) or not isinstance(source.rows, CausalDataset):
        return None
    dataset = source.rows
    documents = np.unique(np.asarray(dataset.maps.doc_idx))
    ends = np.cumsum(dataset.indexed.lengths[documents], dtype=np.int64)
    enough = documents[: int(np.searchsorted(ends, MOST_COUNTED)) + 1]
    parts = [dataset.indexed.read(int(document)) for document in enough]
    entropy = unigram_entropy(np.concatenate(parts)[:MOST_COUNTED])
    meaning = "the loss of knowing how often each token occurs and nothing else"
    return Baseline("lm loss", entropy, "unigram entropy", meaning)


def identity(run: Run) -> dict[str, Any]:
    """What the weights depend on beside the sizes of the transformer: options, where there are any.

    Without a table of positions they do not depend on how many there may be.
    """
    without_table = {"max_position_embeddings": None} if rotary_width(run.model) else {}
    return {**options_of(run.model), **without_table}


TASK = Task(
    title="GPT",
    build_part=build_part,
    build_parts=build_causal_parts,
    run_part=run_part,
    losses=lambda run: ("lm loss",),
    masks=lambda run: ("loss_mask",),
    num_places=sequence_length,
    step_flops=step_flops,
    build_mock=build_mock,
    causal_flops=partial(step_flops, causal=True),
    baseline=unigram_baseline,
    identity=identity,
    next_commands=(
        ("talk", 'megalith generate {save} --prompt "..."'),
        ("measure", "megalith evaluate {save}"),
    ),
)
