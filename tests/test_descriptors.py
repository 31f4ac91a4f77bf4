"""Descriptors of real processes: standard ones that are closed, as daemons and cron leave them, and too few of them."""

import errno
import os
import signal
import subprocess
import sys
import time
import uuid
from functools import cache
from pathlib import Path

import pytest

from megalith.descriptors import descriptor_remedy
from tests.layouts.runs import steps_of
from tests.processes import MARK, marked
from tests.records import read_records

TRAINING = """
    pretrain --num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16
    --micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --mock-data --vocab-size 100 --train-iters 4 --save-interval 2
    --log-interval 1 --eval-interval 100 --eval-iters 1 --device cpu
""".split()
SECONDS_TO_END = 60.0


def command(*words: str, redirected: str = "", limit: str = "unlimited") -> list[str]:
    """The words that run the command under a shell's redirections and limit of descriptors."""
    program = [sys.executable, "-m", "megalith", *words]
    limited = "" if limit == "unlimited" else f"ulimit {limit} && "
    return ["bash", "-c", f'{limited}exec "$@" {redirected}', "bash", *program]


@cache
def undisturbed(folder: Path) -> list[float]:
    """The losses of the training that nothing disturbs; ranks that share its samples compute the same."""
    done = subprocess.run(command(*TRAINING, "--save", str(folder / "run")), capture_output=True, timeout=120)
    assert done.returncode == 0, done
    return losses(folder / "run")


def losses(run: Path) -> list[float]:
    return [step["losses"]["lm loss"] for step in steps_of(run)]


def standard_ones(mark: str) -> set[str]:
    """What the standard descriptors of the living processes with this mark are."""
    found = set()
    for pid in marked(mark):
        for descriptor in range(3):
            try:
                found.add(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
            except OSError:  # it is closed, or the process has ended
                continue
    return found


@pytest.mark.parametrize("limit", [7, 14])
def test_too_few_descriptors_are_told_with_the_remedy(limit: int, tmp_path: Path) -> None:
    """The launcher meets the first limit, the ranks the second."""
    words = command(*TRAINING, "--nproc", "2", "--save", str(tmp_path / "run"), limit=f"-n {limit}")
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done
    remedy = f"This process may have {limit} files open at once (ulimit -n). Raise the limit, as with ulimit -n 4096."
    assert f"Too many open files. {remedy}" in done.stderr


def test_a_limit_that_may_be_raised_is_raised(tmp_path: Path) -> None:
    words = command(*TRAINING, "--nproc", "2", "--save", str(tmp_path / "run"), limit="-S -n 20")
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr and len(losses(tmp_path / "run")) == 4, done


def test_a_machine_without_descriptors_has_another_remedy() -> None:
    assert descriptor_remedy(os.strerror(errno.ENOENT)) is None
    for code, said in ((errno.EMFILE, "ulimit -n"), (errno.ENFILE, "fs.file-max")):
        remedy = descriptor_remedy(f"a library failed: {os.strerror(code)}")
        assert remedy is not None and said in remedy


@pytest.mark.parametrize(
    ("redirected", "ranks"),
    [
        pytest.param("<&-", ["--nproc", "2"], id="<&- of two"),
        pytest.param(">&-", [], id=">&- of one"),
        pytest.param("2>&-", [], id="2>&- of one"),
        pytest.param("<&-", [], id="<&- of one", marks=pytest.mark.slow),
        pytest.param(">&-", ["--nproc", "2"], id=">&- of two", marks=pytest.mark.slow),
        pytest.param("2>&-", ["--nproc", "2"], id="2>&- of two", marks=pytest.mark.slow),
    ],
)
def test_a_run_whose_standard_streams_are_closed_trains(
    redirected: str, ranks: list[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    mark, run = uuid.uuid4().hex, tmp_path / "run"
    process = subprocess.Popen(
        command(*TRAINING, *ranks, "--save", str(run), redirected=redirected),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, MARK: mark},
    )
    met, said, ends = set[str](), None, time.monotonic() + SECONDS_TO_END
    try:
        while said is None and time.monotonic() < ends:
            try:
                said = process.communicate(timeout=0.5)
            except subprocess.TimeoutExpired:
                met |= standard_ones(mark)
    finally:
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
    assert said is not None, "it has not ended"
    assert process.returncode == 0, said
    assert [target for target in met if target.startswith((str(run), "/memfd"))] == []
    assert read_records(run / "log.jsonl")[1] == 0
    expected = undisturbed(tmp_path_factory.getbasetemp() / "undisturbed")
    assert losses(run) == pytest.approx(expected, rel=1e-6)
    told = "megalith: standard output is closed: what pretrain says there is lost"
    assert said[1].splitlines() == ([told] if redirected == ">&-" else [])
