"""The entries of the ledger add up to the time since the run began, also over restarts."""

import json
import time

import pytest

from megalith.monitor.ledger import NANOSECONDS, Ledger


class Clock:
    """Nanoseconds, given seconds."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.nanoseconds = int(seconds * NANOSECONDS)

    def __call__(self) -> int:
        return self.nanoseconds

    def pass_by(self, seconds: float) -> None:
        self.nanoseconds += int(seconds * NANOSECONDS)


def test_time_spent_inside_is_booked_once() -> None:
    clock = Clock()
    ledger = Ledger(clock=clock, calendar=Clock())
    clock.pass_by(3.0)
    ledger.switch("other")
    with ledger.spend("step"):
        clock.pass_by(1.0)
        with ledger.spend("data"):
            clock.pass_by(0.25)
        clock.pass_by(1.0)
    clock.pass_by(0.5)
    assert ledger.seconds() == {
        "startup": 3.0,
        "data": 0.25,
        "step": 2.0,
        "evaluation": 0.0,
        "checkpoint": 0.0,
        "other": 0.5,
        "redone": 0.0,
        "interrupted": 0.0,
    }
    assert ledger.total() == 5.75


def test_a_failure_inside_gives_the_account_back() -> None:
    clock = Clock()
    ledger = Ledger(clock=clock, calendar=Clock())
    with pytest.raises(KeyError), ledger.spend("checkpoint"):
        raise KeyError
    clock.pass_by(1.0)
    assert ledger.seconds()["startup"] == 1.0


def test_an_unknown_account_is_refused() -> None:
    with pytest.raises(ValueError, match="account = 'lunch' is unknown: use one of startup, data"):
        Ledger().switch("lunch")


def elsewhere() -> tuple[str, int]:
    """A machine that does not say when it was started, so that the calendar is asked."""
    return "", 0


def test_a_restart_books_the_time_since_the_checkpoint_as_interrupted() -> None:
    clock, calendar = Clock(), Clock(1000.0)
    first = Ledger(clock=clock, calendar=calendar, boot=elsewhere)
    for passing in (clock, calendar):
        passing.pass_by(40.0)
    state = json.loads(json.dumps(first.state()))
    # Twenty seconds of steps are lost with the process, which is started again two minutes later; reading takes three.
    calendar.pass_by(140.0)
    clock = Clock(7.0)
    second = Ledger(clock=clock, calendar=calendar, boot=elsewhere)
    clock.pass_by(3.0)
    second.restore(state)
    assert second.seconds()["startup"] == 43.0
    assert second.seconds()["interrupted"] == 140.0
    assert second.total() == 183.0


def test_on_the_same_boot_the_calendar_plays_no_part() -> None:
    first = Ledger(clock=Clock(), calendar=Clock(1000.0), boot=lambda: ("a boot", 50 * NANOSECONDS))
    state = json.loads(json.dumps(first.state()))
    second = Ledger(clock=Clock(), calendar=Clock(9e8), boot=lambda: ("a boot", 62 * NANOSECONDS))
    second.restore(state)
    assert second.seconds()["interrupted"] == 12.0


def test_a_calendar_that_was_set_back_books_nothing() -> None:
    ledger = Ledger(clock=Clock(), calendar=Clock(50.0))
    ledger.restore({"spent": {"step": 5 * NANOSECONDS, "unknown": NANOSECONDS}, "saved": 60 * NANOSECONDS})
    assert ledger.seconds()["interrupted"] == 0.0
    assert ledger.seconds()["step"] == 5.0 and ledger.seconds()["other"] == 1.0


def test_the_real_clock_loses_no_nanosecond() -> None:
    readings: list[int] = []

    def clock() -> int:
        readings.append(time.perf_counter_ns())
        return readings[-1]

    ledger = Ledger(clock=clock)
    for account in ("data", "step", "checkpoint", "step", "other"):
        with ledger.spend(account):
            pass
    spent = ledger.state()["spent"]
    assert sum(spent.values()) == readings[-1] - readings[0]
    assert spent["step"] > 0 and spent["evaluation"] == 0
