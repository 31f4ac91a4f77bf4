"""A training ends, with the same figures, however its process was made and however many threads it is told to use."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.layouts.runs import write_data
from tests.starts import OVERDUE

LIMIT = 120.0  # seconds that one start may take; on an idle machine it takes one to five
MODEL = """
    --num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --max-position-embeddings 8
    --micro-batch-size 1 --global-batch-size 2 --lr 1e-2 --tokenizer-type ByteLevelTokenizer
    --make-vocab-size-divisible-by 8 --log-interval 1 --eval-iters 0 --save-interval 2 --log-format json --device cpu
    --train-iters 2
""".split()


class Figures(NamedTuple):
    """What was printed of a step, at full precision."""

    losses: dict[str, float]
    grad_norm: float


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["pretrain", *MODEL, "--data-path", str(write_data(tmp_path_factory.mktemp("data")))]


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> list[Figures]:
    """Of the plain command with one thread."""
    save = tmp_path_factory.mktemp("plain") / "run"
    assert command([*words, "--save", str(save)], threads="1").returncode == 0
    return figures_in(save)


def figures_in(save: Path) -> list[Figures]:
    """Of the two steps."""
    records = [json.loads(line) for line in (save / "log.jsonl").read_text().splitlines()]
    found = [Figures(r["losses"], r["grad_norm"]) for r in records if r["event"] == "step_done"]
    assert len(found) == 2
    return found


def environment(threads: str | None) -> dict[str, str]:
    """This process's, with that many threads for OpenMP; None: the library may choose."""
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return kept if threads is None else {**kept, "OMP_NUM_THREADS": threads}


def command(words: list[str], threads: str | None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "megalith", *words],
        env=environment(threads),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("method", "count"),
    [
        ("fork", 2),
        pytest.param("forkserver", 2, marks=SLOW),
        pytest.param("spawn", 1, marks=SLOW),
        pytest.param("fork", 100, marks=SLOW),
        pytest.param("forkserver", 100, marks=SLOW),
        pytest.param("spawn", 20, marks=SLOW),
    ],
)
def test_every_start_by_multiprocessing_ends_with_the_same_figures(
    method: str, count: int, words: list[str], figures: list[Figures], tmp_path: Path
) -> None:
    """The starting process has used torch's threads where it has torch at all, which is with fork."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.starts", method, str(count), str(LIMIT), str(tmp_path), *words],
        env=environment("2"),
        capture_output=True,
        text=True,
        timeout=60 + count * LIMIT,
        check=True,
    )
    statuses = json.loads(done.stdout)
    print(f"{method}: {count} starts, {statuses.count(0)} ended well, {statuses.count(OVERDUE)} hung")
    assert statuses == [0] * count, done.stderr
    for number in range(count):
        text = (tmp_path / f"run{number}" / "log.jsonl").read_text()
        assert ("this process was forked: it computes with 1 thread" in text) == (method != "spawn")
    assert_same([figures_in(tmp_path / f"run{number}") for number in range(count)], figures)


def assert_same(found: list[list[Figures]], figures: list[Figures]) -> None:
    """All starts had the same figures to the bit, and those of one thread and rank up to the order of sums."""
    assert all(other == found[0] for other in found)
    for step, wanted in zip(found[0], figures, strict=True):
        assert step.losses == pytest.approx(wanted.losses, rel=1e-6)
        assert step.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-6)


@pytest.mark.parametrize(
    ("threads", "nproc", "count"),
    [
        pytest.param("2", None, 1, marks=SLOW),
        pytest.param(None, None, 1, marks=SLOW),
        ("2", 2, 1),
        *(pytest.param(threads, None, 10, marks=SLOW) for threads in ("1", "2", "4", None)),
        *(pytest.param(threads, 2, 5, marks=SLOW) for threads in ("1", "2", "4", None)),
    ],
)
def test_every_command_ends_with_the_same_figures_for_any_number_of_threads(
    threads: str | None, nproc: int | None, count: int, words: list[str], figures: list[Figures], tmp_path: Path
) -> None:
    ranks = [] if nproc is None else ["--nproc", str(nproc)]
    found = []
    for number in range(count):
        save = tmp_path / f"run{number}"
        done = command([*words, "--save", str(save), *ranks], threads)
        assert done.returncode == 0, done.stderr
        found.append(figures_in(save))
    assert_same(found, figures)
