"""A signal in an evaluation: it is cut short, the run ends at once, and what it still owes is made when it goes on."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalith import evaluations
from megalith.checkpoint.directory import list_checkpoints
from megalith.checkpoint.index import INDEX_NAME
from megalith.monitor.ledger import FILE_NAME
from megalith.monitor.signals import STOPPED_BY_SIGNAL
from megalith.passes import run_microbatches
from tests.layouts.runs import events_of, run_on
from tests.test_train import assert_same

# Evaluations after steps 3, 6 and 9, one at the end, and one of the test data: five times four batches.
BATCHES = 4
WORDS = f"--train-iters 9 --eval-interval 3 --eval-iters {BATCHES} --split 60,20,20 --save-interval 3".split()
# The last checkpoint is written before the evaluations at the end, or between them.
ENDS = {"saved before": WORDS, "saved between": [*WORDS[:-1], "4"]}


def told(save: Path) -> list[tuple[Any, ...]]:
    """Every evaluation that was told, in order."""
    return [(e["step"], e["split"], e["final"], json.dumps(e["losses"])) for e in events_of(save, "evaluated")]


def evaluated(save: Path) -> list[tuple[Any, ...]]:
    """Every evaluation in order; one that was made again, with the same result, counts once."""
    return list(dict.fromkeys(told(save)))


def signal_at(batch: int, *, rank: int = 0) -> Callable[[int], None]:
    """Called on each rank: the given one will send itself SIGTERM before it computes that batch of all evaluations."""

    def before(own: int) -> None:
        compute, count = run_microbatches, 0

        def computing(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if own == rank and count == batch:
                os.kill(os.getpid(), signal.SIGTERM)
            return compute(*arguments, **named)

        vars(evaluations)["run_microbatches"] = computing

    return before


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Path]:
    """The run directory that nothing disturbs, by the end of the run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name, words in ENDS.items():
        assert run_on(1, words, folder / name, data) == 0
        assert [entry[:3] for entry in told(folder / name)] == [
            (3, "validation", False),
            (6, "validation", False),
            (9, "validation", False),
            (9, "validation", True),
            (9, "test", True),
        ]
    return {name: folder / name for name in ENDS}


@pytest.mark.parametrize(
    ("end", "evaluation"),
    [*(("saved before", number) for number in range(5)), ("saved between", 3), ("saved between", 4)],
)
def test_what_a_signal_cuts_short_is_made_when_the_run_goes_on(
    end: str, evaluation: int, undisturbed: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    words, save = ENDS[end], tmp_path / "run"
    assert run_on(1, words, save, data, before=signal_at(evaluation * BATCHES + 2)) == STOPPED_BY_SIGNAL
    assert len(evaluated(save)) == evaluation, "the evaluation in which the signal came was not cut short"
    assert run_on(1, words, save, data) == 0
    assert evaluated(save) == evaluated(undisturbed[end])
    assert_same(save, undisturbed[end])
    # Nothing is owed now.
    assert run_on(1, words, save, data) == 0
    assert evaluated(save) == evaluated(undisturbed[end])
    assert "the run is finished" in (save / "log.jsonl").read_text().splitlines()[-1]


def test_a_signal_to_one_rank_cuts_the_evaluation_of_all_short(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_on(2, WORDS, tmp_path / "whole", data) == 0
    save = tmp_path / "run"
    assert run_on(2, WORDS, save, data, before=signal_at(BATCHES + 2, rank=1)) == STOPPED_BY_SIGNAL
    assert not capfd.readouterr().err, "rank 0 speaks for all, and got no signal"
    assert len(evaluated(save)) == 1
    assert run_on(2, WORDS, save, data, before=signal_at(BATCHES + 2)) == STOPPED_BY_SIGNAL
    assert "cuts this evaluation short, saves and ends" in capfd.readouterr().err
    assert run_on(2, WORDS, save, data) == 0
    assert evaluated(save) == evaluated(tmp_path / "whole")
    assert_same(save, tmp_path / "whole")


def test_a_signal_in_an_evaluation_that_is_made_up_for_stops_it_again(
    undisturbed: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    save = tmp_path / "run"
    for batch in (2, 1, 3):
        assert run_on(1, WORDS, save, data, before=signal_at(batch)) == STOPPED_BY_SIGNAL
        assert not told(save)
    assert run_on(1, WORDS, save, data) == 0
    assert evaluated(save) == evaluated(undisturbed["saved before"])
    assert_same(save, undisturbed["saved before"])


def test_a_finished_run_whose_ledger_is_gone_evaluates_once_more_and_says_the_same(data: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    assert run_on(1, WORDS, save, data) == 0
    (save / FILE_NAME).unlink()
    before = told(save)
    assert run_on(1, WORDS, save, data) == 0
    assert told(save) == before + before[-2:]


def test_a_run_that_is_made_longer_owes_nothing_at_its_former_end(data: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    assert run_on(1, WORDS, save, data) == 0
    before = len(told(save))
    assert run_on(1, [*WORDS, "--train-iters", "12", "--override-lr-scheduler"], save, data) == 0
    assert [entry[:3] for entry in told(save)[before:]] == [
        (12, "validation", False),
        (12, "validation", True),
        (12, "test", True),
    ]


def test_evaluations_of_a_run_that_is_made_longer_are_not_booked_as_redone(data: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    assert run_on(1, WORDS, save, data) == 0
    spent = [json.loads((save / FILE_NAME).read_text())["spent"]]
    assert run_on(1, [*WORDS, "--train-iters", "12", "--override-lr-scheduler"], save, data) == 0
    spent.append(json.loads((save / FILE_NAME).read_text())["spent"])
    assert spent[1]["redone"] == 0
    assert spent[1]["evaluation"] > spent[0]["evaluation"] > 0


def test_what_a_finished_run_did_is_redone_where_its_last_checkpoint_is_damaged(data: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    assert run_on(1, WORDS, save, data) == 0
    newest = list_checkpoints(save)[-1]
    assert newest.step == 9
    (newest.path / INDEX_NAME).write_text("{}")
    assert run_on(1, [*WORDS, "--train-iters", "12", "--override-lr-scheduler"], save, data) == 0
    assert json.loads((save / FILE_NAME).read_text())["spent"]["redone"] > 0


def test_a_run_that_was_stopped_before_its_first_checkpoint_names_no_command_that_needs_one(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The signal comes in the evaluation before the first step, which it cuts short."""
    save = tmp_path / "a run"
    words = ["--train-iters", "20", "--eval-first", "--eval-iters", "2", "--split", "60,20,20"]
    assert run_on(1, words, save, data, before=signal_at(1)) == STOPPED_BY_SIGNAL
    assert "SIGTERM: the run cuts this evaluation short and ends; a second signal" in capfd.readouterr().err
    told = [line["text"] for line in events_of(save, "line")]
    assert f"the run lies in {save}; it has no checkpoint yet" in told
    assert "  begin:    the same command again" in told and not any("megalith " in text for text in told)
    assert run_on(1, [*words, "--exit-interval", "2"], save, data) == 0
    told = [line["text"] for line in events_of(save, "line")]
    assert f"  measure:  megalith evaluate '{save}'" in told and "  go on:    the same command again" in told
