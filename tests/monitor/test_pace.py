"""Which rank is slow: by its own work, among those that do the same, and not for jitter."""

import random
import statistics
import time

import torch

from megalith.monitor.pace import FEWEST_STEPS, MOST_SAVES, SHORTEST_SAVE, Pace, SavePace, slow_ranks
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


def test_a_save_that_takes_several_times_as_long_as_the_median_of_those_before_is_told() -> None:
    pace = SavePace(3.0)
    assert [pace.judge(seconds, 1000) for seconds in (10.0, 12.0, 11.0)] == [None] * 3
    assert pace.judge(33.0, 1000) is None  # three times as long is not more than that
    slow = pace.judge(40.25, 1000)
    assert slow is not None and (slow.ratio, slow.usual, slow.num_before) == (3.5, 11.5, 4)
    assert pace.judge(12.0, 1000) is None


def test_a_first_save_that_was_slow_and_one_of_another_size_count_for_nothing() -> None:
    pace = SavePace(3.0)
    for seconds, num_bytes in ((300.0, 1000), (10.0, 1000), (1.0, 100), (1.0, 100), (11.0, 1100)):
        assert pace.judge(seconds, num_bytes) is None
    assert pace.judge(20.0, 100) is None  # two of this size are too few
    slow = pace.judge(50.0, 1000)
    assert slow is not None and (slow.usual, slow.num_before) == (11.0, 3)
    assert SavePace(3.0).judge(1e9, 1) is None


def test_short_saves_say_nothing_and_neither_does_a_ratio_of_0() -> None:
    short, off = SavePace(3.0), SavePace(0.0)
    for seconds in (0.01, 0.01, 0.01, 0.01, SHORTEST_SAVE - 0.01):
        assert short.judge(seconds, 1000) is None
        assert off.judge(1000 * seconds, 1000) is None
    assert short.judge(SHORTEST_SAVE, 1000) is not None


def test_jitter_of_a_fifth_makes_no_save_slow_and_what_stays_slow_is_told_until_it_is_no_news() -> None:
    numbers = random.Random(0)
    for usual in (6.0, 60.0, 600.0):
        pace = SavePace(1.6)  # half of the usual ratio: 1.2 / 0.8 is 1.5
        assert all(pace.judge(usual * numbers.uniform(0.8, 1.2), 1000) is None for _ in range(2000))
        pace = SavePace(3.0)
        for _ in range(MOST_SAVES):
            pace.judge(usual * numbers.uniform(0.8, 1.2), 1000)
        told = [pace.judge(10 * usual * numbers.uniform(0.8, 1.2), 1000) is not None for _ in range(2 * MOST_SAVES)]
        assert told == [True] * (MOST_SAVES // 2) + [False] * (len(told) - MOST_SAVES // 2)
