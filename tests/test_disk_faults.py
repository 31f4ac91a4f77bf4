"""A disk that is full, read-only, missing, slow or failing under a whole run: told, survived, nothing half-written."""

import errno
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import megalith.train
from megalith.checkpoint.directory import list_checkpoints
from megalith.checkpoint.verify import verify
from megalith.files import Disk
from megalith.job import Job
from megalith.keeper import Keeper
from megalith.monitor.events import StepDone
from tests.disturbed import INTERVAL, start_run
from tests.faults.disk import Moment, Operation, Wire
from tests.layouts.runs import steps_of
from tests.records import read_records
from tests.test_train import assert_same

STEPS = 10


start = partial(start_run, num_steps=STEPS)


def each_step(act: Callable[[int], None]) -> None:
    """From now on, call a function with the number of each step as it begins, its last save being done."""
    take_step = megalith.train.take_step

    def acting(job: Job, keeper: Keeper) -> StepDone:
        keeper.settle()
        act(job.progress.step + 1)
        return take_step(job, keeper)

    megalith.train.take_step = acting


def warned(folder: Path) -> list[str]:
    records = read_records(folder / "run" / "log.jsonl")[0]
    return [str(record["text"]) for record in records if record["event"] == "warned"]


def saved_steps(folder: Path) -> list[int]:
    """The checkpoints, each verified; nothing half-written may lie beside them."""
    assert [path.name for path in (folder / "run" / "checkpoints").iterdir() if path.name.startswith(".")] == []
    return [verify(found.path).step for found in list_checkpoints(folder / "run")]


class Broken:
    """Lets the operations of saves fail from one step to another."""

    def __init__(self, code: int, names: Sequence[str], *, since: int, until: int) -> None:
        self._code, self._names, self._since, self._until = code, names, since, until
        self._step = 0

    def __call__(self, rank: int) -> None:
        each_step(lambda step: setattr(self, "_step", step))
        Wire(self._act).install()

    def _act(self, moment: Moment, operation: Operation) -> None:
        fails = self._since <= self._step <= self._until and operation.name in self._names
        if fails and moment == "before" and operation.lane == "save":
            raise OSError(self._code, os.strerror(self._code), operation.path)


@pytest.mark.parametrize(
    ("code", "names"),
    [
        (errno.ENOSPC, ["write"]),
        (errno.EROFS, ["create", "make_directory", "rename", "remove"]),
        (errno.EIO, ["sync"]),
        pytest.param(errno.EIO, ["rename"], marks=pytest.mark.slow),
        pytest.param(errno.EDQUOT, ["make_directory"], marks=pytest.mark.slow),
        pytest.param(errno.EMFILE, ["create", "open"], marks=pytest.mark.slow),
    ],
    ids=["full", "read-only", "eio-sync", "eio-rename", "quota", "descriptors"],
)
def test_training_goes_on_and_saving_recovers_by_itself(
    code: int, names: list[str], data: Path, whole: Path, tmp_path: Path
) -> None:
    ended = start(tmp_path, data, disturb=Broken(code, names, since=3, until=6))
    assert ended.statuses == (0,) and not ended.raised, ended
    told = [text for text in warned(tmp_path) if "was not written" in text]
    assert len(told) == 2  # steps 4 and 6
    for step, text in zip((4, 6), told, strict=True):
        assert f"checkpoints/step-{step:07d} was not written: rank 0: [Errno {code}]" in text
        assert re.search(r"\. It needs \d{6} bytes; \d+ are free there\. Earlier", text)
        assert "the newest before is of step 2" in text
        assert "The run goes on; the next checkpoint is tried anew (--on-save-failure continue)" in text
    assert saved_steps(tmp_path) == [2, 8, 10]
    assert_same(tmp_path / "run", whole)


def test_a_failure_is_told_within_a_step(data: Path, tmp_path: Path) -> None:
    def disturb(rank: int) -> None:
        Broken(errno.ENOSPC, ["write"], since=0, until=3)(rank)

    assert start(tmp_path, data, disturb=disturb).statuses == (0,)
    records = read_records(tmp_path / "run" / "log.jsonl")[0]
    (told,) = [record for record in records if record["event"] == "warned" and "was not written" in record["text"]]
    assert told["step"] == INTERVAL and "there is none before it: a kill loses everything" in told["text"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_with_stop_all_ranks_end_with_74(world_size: int, data: Path, tmp_path: Path) -> None:
    def disturb(rank: int) -> None:
        if rank == world_size - 1:
            Broken(errno.EIO, ["write"], since=3, until=100)(rank)

    ended = start(tmp_path, data, "--on-save-failure", "stop", disturb=disturb, world_size=world_size)
    assert ended.statuses == (74,) * world_size, ended
    assert saved_steps(tmp_path) == [2]
    assert steps_of(tmp_path / "run")[-1]["step"] <= 6
    assert any("The run stops (--on-save-failure stop)" in text for text in warned(tmp_path))


def test_a_run_whose_last_checkpoint_is_not_written_ends_with_74(data: Path, tmp_path: Path) -> None:
    ended = start(tmp_path, data, disturb=Broken(errno.EIO, ["write"], since=9, until=100))
    assert ended.statuses == (74,)
    assert saved_steps(tmp_path) == [2, 4, 6, 8]
    (told,) = [text for text in warned(tmp_path) if "was not written" in text]
    assert "the newest before is of step 8. The run ends without it; the same command takes the steps since" in told
    assert start(tmp_path, data).statuses == (0,)
    assert saved_steps(tmp_path) == [2, 4, 6, 8, 10]


def test_a_directory_that_vanishes_is_made_again(data: Path, tmp_path: Path) -> None:
    def vanish(step: int) -> None:
        if step == 5:
            shutil.rmtree(tmp_path / "run")

    ended = start(tmp_path, data, disturb=lambda rank: each_step(vanish))
    assert ended.statuses == (0,) and not ended.raised, ended
    assert saved_steps(tmp_path) == [6, 8, 10]


def test_there_must_be_room_for_a_checkpoint_before_the_first_step(data: Path, tmp_path: Path) -> None:
    def disturb(rank: int) -> None:
        setattr(Disk, "free_bytes", lambda disk, path: 100_000)  # noqa: B010 - mypy forbids to assign a method

    ended = start(tmp_path, data, disturb=disturb)
    assert ended.statuses == (2,), ended
    (line,) = [line for line in ended.said.splitlines() if "free there" in line]
    assert "--save = " in line and "100,000 are free there. Make room, or choose another directory." in line
    assert not any(record["event"] == "step_done" for record in read_records(tmp_path / "run" / "log.jsonl")[0])


def test_what_keep_last_leaves_out_makes_room_at_a_start(data: Path, tmp_path: Path) -> None:
    def disturb(rank: int) -> None:
        def free_bytes(disk: Disk, path: Path) -> int:
            return 100_000 if len(list_checkpoints(tmp_path / "run")) > 1 else sys.maxsize

        setattr(Disk, "free_bytes", free_bytes)  # noqa: B010 - mypy forbids to assign a method

    assert start(tmp_path, data, "--exit-interval", "6").statuses == (0,)
    assert saved_steps(tmp_path) == [2, 4, 6]
    assert start(tmp_path, data, disturb=disturb).statuses == (2,)
    assert saved_steps(tmp_path) == [2, 4, 6]
    ended = start(tmp_path, data, "--keep-last", "1", disturb=disturb)
    assert ended.statuses == (0,) and saved_steps(tmp_path) == [10], ended
    told = [record.get("text") for record in read_records(tmp_path / "run" / "log.jsonl")[0]]
    assert "old checkpoints are removed to make room: steps 2, 4" in told


def test_room_is_looked_for_before_each_save(data: Path, tmp_path: Path) -> None:
    free = [sys.maxsize]

    def disturb(rank: int) -> None:
        setattr(Disk, "free_bytes", lambda disk, path: free[0])  # noqa: B010
        each_step(lambda step: free.__setitem__(0, 1000 if 3 <= step <= 4 else sys.maxsize))

    assert start(tmp_path, data, disturb=disturb).statuses == (0,)
    (told,) = [text for text in warned(tmp_path) if "was not written" in text]
    assert "step-0000004" in told and "No space left" in told and "1000 are free there" in told
    assert saved_steps(tmp_path) == [2, 6, 8, 10]


def make_file(path: Path) -> None:
    path.write_text("a file")


def make_dangling_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere" / "at all")


def make_file_inside(path: Path) -> None:
    path.mkdir()
    (path / "checkpoints").write_text("a file")


def make_open_directory(path: Path) -> None:
    (path / "checkpoints").mkdir(parents=True)
    (path / "checkpoints").chmod(0o777)


@pytest.mark.parametrize("make", [make_file, make_dangling_link, make_file_inside, make_open_directory])
def test_an_unfit_run_directory_is_refused_before_the_first_step(
    make: Callable[[Path], None], data: Path, tmp_path: Path
) -> None:
    make(tmp_path / "run")
    ended = start(tmp_path, data)
    assert ended.statuses == (2,) and not ended.raised, ended
    (line,) = ended.said.splitlines()
    assert line.startswith(f"megalith: --save = {tmp_path / 'run'}: ") and "hoose another directory" in line


def test_a_run_directory_may_be_a_link_or_lie_below_one(data: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch" / "runs").mkdir(parents=True)
    (tmp_path / "run").symlink_to("scratch/runs")
    ended = start(tmp_path, data, "--keep-last", "2", "--exit-interval", "6")
    assert ended.statuses == (0,) and not ended.said, ended
    assert start(tmp_path, data, "--keep-last", "2").statuses == (0,)
    assert saved_steps(tmp_path) == [8, 10]
    assert_same(tmp_path / "run", whole)
    assert (tmp_path / "run").is_symlink() and not (tmp_path / "run" / "lease.json").exists()
    below = start(tmp_path, data, "--save", str(tmp_path / "run" / "other"))
    assert below.statuses == (0,) and not below.said, below


@pytest.mark.parametrize("name", ["checkpoints", "tokenizer", "checkpoints/step-0000004"])
def test_a_link_in_a_run_directory_is_not_followed(name: str, data: Path, tmp_path: Path) -> None:
    assert start(tmp_path, data, "--exit-interval", "4").statuses == (0,)
    path, elsewhere = tmp_path / "run" / name, tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    before = {found: found.stat().st_mtime_ns for found in (elsewhere, *elsewhere.rglob("*"))}
    ended = start(tmp_path, data, "--exit-interval", "6")
    assert {found: found.stat().st_mtime_ns for found in (elsewhere, *elsewhere.rglob("*"))} == before
    if name == "checkpoints/step-0000004":
        assert ended.statuses == (0,) and any(f"{path} is a link" in text for text in warned(tmp_path))
    else:
        assert ended.statuses == (2,) and f"{path} is a link, which is not followed" in ended.said, ended


def test_a_read_only_file_system_is_refused_before_the_first_step(data: Path, tmp_path: Path) -> None:
    def act(moment: Moment, operation: Operation) -> None:
        if operation.name in ("create", "make_directory", "rename") and moment == "before":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), operation.path)

    ended = start(tmp_path, data, disturb=lambda rank: Wire(act).install())
    assert ended.statuses == (2,) and "Read-only file system" in ended.said and str(tmp_path / "run") in ended.said


def test_a_log_and_tensorboard_that_cannot_be_written_stop_nothing(data: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    ended = start(tmp_path, data)
    assert ended.statuses == (0,) and not ended.raised, ended
    assert saved_steps(tmp_path) == [2, 4, 6, 8, 10]
    newest, other = list_checkpoints(tmp_path / "run")[-1], list_checkpoints(whole)[-1]
    assert verify(newest.path).same_contents(verify(other.path))


def test_a_run_does_nothing_to_the_disk_between_its_saves(data: Path, tmp_path: Path) -> None:
    at = tmp_path / "operations"

    def disturb(rank: int) -> None:
        def act(moment: Moment, operation: Operation) -> None:
            if moment == "before":
                with at.open("a") as file:
                    file.write(f"{operation.name} {operation.path}\n")

        def mark(step: int) -> None:
            with at.open("a") as file:
                file.write(f"step {step}\n")

        each_step(mark)
        Wire(act).install()

    assert start(tmp_path, data, "--save-interval", "100", disturb=disturb).statuses == (0,)
    lines = at.read_text().splitlines()
    between = lines[lines.index("step 2") : lines.index(f"step {STEPS}")]
    # The ledger's notes and the heartbeat of the lease, beside which the run's directory is locked, go by the clock.
    by_the_clock = re.compile(r"step |.*ledger|.*lease|.*/run$")
    assert [line for line in between if not by_the_clock.match(line)] == []


def test_nothing_that_a_run_leaves_can_be_written_by_everybody(data: Path, tmp_path: Path) -> None:
    def disturb(rank: int) -> None:
        os.umask(0)

    assert start(tmp_path, data, "--log-format", "reference", disturb=disturb).statuses == (0,)
    paths = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    assert len(paths) > 10
    assert [str(path) for path in paths if path.stat().st_mode & stat.S_IWOTH] == []


def test_no_secret_reaches_what_a_run_leaves_or_says(data: Path, tmp_path: Path) -> None:
    secrets = {f"SERVICE_{kind}": f"canary{number}x7f3a" for number, kind in enumerate(("TOKEN", "KEY", "PASSWORD"))}

    def disturb(rank: int) -> None:
        os.environ.update(secrets, HTTPS_PROXY="http://user:canary3x7f3a@proxy:8080")

    url = "https://user:canary4x7f3a@host/weights"
    words = ["--log-format", "reference", "--bert-load", url, "--ict-load", url]
    out = tmp_path / "out"

    def printing(rank: int) -> None:
        disturb(rank)
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT, 0o600), 1)

    ended = start(tmp_path, data, *words, disturb=printing)
    assert ended.statuses == (0,), ended
    said = out.read_bytes() + ended.said.encode()
    assert b"https://***@host/weights" in said
    for path in [path for path in (tmp_path / "run").rglob("*") if path.is_file()]:
        said += path.read_bytes()
    assert b"canary" not in said
    ended = start(tmp_path, data, "--load", url, disturb=disturb)
    assert ended.statuses == (2,) and "canary" not in ended.said and "https://***@host/weights" in ended.said


def test_a_directory_in_the_place_of_a_file_is_named_as_it_is_called(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "run.toml").mkdir(parents=True)
    refused = start(tmp_path, data)
    assert refused.statuses == (2,) and f"{tmp_path}/run/run.toml: Is a directory" in refused.said, refused


def test_a_terminal_obeys_no_name(data: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    name = "run\x1b]0;owned\x07\x1b[2J\n\u202e"
    words = ["--load", str(tmp_path / name), "--save", str(tmp_path / "x" / name), "--log-format", "reference"]
    out = tmp_path / "out"

    def printing(rank: int) -> None:
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT, 0o600), 1)

    refused = start(tmp_path, data, *words, disturb=printing)
    assert refused.statuses == (2,)
    assert start(tmp_path, data, *words[2:], disturb=printing).statuses == (0,)
    said: Any = refused.said.encode() + out.read_bytes()
    said += (tmp_path / "x" / name / "log.jsonl").read_bytes()
    assert not any(code in said for code in (b"\x1b", b"\x07", "\u202e".encode()))
    assert b"\\x1b]0;owned" in said
    assert json.loads((tmp_path / "x" / name / "log.jsonl").read_text().splitlines()[0])
