"""An index whose digest fits and which says what no run says is taken for a damaged one, wherever it is read."""

import json
import shutil
from pathlib import Path

import pytest

import tests.early  # noqa: F401 - for its effect
from megalith.checkpoint.contents import _KINDS, check_contents
from megalith.checkpoint.index import LAST_LINE_LENGTH, parse
from megalith.checkpoint.shards import DamagedError
from megalith.cli import main
from megalith.train import NOT_SAVED
from tests.checkpoint.runs import signed
from tests.layouts.runs import run_on, write_data

WORDS = "--train-iters 2 --save-interval 1 --eval-iters 0 --lr-warmup-iters 0".split()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of two checkpoints beside its token file."""
    folder = tmp_path_factory.mktemp("kept")
    assert run_on(1, WORDS, folder / "run", write_data(folder)) == 0
    return folder


@pytest.fixture
def run(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept / "run", tmp_path / "run"))


def index_file(run: Path) -> Path:
    return run / "checkpoints" / "step-0000002" / "index.json"


def forge(run: Path, name: str, value: object) -> None:
    """Put another value at a dotted name of the newest index; ... takes it away."""
    fields = json.loads(index_file(run).read_bytes())
    del fields["sha256"]
    *parts, last = name.split(".")
    place = fields
    for part in parts:
        place = place[part]
    assert last in place
    place[last] = value
    if value is ...:
        del place[last]
    index_file(run).write_bytes(signed(fields))


def test_a_run_writes_what_is_expected_and_the_forgery_is_otherwise_sound(run: Path) -> None:
    before = parse(index_file(run), index_file(run).read_bytes())
    check_contents(before)
    forge(run, "state.step", 2)
    assert parse(index_file(run), index_file(run).read_bytes()) == before
    assert len(index_file(run).read_bytes()) > LAST_LINE_LENGTH


FITTING = [
    *(("state.loss_scale", {"a": "b"}), ("state.schedule", {"a": "b"}), ("notes.megalith", "made up")),
    *((f"notes.interval.{name}", -1.5) for name in ("seconds", "step_seconds", "model_flops")),
]  # of the right kind by chance


@pytest.mark.parametrize("value", [..., "made up", [[]], {"a": "b"}, True, -1.5], ids=str)
@pytest.mark.parametrize("name", _KINDS)
def test_every_entry_that_is_missing_or_of_another_kind_is_named(name: str, value: object, run: Path) -> None:
    forge(run, name, value)
    index = parse(index_file(run), index_file(run).read_bytes())
    if (name, value) in FITTING:
        check_contents(index)
        return
    with pytest.raises(DamagedError, match=rf"no checkpoint of a run: .*\b{name}\b"):
        check_contents(index)


@pytest.mark.parametrize("name", ["state.step", "state.model", "notes.interval.sums", "notes.ledger.spent"])
def test_the_checkpoint_before_is_used_and_it_is_said(
    name: str, run: Path, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forge(run, name, "made up")
    assert main(["verify", str(run)]) == 1
    assert f"no checkpoint of a run: {name}" in capsys.readouterr().out
    assert main(["evaluate", str(run)]) == 0
    said = capsys.readouterr()
    assert name in said.err and "step 1 is used instead" in said.err
    # The bytes verify, so that a run does not write over it by itself: where it says nothing else of the run it stays.
    if not name.startswith("state"):
        assert run_on(1, [*WORDS, "--train-iters", "3", "--override-lr-scheduler"], run, kept / "bytes_document") == 0
        assert "going on from step 1 instead" in (run / "log.jsonl").read_text()
        return
    assert run_on(1, WORDS, run, kept / "bytes_document") == NOT_SAVED
    assert "going on from step 1 instead" in (run / "log.jsonl").read_text()
    index_file(run).parent.rename(tmp_path / "moved away")
    assert run_on(1, WORDS, run, kept / "bytes_document") == 0
    assert main(["verify", str(run)]) == 0
