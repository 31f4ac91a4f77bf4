"""A trained bi-encoder from its run directory, and the vectors that it gives texts."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from megalith.config import BIENCODERS, Run
from megalith.data.marked import Marks
from megalith.data.tokenizer import Tokenizer
from megalith.derived import retriever_length
from megalith.models.retrieval import Retriever
from megalith.models.shape import shape_of
from megalith.trained import compute_type, load_weights, run_of, tokenizer_of

WIDTH_STEP = 8  # a batch is as wide as its longest text, rounded up to this


@dataclass(frozen=True)
class TrainedRetriever:
    """A bi-encoder as a run left it."""

    run: Run
    step: int
    tokenizer: Tokenizer
    model: Retriever
    marks: Marks


def open_retriever(
    directory: str, *, step: int | None, device: str, length: int | None = None, local_rank: int = 0
) -> TrainedRetriever:
    """The newest bi-encoder of a run directory that verifies, or that of a step.

    length: tokens of a text, by default what the run says. Raises ValueError if there is none, or no bi-encoder, or
    the texts would be longer than its table of positions.
    """
    run = run_of(directory)
    if run.task not in BIENCODERS:
        raise ValueError(f"{directory}: holds a {run.task} model; only {' and '.join(BIENCODERS)} embed texts.")
    length = retriever_length(run) if length is None else length
    places = shape_of(run.model).num_positions
    if length > places:
        raise ValueError(f"--retriever-seq-length = {length}: the model has {places} positions. Give at most so many.")
    tokenizer = tokenizer_of(directory, run)
    chosen, dtype = compute_type(run, device, local_rank)

    def build(index: Any) -> Retriever:
        vocab_size = int(index.state["model"]["padded_vocab_size"])
        return Retriever(run.model, vocab_size, dtype=dtype, device="meta").to_empty(device=chosen)

    model, found_step = load_weights(directory, build, step=step, tokenizer=tokenizer)
    return TrainedRetriever(run, found_step, tokenizer, model.eval(), Marks.of(tokenizer, length))


@torch.no_grad()
def embed(tower: nn.Module, marks: Marks, sequences: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
    """BE: the vectors of marked texts, on the host."""
    tokens, real = marks.fill(sequences)
    width = min(-(-max(len(sequence) for sequence in sequences) // WIDTH_STEP) * WIDTH_STEP, marks.length)
    device = next(tower.parameters()).device
    inputs = (torch.from_numpy(np.ascontiguousarray(array[:, :width])).to(device) for array in (tokens, real))
    vectors: NDArray[np.float32] = tower(*inputs).float().cpu().numpy()
    return vectors


def digest_of_weights(tower: nn.Module) -> str:
    """SHA-256 over all weights of a tower, by name: whether two made the same vectors."""
    sha256 = hashlib.sha256()
    for name, parameter in sorted(tower.named_parameters()):
        sha256.update(name.encode())
        sha256.update(parameter.detach().float().cpu().contiguous().numpy().data)
    return sha256.hexdigest()
