"""Timers measure what runs inside them, in Megatron-LM's order."""

import pytest

from megalith.monitor.timers import STEP_TIMERS, Timers


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_timer_adds_up_until_it_is_reset() -> None:
    clock = Clock()
    timers = Timers(clock=clock)
    for _ in range(3):
        with timers("optimizer"):
            clock.now += 2.0
        clock.now += 100.0
    assert timers.elapsed(["optimizer"], reset=False) == {"optimizer": 6.0}
    assert timers.elapsed(["optimizer"]) == {"optimizer": 6.0}
    assert timers.elapsed(["optimizer"]) == {"optimizer": 0.0}


def test_only_timers_that_were_used_appear_and_in_the_order_of_the_line() -> None:
    timers = Timers()
    for name in ("batch-generator", "forward-compute", "optimizer"):
        with timers(name):
            pass
    assert list(timers.elapsed(STEP_TIMERS)) == ["forward-compute", "optimizer", "batch-generator"]


def test_a_running_timer_can_be_read_and_runs_on() -> None:
    clock = Clock()
    timers = Timers(clock=clock)
    timers("interval-time").start()
    clock.now = 3.0
    assert timers.elapsed(["interval-time"]) == {"interval-time": 3.0}
    clock.now = 5.0
    timers("interval-time").stop()
    assert timers.elapsed(["interval-time"]) == {"interval-time": 2.0}


def test_the_device_is_waited_for_at_both_ends() -> None:
    clock = Clock()
    waits: list[float] = []

    def synchronize() -> None:
        clock.now += 10.0 if waits else 1.0  # work that was still running on the device
        waits.append(clock.now)

    timers = Timers(synchronize, clock=clock)
    with timers("forward-compute"):
        clock.now += 0.5
    assert len(waits) == 2
    assert timers.elapsed(["forward-compute"]) == {"forward-compute": 10.5}


def test_a_timer_stops_when_what_it_measures_fails() -> None:
    timers = Timers()
    with pytest.raises(KeyError), timers("optimizer"):
        raise KeyError
    with timers("optimizer"):
        pass


def test_starting_twice_or_stopping_what_does_not_run_is_a_fault_of_the_program() -> None:
    timer = Timers()("optimizer")
    with pytest.raises(AssertionError, match="does not run"):
        timer.stop()
    timer.start()
    with pytest.raises(AssertionError, match="runs already"):
        timer.start()


def test_the_order_is_that_of_the_reference_log(golden) -> None:  # type: ignore[no-untyped-def]
    log = (golden / "run.log").read_text(encoding="utf-8")
    shown = [line for line in log.splitlines() if line.startswith("time (ms) | forward")]
    assert len(shown) == 24
    for line in shown:
        names = [field.split(":")[0] for field in line.split(" | ")[1:]]
        assert names == [name for name in STEP_TIMERS if name in names]
