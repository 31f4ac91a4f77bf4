"""A disk that becomes slow is told once a save has taken several times as long as usual; by a clock that is turned."""

import threading
import time
import types
from functools import partial
from pathlib import Path

import pytest

import megalith.checkpoint.saver
import megalith.keeper
from megalith.checkpoint.saver import AsyncSaver, Saved
from tests.disturbed import start_run
from tests.faults.disk import Disturbance, Moment, Operation, Wire
from tests.layouts.runs import events_of
from tests.test_disk_faults import each_step
from tests.test_train import assert_same

STEPS = 14
USUAL, SLOW = 0.25, 1.5  # seconds of an operation of a save, of which there are some thirty


start = partial(start_run, num_steps=STEPS)


def slow_from(first: int, last: int, *, usual: float, slow: float) -> Disturbance:
    """Each operation of a save takes so long by the clock, those of saves begun after steps first to last longer."""

    def on_rank(rank: int) -> None:
        ahead, each = 0.0, usual
        waited_for, wait = threading.Event(), AsyncSaver.wait

        def waiting(saver: AsyncSaver) -> list[Saved]:
            waited_for.set()
            try:
                return wait(saver)
            finally:
                waited_for.clear()

        def act(moment: Moment, operation: Operation) -> None:
            nonlocal ahead
            if moment == "before" and operation.lane == "save":
                if each == slow:  # else a save may be over before the training comes to wait for it
                    assert waited_for.wait(60)
                ahead += each

        def set_pace(step: int) -> None:
            nonlocal each
            each = slow if first < step <= last + 1 else usual

        fake = types.SimpleNamespace(monotonic=lambda: time.monotonic() + ahead, perf_counter=time.perf_counter)
        setattr(megalith.checkpoint.saver, "time", fake)  # noqa: B010 - mypy forbids to assign a module's
        setattr(megalith.keeper, "time", fake)  # noqa: B010
        setattr(AsyncSaver, "wait", waiting)  # noqa: B010
        each_step(set_pace)
        Wire(act).install()

    return on_rank


def told_in(folder: Path) -> list[dict[str, object]]:
    return events_of(folder / "run", "save_was_slow")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_slow_save_is_told_with_its_figures_and_changes_nothing(
    world_size: int, data: Path, whole: Path, tmp_path: Path
) -> None:
    # The save of step 10 is waited for before step 11, by each_step, so its pace is set before step 11.
    ended = start(tmp_path, data, disturb=slow_from(9, 10, usual=USUAL, slow=SLOW), world_size=world_size)
    assert ended.statuses == (0,) * world_size and not ended.raised, ended
    saves = {save["step"]: save for save in events_of(tmp_path / "run", "checkpoint_saved")}
    assert list(saves) == [2, 4, 6, 8, 10, 12, 14]
    (told,) = told_in(tmp_path)
    print(told["text"])
    usual = sorted(float(saves[step]["seconds"]) for step in (2, 4, 6, 8))
    usual_median = (usual[1] + usual[2]) / 2
    assert told["step"] == 10 and told["seconds"] == saves[10]["seconds"] and told["stall"] == saves[10]["stall"]
    assert told["ratio"] == pytest.approx(float(saves[10]["seconds"]) / usual_median)
    assert 3.0 < float(str(told["ratio"])) <= SLOW / USUAL + 0.1
    assert told["bytes_per_second"] == pytest.approx(float(str(told["num_bytes"])) / float(saves[10]["seconds"]))
    text = str(told["text"])
    assert f"the checkpoint of step 10 took {saves[10]['seconds']:.1f} s to write (" in text
    assert f"times the {usual_median:.1f} s of the 4 before it (their median); the steps waited " in text
    # each_step waits for the end of each save: some of it is over by then, the rest is what it costs the steps.
    assert SLOW < float(saves[10]["stall"]) <= float(saves[10]["seconds"]) + 1.0
    if world_size == 1:
        assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("usual", "slow", "ratio"),
    [
        (USUAL, 1.2 * USUAL, "1.3"),
        (USUAL / 100, USUAL / 10, "3"),
        pytest.param(USUAL, SLOW, "0", marks=pytest.mark.slow),
        pytest.param(USUAL, SLOW, "8", marks=pytest.mark.slow),
    ],
    ids=["a-fifth", "too-short", "off", "less-than-asked-for"],
)
def test_what_is_no_news_is_not_told(usual: float, slow: float, ratio: str, data: Path, tmp_path: Path) -> None:
    words = ("--slow-save-ratio", ratio)
    assert start(tmp_path, data, *words, disturb=slow_from(9, 12, usual=usual, slow=slow)).statuses == (0,)
    assert told_in(tmp_path) == []


def test_a_ratio_that_tells_nothing_apart_is_refused(data: Path, tmp_path: Path) -> None:
    ended = start(tmp_path, data, "--slow-save-ratio", "0.5")
    assert ended.statuses == (2,) and "slow-save-ratio" in ended.said.replace("_", "-"), ended
    assert "must be above 1, or 0" in ended.said and "3 is usual" in ended.said
