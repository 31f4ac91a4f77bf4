"""Which rank keeps the others waiting.

All ranks need the same time for a step, for the fast ones wait in the exchange of gradients. So each measures what it
does by itself: from the beginning of a step until its gradients are ready to be exchanged.
"""

import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

FEWEST_STEPS = 10  # that are judged; the median of so many forgives single ones
MOST_STEPS = 1000


class Pace:
    """Takes the time of this rank's own work in each step; with a GPU by its clock, and nothing waits for that."""

    def __init__(self, device: torch.device) -> None:
        self._with_events = device.type == "cuda"
        self._began: Any = None
        self._own: deque[tuple[Any, Any]] = deque(maxlen=MOST_STEPS)

    def begin(self) -> None:
        """A step begins."""
        self._began = self._now()

    def ready(self) -> None:
        """What this rank does alone in the step is done."""
        self._own.append((self._began, self._now()))

    def _now(self) -> Any:
        if not self._with_events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def median(self) -> float | None:
        """Seconds of the median step since the last answer; None as long as they are too few to be judged."""
        if len(self._own) < FEWEST_STEPS:
            return None
        own = list(self._own)
        self._own.clear()
        if self._with_events:
            return float(statistics.median(began.elapsed_time(ready) for began, ready in own)) / 1000.0
        return float(statistics.median(ready - began for began, ready in own))


class Slow(NamedTuple):
    """A rank that takes longer than the others."""

    rank: int
    ratio: float  # of its time to the median of the others'


def slow_ranks(seconds: Mapping[int, float], groups: Sequence[Sequence[int]], *, ratio: float) -> list[Slow]:
    """The ranks that need more than ratio times as long as the others of their group, which do the same work."""
    found = []
    for group in groups:
        for rank in group:
            others = [seconds[other] for other in group if other != rank]
            median = statistics.median(others) if others else 0.0
            if median > 0 and seconds[rank] > ratio * median:
                found.append(Slow(rank, seconds[rank] / median))
    return found
