"""Spikes: a loss or a gradient norm far above what it was in the last steps.

How far is told by the modified z-score of Iglewicz and Hoaglin (1993, "How to detect and handle outliers"): the
distance to the median over 1.4826 times the median absolute deviation, which is the standard deviation where values are
normal. Up to half of the window may be spikes before they hide each other; with mean and deviation one can. Only finite
values enter, so one NaN cannot make every later value look normal, or none.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

DEVIATIONS = 1.4826  # standard deviations of a normal distribution per median absolute deviation
SMALLEST_SPREAD = 1e-3  # of the median: values that hardly change are no reason to call a small change a spike


class Spike(NamedTuple):
    """A value far above those of the last steps."""

    name: str
    value: float
    median: float
    score: float  # z


class Spikes:
    """The last values of each name, and which new ones are spikes. Only what lies above the median can be one.

    window: values kept of a name; judged by as soon as half of it is there. threshold: the z-score from which a value
    is a spike; 0 finds none and keeps nothing.
    """

    def __init__(self, *, window: int, threshold: float) -> None:
        if window < 2 or not threshold >= 0:
            raise ValueError(f"window={window} must be 2 or more, threshold={threshold} 0 or more")
        self._window, self._threshold = window, threshold
        self._values: dict[str, deque[float]] = {}

    def find(self, values: Mapping[str, float]) -> list[Spike]:
        """Which of a step's values are spikes beside those that were kept before."""
        if not self._threshold:
            return []
        found = []
        for name, value in values.items():
            kept = self._values.get(name, ())
            if 2 * len(kept) >= self._window and math.isfinite(value):
                median, spread = _spread(kept)
                score = (value - median) / spread if spread else math.inf if value > median else 0.0
                if score >= self._threshold:
                    found.append(Spike(name, value, median, score))
        return found

    def keep(self, values: Mapping[str, float]) -> None:
        """Keep a step's values, spikes too, so that a level that stays is soon the new one; in place."""
        if not self._threshold:
            return
        for name, value in values.items():
            if math.isfinite(value):
                self._values.setdefault(name, deque(maxlen=self._window)).append(value)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON: floats come back from it bit for bit."""
        return {name: list(kept) for name, kept in self._values.items()}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on from a state; of a longer window the newest values stay. Raises ValueError if it is none."""
        try:
            values = {str(name): [float(value) for value in kept] for name, kept in state.items()}
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the checkpoint's last losses and norms are {state!r}: {error}") from error
        if not all(math.isfinite(value) for kept in values.values() for value in kept):
            raise ValueError("the checkpoint's last losses and norms must all be finite")
        self._values = {name: deque(kept, maxlen=self._window) for name, kept in values.items() if self._threshold}


def _spread(values: Sequence[float] | deque[float]) -> tuple[float, float]:
    """The median, and the spread around it in terms of a standard deviation."""
    median = statistics.median(values)
    deviation = statistics.median(abs(value - median) for value in values)
    return median, max(DEVIATIONS * deviation, SMALLEST_SPREAD * abs(median))
