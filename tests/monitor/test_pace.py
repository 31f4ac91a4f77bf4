"""Which rank is slow: by its own work, among those that do the same, and not for jitter."""

import random
import statistics
import time

import torch

from megalith.monitor.pace import FEWEST_STEPS, Pace, slow_ranks
from megalith.monitor.timers import Timers


def test_a_rank_that_takes_twice_as_long_is_named_with_its_ratio() -> None:
    ((rank, ratio),) = slow_ranks({0: 1.0, 1: 1.1, 2: 2.1, 3: 0.9}, [range(4)], ratio=1.5)
    assert (rank, ratio) == (2, 2.1)


def test_ranks_are_compared_with_those_of_their_stage() -> None:
    seconds = {0: 1.0, 1: 1.0, 2: 3.0, 3: 3.0}
    assert slow_ranks(seconds, [range(2), range(2, 4)], ratio=1.5) == []
    assert [slow.rank for slow in slow_ranks(seconds, [range(4)], ratio=1.5)] == [2, 3]
    assert slow_ranks(seconds, [[0], [1], [2], [3]], ratio=1.5) == []


def test_jitter_of_a_fifth_raises_no_alarm() -> None:
    numbers = random.Random(0)
    for num_ranks in (2, 3, 8, 64):
        for _ in range(500):
            seconds = {
                rank: statistics.median(numbers.uniform(0.8, 1.2) for _ in range(FEWEST_STEPS))
                for rank in range(num_ranks)
            }
            assert slow_ranks(seconds, [range(num_ranks)], ratio=1.5) == []
    # Ranks that are always faster or slower by that much.
    constant = {rank: numbers.uniform(0.8, 1.2) for rank in range(64)}
    assert slow_ranks(constant, [range(64)], ratio=1.5) == []


def test_the_median_of_a_ranks_own_work_forgives_single_steps() -> None:
    pace, timers = Pace(torch.device("cpu"), is_measured=True), Timers()
    for step in range(FEWEST_STEPS):
        assert pace.median() is None
        pace.begin()
        with pace.own():
            time.sleep(0.1 if step == 3 else 0.002)
        with pace.around(timers)("forward-compute"):
            time.sleep(0.002)
        time.sleep(0.1)  # what it waits for the others counts for nobody
    assert timers.elapsed(["forward-compute"])["forward-compute"] >= 0.002 * FEWEST_STEPS
    median = pace.median()
    assert median is not None and 0.004 <= median < 0.1
    assert pace.median() is None


def test_a_single_rank_measures_nothing() -> None:
    pace = Pace(torch.device("cpu"), is_measured=False)
    for _ in range(FEWEST_STEPS):
        pace.begin()
        with pace.own():
            pass
    assert pace.median() is None
