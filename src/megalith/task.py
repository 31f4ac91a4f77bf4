"""What the train loop needs to know of a pretraining task, and all that it knows. tasks/ holds one a file."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from megalith.config import Run
from megalith.data.loader import BatchSource
from megalith.datasets import identify_token_files
from megalith.layers.feedforward import GATED
from megalith.models.shape import activation_of, key_heads, shape_of
from megalith.monitor.flops import training_flops
from megalith.parallel.apply import BuildPart
from megalith.parallel.step import RunPart

Source = TypeVar("Source", bound=BatchSource)


@dataclass(frozen=True)
class Baseline:
    """What a predictor that has learnt almost nothing pays, to hold a validation loss against."""

    loss: str  # under which name the task logs what it is to be compared with
    value: float
    title: str  # "unigram entropy"
    meaning: str  # "the loss of knowing how often each token occurs and nothing else"


def never_resized(name: str, stored: Tensor, shape: tuple[int, ...]) -> Tensor:
    """For a task whose weights are taken over as they are. Raises ValueError."""
    raise ValueError(f"{name} is {tuple(stored.shape)} in the checkpoint and {shape} in this run")


@dataclass(frozen=True)
class Fit:
    """How --finetune takes over the weights of another run of the task."""

    may_differ: tuple[str, ...]  # of what weights depend on: the checkpoint's and the run's need not be the same
    begins_anew: Callable[[str], bool]  # by a parameter's name: it keeps its first values
    # Of a weight with other rows: (name, as it is stored, shape wanted) -> as it begins. Raises ValueError.
    resized: Callable[[str, Tensor, tuple[int, ...]], Tensor] = never_resized
    may_be_missing: Callable[[str], bool] = lambda name: False  # where the checkpoint has none, it begins anew


@dataclass(frozen=True)
class Origin:
    """A run of another family, with whose weights a model begins unless it goes on from a checkpoint."""

    flag: str  # that names it
    directory: str
    task: str
    # Of a parameter here: the parameter there whose value it takes; None: it is drawn.
    source_of: Callable[[str], str | None]


def no_origin(run: Run) -> Origin | None:
    """For a task whose weights are drawn."""
    return None


def no_baseline(run: Run, source: BatchSource) -> Baseline | None:
    """For a task that has none."""
    return None


def chance_among(count: int) -> Baseline:
    """For a task that tells classes apart: what guessing among that many costs."""
    meaning = f"the loss of guessing among {count} classes, with an accuracy of {1 / count:.3f}"
    return Baseline("loss", math.log(count), "chance", meaning)


def made_up(run: Run, targets: Mapping[str, int], make: Callable[[int, int], Source]) -> dict[str, Source]:
    """Made-up data of every part that is asked for samples: make(number of samples, seed of the part's own)."""
    return {
        name: make(num_samples, run.train.seed + number)
        for number, (name, num_samples) in enumerate(targets.items())
        if num_samples
    }


def stack_flops(run: Run, batch: int, *, length: int, vocab_size: int = 0, causal: bool = False) -> float:
    """Operations of a step through a stack of the run's blocks, by Megatron's convention, see monitor/flops.py.

    vocab_size: rows of the table that scores every token after it; 0: there is none.
    """
    shape = shape_of(run.model)
    return training_flops(
        num_layers=shape.num_layers,
        hidden_size=shape.width,
        seq_length=length,
        vocab_size=vocab_size,
        batch=batch,
        ffn_hidden_size=shape.inner,
        attention_width=shape.num_heads * shape.head_width,
        key_value_width=key_heads(run.model) * shape.head_width,
        causal=causal,
        gated=activation_of(run.model) in GATED,
    )


def same_identity(run: Run) -> dict[str, Any]:
    """For a task whose weights mean the same wherever the sizes of the transformer are the same."""
    return {}


@dataclass(frozen=True)
class Task:
    """What the train loop needs to know of a task, and all that it knows.

    Functions of a run alone may rely on a run that has passed its checks.
    """

    title: str  # as Megatron-LM's log spells it
    # A part of the model on the meta device: (run, padded vocabulary size, type of activations) -> what builds it.
    build_part: Callable[[Run, int, torch.dtype], BuildPart]
    # Batches by part of the data, for the number of samples wanted of each: (run, tokenizer, vocab_size=, targets=,
    # report=, moved=). Every rank calls it; moved is called as it gets on. Every batch has an entry `samples`, int64 B:
    # their numbers in the run.
    build_parts: Callable[..., Mapping[str, BatchSource]]
    # What leaves a part of the model for what enters it; the last part gives the vector of weighted losses. A figure
    # that is only logged (an accuracy) is a detached entry of it.
    run_part: RunPart
    losses: Callable[[Run], tuple[str, ...]]  # under which names they are logged
    masks: Callable[[Run], tuple[str, ...]]  # the entries of a batch that weight them, one for each
    # Places of a sample in the stream: tokens of all its sequences, or patches and the class token.
    num_places: Callable[[Run], int]
    # Floating-point operations of a step, recomputation apart: (run, padded vocabulary size, sequences).
    step_flops: Callable[[Run, int, int], float]
    # The same without any files, for measuring (--mock-data): (run, padded vocabulary size, targets).
    build_mock: Callable[[Run, int, Mapping[str, int]], Mapping[str, BatchSource]] | None = None
    # Operations of a step if scores that the causal order masks are not counted; None where nothing is masked so.
    causal_flops: Callable[[Run, int, int], float] | None = None
    entering: str = "tokens"  # the entry of a batch that enters the first part
    has_tokenizer: bool = True
    contrasts: bool = False  # a loss tells the right pairs among those of a microbatch on all replicas
    is_tied: Callable[[Run], bool] = lambda run: not run.model.untie_embeddings_and_output_weights
    baseline: Callable[[Run, BatchSource], Baseline | None] = no_baseline
    # Every validation measures the same samples, each once: all of them, if --eval-iters batches hold as many. Its last
    # batch may have places that no sample takes.
    validates_all: bool = False
    # What a checkpoint's weights depend on beside the sizes of the transformer, by name of the setting.
    identity: Callable[[Run], dict[str, Any]] = same_identity
    origin: Callable[[Run], Origin | None] = no_origin
    # What tells the data from other data, fit for JSON, found before anything is built: (run, tokenizer, vocab_size=,
    # report=). A checkpoint keeps it. Raises ValueError for data that is not there, or not as it was recorded.
    identify_data: Callable[..., list[dict[str, Any]]] = identify_token_files
    fit: Fit | None = None  # None: --finetune takes the very same model only
    # Commands to go on with at the end of a run: (word, command with {save}).
    next_commands: tuple[tuple[str, str], ...] = field(default=())
