"""Events of a run whose numbers go wrong, or that somebody should look after; each carries its text for people.

`monitor/events.py` has all others.
"""

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class StepLeftOut:
    """A step was computed, but its update was left out: its numbers are not finite, or a spike."""

    step: int
    found: str  # "the lm loss is not finite"
    samples: tuple[int, ...]  # by their numbers in the run: of the microbatches in which it was found, or of the step
    in_a_row: int
    text: str


@dataclass(frozen=True)
class SpikeFound:
    """A loss or gradient norm far above those of the last steps."""

    step: int
    name: str
    value: float
    median: float
    score: float  # distance to the median in standard deviations
    samples: tuple[int, ...]  # of the step
    text: str


@dataclass(frozen=True)
class Rewound:
    """The run went back to a checkpoint; first to last are the steps that it passes over from now on."""

    step: int  # of the checkpoint
    left: int  # the step at which it turned back
    first: int
    last: int
    text: str


@dataclass(frozen=True)
class ReplicasCompared:
    """The weights and the optimizer's state of ranks that hold the same were compared."""

    step: int
    seconds: float
    differing: tuple[int, ...]  # ranks
    text: str  # empty if all are alike


@dataclass(frozen=True)
class ErringRank:
    """A rank that made something else of the same numbers."""

    rank: int
    host: str
    device: str
    passes: tuple[int, ...]  # of those taken, from 1 on, in which it did; all three where no two agree
    tensors: tuple[str, ...]  # what differs, in the order in which it was made


@dataclass(frozen=True)
class PassesCompared:
    """The forward and backward passes of a step were taken again, and what came of them was compared."""

    step: int
    seconds: float  # of the passes that were taken again, and of comparing
    verdict: str  # alike, transient: two of three are, or persistent
    erring: tuple[ErringRank, ...]
    text: str  # empty if all are alike


@dataclass(frozen=True)
class RankIsSlow:
    """The others wait for a rank."""

    step: int
    rank: int
    ratio: float  # of its time to that of the others
    text: str


@dataclass(frozen=True)
class SaveWasSlow:
    """A checkpoint took much longer to write than the ones before it."""

    step: int
    seconds: float  # from the start of the save to its end
    num_bytes: int
    bytes_per_second: float
    ratio: float  # of its time to the median of the ones before
    stall: float | None  # seconds that the steps waited for it; None after the last step
    text: str


Trouble: TypeAlias = StepLeftOut | SpikeFound | Rewound | ReplicasCompared | PassesCompared | RankIsSlow | SaveWasSlow
TROUBLES = (StepLeftOut, SpikeFound, Rewound, ReplicasCompared, PassesCompared, RankIsSlow, SaveWasSlow)
