"""The entries of the ledger add up to the time since the run began, also over restarts."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megalith.files import Disk
from megalith.monitor.ledger import LARGEST_FILE, NANOSECONDS, Ledger, LedgerFile
from tests.layouts.runs import MODEL, events_of, write_data


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
        "check": 0.0,
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


def spent(**seconds: float) -> dict[str, int]:
    return {account: int(number * NANOSECONDS) for account, number in seconds.items()}


def test_what_was_done_after_the_checkpoint_is_redone_and_nothing_is_lost_of_the_total() -> None:
    booted = {"machine": "a boot", "saved": 0}
    checkpoint = {"spent": spent(startup=2, data=1, step=30, checkpoint=1), "booted": 40 * NANOSECONDS, **booted}
    last = {
        "spent": spent(startup=2, data=2, step=45, evaluation=3, checkpoint=4),
        "booted": 70 * NANOSECONDS,
        **booted,
    }
    ledger = Ledger(clock=Clock(), calendar=Clock(), boot=lambda: ("a boot", 80 * NANOSECONDS), age=1.5)
    ledger.restore(checkpoint, last)
    seconds = ledger.seconds()
    # Steps, reading and evaluations are done again; starting up and saving have had their use.
    assert (seconds["step"], seconds["data"], seconds["evaluation"]) == (30, 1, 0)
    assert (seconds["redone"], seconds["startup"], seconds["checkpoint"]) == (15 + 1 + 3, 2 + 1.5, 4)
    # From when the file was written until this process began, a second and a half before the ledger.
    assert seconds["interrupted"] == 8.5
    assert ledger.total() == 56 + 10


def test_a_ledger_file_that_is_older_than_the_checkpoint_is_not_believed() -> None:
    old = {"spent": spent(step=3), "booted": 5 * NANOSECONDS, "machine": "a boot", "saved": 0}
    new = {"spent": spent(step=30), "booted": 50 * NANOSECONDS, "machine": "a boot", "saved": 0}
    ledger = Ledger(clock=Clock(), calendar=Clock(), boot=lambda: ("a boot", 60 * NANOSECONDS))
    ledger.restore(new, old)
    assert ledger.seconds()["step"] == 30 and ledger.seconds()["redone"] == 0
    assert ledger.seconds()["interrupted"] == 10


def test_a_run_that_ended_was_not_interrupted() -> None:
    first = Ledger(clock=Clock(), calendar=Clock(), boot=lambda: ("a boot", 0))
    state = json.loads(json.dumps(first.state(ended=True)))
    second = Ledger(clock=Clock(), calendar=Clock(), boot=lambda: ("a boot", 600 * NANOSECONDS))
    second.restore(state, state)
    assert second.total() == 0


def test_going_back_within_a_run_books_what_is_done_again_as_redone() -> None:
    clock = Clock()
    ledger = Ledger(clock=clock, calendar=Clock())

    def work(steps: float, saving: float) -> None:
        with ledger.spend("step"):
            clock.pass_by(steps)
        with ledger.spend("checkpoint"):
            clock.pass_by(saving)

    work(10, 1)
    state = json.loads(json.dumps(ledger.state()))
    for redone in (5, 12):
        work(5 if redone == 5 else 7, 2)
        ledger.go_back(state)
        assert ledger.seconds()["step"] == 10 and ledger.seconds()["redone"] == redone
    assert ledger.seconds()["checkpoint"] == 5 and ledger.total() == 27


def test_the_line_at_the_end_names_the_parts_and_the_share_of_steps() -> None:
    ledger = Ledger(clock=Clock(), calendar=Clock())
    ledger.restore({"spent": spent(startup=10, step=80, redone=6, checkpoint=4), "ended": True})
    assert ledger.told() == (
        "wall time 100.0 s: start-up 10.0, steps 80.0, checkpoints 4.0, redone 6.0; effective training time 80.0 %"
    )


def test_the_file_is_read_back_and_anything_else_is_none(tmp_path: Path) -> None:
    ledger, file = Ledger(), LedgerFile(tmp_path)
    assert file.read() is None
    file.write(ledger, ended=True)
    read = file.read()
    assert read is not None and read["ended"] and set(read["spent"]) == set(ledger.seconds())
    texts = ["", "{", "[]", "7", '{"spent": 3}', '{"spent": {}, "saved": "x", "booted": 0}', " " * LARGEST_FILE]
    for text in [*texts, "[" * 10_000, '{"spent": {"step": Infinity}}']:
        file.path.write_text(text)
        assert file.read() is None, text
    file.path.unlink()
    os.mkfifo(file.path)
    assert file.read() is None


def test_a_disk_that_fails_does_not_stop_the_run(tmp_path: Path) -> None:
    class Full(Disk):
        def write(self, descriptor: int, data: memoryview) -> int:
            raise OSError(28, "No space left on device")

    LedgerFile(tmp_path, disk=Full()).write(Ledger())
    assert LedgerFile(tmp_path).read() is None


def test_the_file_is_written_at_once_and_then_every_five_seconds(tmp_path: Path) -> None:
    now = [100.0]
    file = LedgerFile(tmp_path, clock=lambda: now[0])
    written = []
    for second in range(12):
        now[0] = 100.0 + second
        file.path.unlink(missing_ok=True)
        file.write_if_due(Ledger())
        written += [second] if file.path.exists() else []
    assert written == [0, 5, 10]


def test_two_starts_of_a_killed_run_add_up_to_the_wall_time(tmp_path: Path) -> None:
    save, data = tmp_path / "run", write_data(tmp_path)
    words = [*MODEL, "--data-path", str(data), "--save", str(save), "--train-iters", "30", "--save-interval", "4"]
    command = [sys.executable, "-m", "megalith", "pretrain", *words]
    began = time.time()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            record: dict[str, Any] = json.loads(line)
            if record["event"] == "step_done" and record["step"] >= 14:
                process.kill()
                break
    time.sleep(1.0)
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    (ended,) = events_of(save, "run_ended")
    assert sum(ended["spent"].values()) == pytest.approx(ended["time"] - began, rel=0.01)
    assert ended["spent"]["interrupted"] > 1.0
    assert all(ended["spent"][account] > 0 for account in ("startup", "data", "step", "checkpoint"))
