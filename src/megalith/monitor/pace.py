"""What has become slow: a rank for which the others wait, or the disk that checkpoints go to.

All ranks need the same time for a step, for the fast ones wait in the exchange of gradients. So each measures what it
does by itself: reading its samples, and its forward and backward passes. A save is held against the ones before.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch

FEWEST_STEPS = 10  # that are judged; the median of so many forgives single ones
MOST_STEPS = 100
FEWEST_SAVES = 3  # before one is judged by their median
MOST_SAVES = 16
SHORTEST_SAVE = 5.0  # seconds; what takes less costs nobody anything
LIKE_SIZE = 1.25  # between two checkpoints that are compared, at most


class Pace:
    """Takes the time of this rank's own work in each step; with a GPU by its clock, and nothing waits for that."""

    def __init__(self, device: torch.device, *, is_measured: bool) -> None:
        self._with_events = device.type == "cuda"
        self._is_measured = is_measured
        self._own: deque[list[tuple[Any, Any]]] = deque(maxlen=MOST_STEPS)

    def begin(self) -> None:
        """A step begins."""
        self._own.append([])

    @contextmanager
    def own(self) -> Iterator[None]:
        """What is done inside is this rank's own work."""
        if not self._is_measured:
            yield
            return
        began = self._now()
        yield
        self._own[-1].append((began, self._now()))

    def around(self, timers: Callable[[str], AbstractContextManager[object]]) -> Callable[[str], Any]:
        """Timers inside of which everything is own work: forward and backward passes."""

        @contextmanager
        def timed(name: str) -> Iterator[None]:
            with timers(name), self.own():
                yield

        return timed

    def _now(self) -> Any:
        if not self._with_events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def median(self) -> float | None:
        """Seconds of the median step since the last answer; None as long as they are too few to be judged."""
        if not self._is_measured or len(self._own) < FEWEST_STEPS:
            return None
        steps = list(self._own)
        self._own.clear()
        return statistics.median(sum(self._seconds(*span) for span in spans) for spans in steps)

    def _seconds(self, began: Any, ended: Any) -> float:
        return float(began.elapsed_time(ended)) / 1000.0 if self._with_events else float(ended - began)


class Slow(NamedTuple):
    """A rank that takes longer than the others."""

    rank: int
    ratio: float  # of its time to the median of the others'


def slow_ranks(seconds: Mapping[int, float], groups: Sequence[Sequence[int]], *, ratio: float) -> list[Slow]:
    """The ranks that need more than ratio times as long as the others of their group, which do the same work."""
    found = []
    for group in groups:
        if len(group) < 2:
            continue
        ordered = sorted(group, key=lambda rank: seconds[rank])
        place_of = {rank: place for place, rank in enumerate(ordered)}
        times = [seconds[rank] for rank in ordered]
        for rank in group:
            median = _median_without(place_of[rank], times)
            if median > 0 and seconds[rank] > ratio * median:
                found.append(Slow(rank, seconds[rank] / median))
    return found


def _median_without(place: int, ordered: Sequence[float]) -> float:
    """The median of numbers in ascending order, of which the one at a place does not count."""
    half, odd = divmod(len(ordered) - 1, 2)
    upper = ordered[half + (half >= place)]
    return upper if odd else (ordered[half - 1 + (half - 1 >= place)] + upper) / 2


class SlowSave(NamedTuple):
    """A checkpoint whose writing took far longer than that of the ones before."""

    ratio: float  # of its time to the usual
    usual: float  # seconds: the median of the ones before
    num_before: int


class SavePace:
    """Holds the time that each checkpoint took against the median of the ones before, of like size; 0 for a ratio: not.

    Up to half of those may have been slow themselves before the median follows: so what stays slow is told for as long
    as it is news, and a single slow one changes nothing.
    """

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._before: deque[tuple[float, int]] = deque(maxlen=MOST_SAVES)

    def judge(self, seconds: float, num_bytes: int) -> SlowSave | None:
        """Whether a checkpoint of so many bytes was slow; it counts for the next ones."""
        alike = [took for took, size in self._before if max(size, num_bytes) <= LIKE_SIZE * min(size, num_bytes)]
        self._before.append((seconds, num_bytes))
        if not self._ratio or len(alike) < FEWEST_SAVES or seconds < SHORTEST_SAVE:
            return None
        usual = statistics.median(alike)
        return SlowSave(seconds / usual, usual, len(alike)) if seconds > self._ratio * usual > 0 else None
