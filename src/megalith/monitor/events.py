"""What happens in a run, as values: the train loop reports these, and only these, and knows nothing of their form.

Each goes whole to the run's log.jsonl; what a person sees of it is decided in reference.py (Megatron-LM's lines),
clean.py (lines for people) and scalars.py (TensorBoard). *step* is the number of the optimizer step just taken,
counted from 1; 0 is the start. A number that still lies on a GPU may stay there: it is read when it is written, not
when reported.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import SupportsFloat, TypeAlias

from megalith.monitor.memory import MemoryUse
from megalith.monitor.troubles import Trouble


@dataclass(frozen=True)
class RunStarted:
    """The settings stand and the processes are counted; nothing is built yet."""

    arguments: Mapping[str, object]
    world_size: int
    data_parallel_size: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    dtype: str  # of the activations, by torch's name: float16
    num_microbatches: int  # of the first step
    global_batch_size: int  # sequences per step, once any ramp is over
    rampup_batch_size: tuple[int, int, int] | None = None  # start, increment, samples
    remarks: tuple[str, ...] = ()  # what the rules over the arguments had to say, a line each


@dataclass(frozen=True)
class TokenizerBuilt:
    name: str
    vocab_size: int
    padded_vocab_size: int


@dataclass(frozen=True)
class ScalarsOpened:
    """TensorBoard files will be written to a directory."""

    directory: str


@dataclass(frozen=True)
class RanksStarted:
    """The process groups stand and the seeds are set; the ranks are those of the process that reports."""

    tensor_parallel_size: int
    pipeline_parallel_size: int
    seed: int
    rank: int
    model_parallel_rank: int
    data_parallel_rank: int
    model_parallel_seed: int
    data_parallel_seed: int


@dataclass(frozen=True)
class Initialized:
    """Processes, tokenizer and seeds are ready."""

    seconds: float  # since the program started


@dataclass(frozen=True)
class PlaceReached:
    """The run came to a place that Megatron-LM marks with the time: "after megatron is initialized"."""

    place: str


@dataclass(frozen=True)
class RankParameters:
    """How many parameters a rank of the model holds; a tied copy of the embedding counts again."""

    tensor_rank: int
    pipeline_rank: int
    num_parameters: int


@dataclass(frozen=True)
class ModelBuilt:
    name: str  # GPT
    num_parameters: int  # of the model, each counted once
    ranks: tuple[RankParameters, ...]  # one for each rank of the model


@dataclass(frozen=True)
class ScheduleBuilt:
    style: str  # cosine


@dataclass(frozen=True)
class TargetsSet:
    """How many samples of each part of the data the run asks for."""

    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class CorpusOpened:
    num_documents: int
    seconds: float
    warmed_up: bool = False  # the whole file was read once, to have it in memory
    num_sentences: int | None = None  # where a document has an item for each


@dataclass(frozen=True)
class CorpusPart:
    name: str  # train, validation or test
    first: int  # document
    end: int  # one past the last document
    sentences: tuple[int, int] | None = None  # the first and the one past the last, where documents have them


@dataclass(frozen=True)
class CorpusSplit:
    parts: tuple[CorpusPart, ...]


@dataclass(frozen=True)
class MapsBuilt:
    """The index maps of one part of a corpus were not at hand and have been made."""

    num_documents: int  # in an epoch
    num_epochs: int
    seq_length: int
    num_samples: int
    samples_before_last_epoch: int  # shuffled among themselves if the last epoch is separate, else all
    samples_per_epoch: int
    last_epoch_samples: int
    separate_last_epoch: bool
    document_seconds: float
    sample_seconds: float
    shuffle_seconds: float


@dataclass(frozen=True)
class MapsLoaded:
    """The index maps of one part of a corpus are in place."""

    part: str
    document_path: str
    sample_path: str
    shuffle_path: str
    seconds: float
    num_samples: int
    num_epochs: int


@dataclass(frozen=True)
class SentenceMapLoaded:
    """Which sentences make which sample of one part of a corpus is mapped from the disk."""

    part: str
    path: str
    seconds: float
    num_samples: int
    num_used: int  # documents of which samples are made
    num_documents: int


@dataclass(frozen=True)
class BlendBuilt:
    """The order in which samples are drawn from several corpora."""

    weights: tuple[float, ...]
    achieved: tuple[float, ...]  # the share of each corpus among the samples drawn
    seconds: float


@dataclass(frozen=True)
class DatasetsBuilt:
    name: str  # GPT


@dataclass(frozen=True)
class TimersReported:
    """What the named timers measured since the last report, in the order in which they are to be shown."""

    seconds: Mapping[str, float]  # sums
    num_steps: int = 1  # what the sums are divided by
    step: int | None = None  # None outside of training


@dataclass(frozen=True)
class TrainingStarted:
    step: int  # taken before
    last_step: int
    consumed_samples: int
    num_devices: int
    peak_flops: float | None = (
        None  # floating-point operations per second of one device, as its maker says; None: unknown
    )


@dataclass(frozen=True)
class StepDone:
    """One optimizer step, taken or skipped."""

    step: int
    consumed_samples: int  # in the whole run so far
    num_tokens: int  # of this step, over all ranks
    seconds: float  # of this step alone
    losses: Mapping[str, SupportsFloat]  # mean over the step's tokens, by name
    learning_rate: float  # of the next step
    global_batch_size: int  # sequences in this step
    loss_scale: float
    skipped: bool  # the gradients overflowed, so the weights stayed as they were
    grad_norm: SupportsFloat | None = None  # before clipping
    num_zeros: SupportsFloat | None = None  # entries of the gradients that are zero
    params_norm: SupportsFloat | None = None
    model_flops: float | None = (
        None  # floating-point operations that the model needs for this step, recomputation apart
    )
    memory: MemoryUse | None = None
    causal_flops: float | None = None  # the same with attention at half, since half the scores are masked


@dataclass(frozen=True)
class IntervalDone:
    """The steps since the last such report, summed up."""

    step: int
    last_step: int
    consumed_samples: int
    num_steps: int
    num_skipped: int
    num_nan: int  # skipped steps whose loss was not finite
    seconds: float  # since the last report, with evaluations and checkpoints
    step_seconds: float  # of the steps alone
    losses: Mapping[str, float]  # mean over the steps that were taken; empty if none was
    learning_rate: float
    global_batch_size: int
    loss_scale: float
    grad_norm: float | None
    num_zeros: float | None
    params_norm: float | None
    num_tokens: int
    tokens_per_second: float
    tflops_per_device: float | None  # of the model, 10^12 floating-point operations per second
    mfu: float | None  # share of the device's peak
    causal_tflops_per_device: float | None = None  # the same with attention at half
    peak_memory_bytes: int | None = None  # most held on this rank so far


@dataclass(frozen=True)
class RankMemory:
    rank: int
    memory: MemoryUse


@dataclass(frozen=True)
class MemoryReported:
    step: int
    ranks: tuple[RankMemory, ...]


@dataclass(frozen=True)
class Evaluated:
    step: int
    consumed_samples: int
    split: str  # validation or test
    final: bool  # after the last step of the run, rather than between steps
    losses: Mapping[str, float]  # mean, by name
    seconds: float


@dataclass(frozen=True)
class CheckpointStarted:
    step: int
    directory: str


@dataclass(frozen=True)
class CheckpointSaved:
    step: int
    directory: str
    seconds: float  # of the whole write, for which training stands still if nothing runs beside it
    while_training: bool = True  # rather than once training was over
    stall: float | None = None  # seconds that the steps waited for it, where it was written beside them


@dataclass(frozen=True)
class LoadStarted:
    directory: str
    step: int | None  # None: a checkpoint without a step, made to start from


@dataclass(frozen=True)
class CheckpointLoaded:
    directory: str
    step: int
    seconds: float
    version: str = ""  # of the format, if the reader is to know


@dataclass(frozen=True)
class CheckpointMissing:
    """A run was to go on from a directory that holds no checkpoint, and starts from new weights."""

    tracker: str  # the file that would name the checkpoint


@dataclass(frozen=True)
class Warned:
    """Something that a good engineer would want to know: what, and what to do."""

    text: str


@dataclass(frozen=True)
class RunEnded:
    step: int
    reason: str  # done, exit-interval, exit-duration, the name of a signal, or what is wrong
    minutes: float  # since the program started
    spent: Mapping[str, float]  # seconds of the whole run by what they went to, earlier starts included


Event: TypeAlias = (
    RunStarted
    | TokenizerBuilt
    | ScalarsOpened
    | RanksStarted
    | Initialized
    | PlaceReached
    | ModelBuilt
    | ScheduleBuilt
    | TargetsSet
    | CorpusOpened
    | CorpusSplit
    | MapsBuilt
    | MapsLoaded
    | SentenceMapLoaded
    | BlendBuilt
    | DatasetsBuilt
    | TimersReported
    | TrainingStarted
    | StepDone
    | IntervalDone
    | MemoryReported
    | Evaluated
    | CheckpointStarted
    | CheckpointSaved
    | LoadStarted
    | CheckpointLoaded
    | CheckpointMissing
    | Warned
    | Trouble
    | RunEnded
)
