"""Which values are spikes: against numpy, with values that are not finite, and over a restart."""

import json
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from megalith.monitor.spikes import Spikes


def series(seed: int = 0, length: int = 400) -> NDArray[np.float64]:
    """A loss that falls with noise, with ten values far above it."""
    random = np.random.RandomState(seed)
    values = 2.0 + 8.0 * np.exp(-np.arange(length) / 100) + 0.1 * random.standard_normal(length)
    values[np.arange(100, length, 30)] *= 4
    return values


def found_in(spikes: Spikes, values: NDArray[np.float64]) -> list[tuple[int, float]]:
    found = []
    for step, value in enumerate(values):
        found += [(step, spike.score) for spike in spikes.find({"lm loss": float(value)})]
        spikes.keep({"lm loss": float(value)})
    return found


def test_scores_are_the_modified_z_scores_of_the_values_before() -> None:
    values, window = series(), 64
    wanted = []
    for step, value in enumerate(values):
        kept = values[max(0, step - window) : step]
        if len(kept) >= window / 2:
            median = np.median(kept)
            spread = max(1.4826 * np.median(np.abs(kept - median)), 1e-3 * abs(median))
            if (value - median) / spread >= 6.0:
                wanted.append((step, (value - median) / spread))
    found = found_in(Spikes(window=window, threshold=6.0), values)
    assert [step for step, _ in found] == [step for step, _ in wanted] == list(range(100, 400, 30))
    assert [score for _, score in found] == pytest.approx([score for _, score in wanted])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_changes_nothing(bad: float) -> None:
    values = series()
    spoiled = np.insert(values, [150, 151, 200], bad)
    found = found_in(Spikes(window=64, threshold=6.0), spoiled)
    undisturbed = found_in(Spikes(window=64, threshold=6.0), values)
    assert [score for _, score in found] == [score for _, score in undisturbed]


def test_a_level_that_stays_is_soon_the_new_one() -> None:
    spikes = Spikes(window=64, threshold=6.0)
    random = np.random.RandomState(1)
    found = found_in(spikes, np.concatenate([1 + random.rand(200), 30 + random.rand(200)]))
    # From the middle of the window on the median is of the new level.
    assert [step for step, _ in found] == list(range(200, 200 + 32))


def test_what_falls_or_hardly_changes_is_no_spike() -> None:
    assert not found_in(Spikes(window=8, threshold=6.0), np.concatenate([np.ones(20), np.zeros(1), np.ones(20)]))
    assert not found_in(Spikes(window=8, threshold=6.0), np.concatenate([np.ones(20), np.full(1, 1.005)]))
    assert not found_in(Spikes(window=8, threshold=6.0), np.zeros(20))


@pytest.mark.parametrize("stopped_at", [1, 90, 100, 101, 250])
def test_a_restart_finds_the_same_scores_bit_for_bit(stopped_at: int) -> None:
    values = series()
    undisturbed = found_in(Spikes(window=64, threshold=6.0), values)
    first, second = Spikes(window=64, threshold=6.0), Spikes(window=64, threshold=6.0)
    found = found_in(first, values[:stopped_at])
    second.restore(json.loads(json.dumps(first.state())))
    found += [(step + stopped_at, score) for step, score in found_in(second, values[stopped_at:])]
    assert found == undisturbed


def test_a_shorter_window_takes_the_newest_values() -> None:
    spikes = Spikes(window=3, threshold=1.0)
    spikes.restore({"lm loss": [1.0, 2.0, 3.0, 4.0]})
    assert spikes.state() == {"lm loss": [2.0, 3.0, 4.0]}


def test_without_a_threshold_nothing_is_kept() -> None:
    spikes = Spikes(window=4, threshold=0.0)
    assert not found_in(spikes, series())
    spikes.restore({"lm loss": [1.0]})
    assert spikes.state() == {}


@pytest.mark.parametrize("state", [{"lm loss": ["x"]}, {"lm loss": [math.nan]}, {"lm loss": 3}, [1]])
def test_another_state_is_refused(state: object) -> None:
    with pytest.raises(ValueError, match="the checkpoint's last losses and norms"):
        Spikes(window=4, threshold=6.0).restore(state)  # type: ignore[arg-type]


def test_a_window_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="window=1 must be 2 or more"):
        Spikes(window=1, threshold=6.0)
