"""The calendar may jump by years in the middle of a run, and files may bear any date: nothing comes of it."""

import json
import os
import shutil
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import megalith.train
from megalith.checkpoint.directory import list_checkpoints
from megalith.monitor.ledger import Ledger
from megalith.monitor.log import RunLog
from megalith.owner import Lease, OwnedError
from tests.disturbed import start_run
from tests.faults.disk import Disturbance, Moment, Operation, Wire
from tests.layouts.runs import events_of, steps_of
from tests.monitor.test_watch import at_step
from tests.test_train import assert_same

DAY = 86_400.0
STEPS = 8


start = partial(start_run, num_steps=STEPS)


def defaults_of(made: type) -> dict[str, Any]:
    """What is taken where the maker of an object says nothing; may be changed."""
    defaults: dict[str, Any] = vars(made)["__init__"].__kwdefaults__
    return defaults


class Calendar:
    """Takes the place of this process's calendar: `time.time`, `time.time_ns`, and wherever they are a default."""

    def __init__(self) -> None:
        self.offset = 0.0  # seconds that it is ahead
        real, real_ns = time.time, time.time_ns
        shims: dict[Any, Any] = {
            real: lambda: real() + self.offset,
            real_ns: lambda: real_ns() + int(self.offset * 1e9),
        }
        time.time, time.time_ns = shims[real], shims[real_ns]
        for defaults in (defaults_of(RunLog), defaults_of(Ledger)):
            found = [name for name, value in defaults.items() if value in shims]
            assert found, "it does not ask the calendar any more"
            defaults.update({name: shims[defaults[name]] for name in found})


def jumping(*offsets: float, in_saves: bool = True) -> Disturbance:
    """Sets the calendar at each step, and at each operation of a save, in turns."""

    def on_rank(rank: int) -> None:
        calendar = Calendar()
        count = 0

        def jump() -> None:
            nonlocal count
            calendar.offset = offsets[count % len(offsets)]
            count += 1

        def act(moment: Moment, operation: Operation) -> None:
            if operation.lane == "save":
                jump()

        for step in range(1, STEPS + 1):
            at_step(jump, step=step)
        if in_saves:
            Wire(act).install()

    return on_rank


def quick_heart(disturb: Disturbance) -> Disturbance:
    """The lease beats often enough for a short run to see it."""

    def on_rank(rank: int) -> None:
        defaults_of(Lease).update(between_beats=0.05, without_beat=2.0)
        disturb(rank)

    return on_rank


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_calendar_that_jumps_by_days_and_years_changes_nothing(
    world_size: int, data: Path, whole: Path, tmp_path: Path
) -> None:
    words = ("--exit-duration-in-mins", "30", "--hang-timeout", "60", "--keep-last", "2")
    jumps = jumping(400 * DAY, -DAY, 0.0, DAY, -20_000 * DAY, 0.7, 30_000 * DAY)
    began = time.monotonic()
    ended = start(tmp_path, data, *words, "--exit-interval", "5", disturb=quick_heart(jumps), world_size=world_size)
    assert ended.statuses == (0,) * world_size and not ended.said, ended
    ended = start(tmp_path, data, *words, disturb=quick_heart(jumps), world_size=world_size)
    assert ended.statuses == (0,) * world_size and not ended.said, ended
    seconds = time.monotonic() - began
    if world_size == 1:
        assert_same(tmp_path / "run", whole)
    assert [found.step for found in list_checkpoints(tmp_path / "run")] == [6, 8]
    assert not (tmp_path / "run" / "lease.json").exists()
    # All the time of both starts is booked, and no day; the rank has lived longer than this test, being its fork.
    spent = json.loads((tmp_path / "run" / "ledger.json").read_text())["spent"]
    assert all(0 <= nanoseconds < 3600e9 for nanoseconds in spent.values()), spent
    minutes = [event["minutes"] for event in events_of(tmp_path / "run", "run_ended")]
    assert len(minutes) == 2 and 0 < sum(minutes) * 60 <= seconds
    saves = events_of(tmp_path / "run", "checkpoint_saved")
    assert len(saves) == 5 and all(0 <= save["seconds"] <= seconds for save in saves)
    assert all(0 < step["seconds"] <= seconds for step in steps_of(tmp_path / "run"))
    times = [step["time"] for step in steps_of(tmp_path / "run")]
    assert max(times) - min(times) > 300 * DAY, "the calendar did not jump"


def test_the_ledger_of_two_starts_is_the_time_that_they_took(data: Path, tmp_path: Path) -> None:
    """Where the program is this test's fork its age is that of the test: it is left out by asking within the run."""
    at = tmp_path / "at"

    def noting(jump: float) -> Disturbance:
        def on_rank(rank: int) -> None:
            jumping(jump, -jump)(rank)
            restore = Ledger.restore

            def restoring(ledger: Ledger, *states: Any) -> None:
                at.write_text(f"{at.read_text() if at.exists() else ''}{time.monotonic()} {ledger.total()}\n")
                restore(ledger, *states)

            setattr(Ledger, "restore", restoring)  # noqa: B010 - mypy forbids to assign a method

        return on_rank

    def total() -> float:
        spent: dict[str, int] = json.loads((tmp_path / "run" / "ledger.json").read_text())["spent"]
        return sum(spent.values()) / 1e9

    assert start(tmp_path, data, "--exit-interval", "4", disturb=noting(DAY)).statuses == (0,)
    first, middle = total(), time.monotonic()
    assert start(tmp_path, data, disturb=noting(400 * DAY)).statuses == (0,)
    (began, age), (went_on, second_age) = (map(float, line.split()) for line in at.read_text().splitlines())
    # From where each start was when it took the ledger over to where this test looked, just after its end.
    assert 0 <= (middle - began) - (first - age) < 2.0
    assert 0 <= (time.monotonic() - went_on) - (total() - first - second_age) < 2.0


def test_another_job_is_refused_while_the_calendar_jumps(data: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"

    def knock() -> None:
        try:
            Lease(tmp_path / "run").take(lambda text: None)
        except OwnedError as error:
            said.write_text(str(error))

    def disturb(rank: int) -> None:
        jumping(-2 * DAY, 9_000 * DAY)(rank)
        at_step(knock, step=4)

    ended = start(tmp_path, data, disturb=quick_heart(disturb))
    assert ended.statuses == (0,), ended
    assert "another job writes there, process " in said.read_text() and ", for 0 s." in _rounded(said.read_text())


def _rounded(text: str) -> str:
    """Few seconds are as good as none."""
    for seconds in range(60):
        text = text.replace(f", for {seconds} s.", ", for 0 s.")
    return text


class FakeTime(types.SimpleNamespace):
    """What train.py asks of the module: its monotonic clock may be set."""

    def __init__(self) -> None:
        super().__init__(ahead=0.0, time=time.time, perf_counter=time.perf_counter)

    def monotonic(self) -> float:
        return time.monotonic() + float(self.ahead)


@pytest.mark.parametrize("world_size", [1, 2])
def test_wall_time_limit_stops_after_saving_and_counts_anew_at_each_start(
    world_size: int, data: Path, whole: Path, tmp_path: Path
) -> None:
    """Megalith's clock is the monotonic one; only one rank's is past the hour, and all stop in that step."""

    def hour(step: int) -> Callable[[int], None]:
        def on_rank(rank: int) -> None:
            fake = FakeTime()
            setattr(megalith.train, "time", fake)  # noqa: B010
            if rank == world_size - 1:
                at_step(lambda: fake.__dict__.update(ahead=61.0), step=step)

        return on_rank

    for step in (3, 4):  # one more in the second start, whose hour is its own
        ended = start(tmp_path, data, "--exit-duration-in-mins", "1", disturb=hour(step), world_size=world_size)
        assert ended.statuses == (0,) * world_size, ended
        assert steps_of(tmp_path / "run")[-1]["step"] == step
        assert list_checkpoints(tmp_path / "run")[-1].step == step
        assert events_of(tmp_path / "run", "run_ended")[-1]["reason"] == "exit-duration"
    ended = start(tmp_path, data, "--exit-duration-in-mins", "1", world_size=world_size)
    assert ended.statuses == (0,) * world_size, ended
    if world_size == 1:
        assert_same(tmp_path / "run", whole)


OLD, FAR = 0.0, 4_102_444_800.0  # 1970 and 2100


@pytest.mark.parametrize("newest", [OLD, pytest.param(FAR, marks=pytest.mark.slow)], ids=["of-1970", "of-2100"])
def test_no_date_of_a_file_means_anything(newest: float, data: Path, whole: Path, tmp_path: Path) -> None:
    prefix = tmp_path / data.name
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{data}{suffix}", f"{prefix}{suffix}")
    assert start(tmp_path, prefix, "--exit-interval", "6").statuses == (0,)
    steps = [found.step for found in list_checkpoints(tmp_path / "run")]
    assert steps == [2, 4, 6]
    for path in [tmp_path, *tmp_path.rglob("*")]:
        in_newest = "step-0000006" in str(path)
        date = newest if in_newest else OLD + FAR - newest
        os.utime(path, (date, date), follow_symlinks=False)
    ended = start(tmp_path, prefix, "--keep-last", "2", "--exit-duration-in-mins", "30")
    assert ended.statuses == (0,) and not ended.said, ended
    assert [step["step"] for step in steps_of(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert [found.step for found in list_checkpoints(tmp_path / "run")] == [6, 8]
    assert_same(tmp_path / "run", whole)
    assert not any("rebuilt" in event["text"] for event in events_of(tmp_path / "run", "line"))
