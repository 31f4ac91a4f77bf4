"""Tiny trainings on forked ranks, whole: the command's own train function, real files, real process groups."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tests.early  # noqa: F401 - for its effect
from megalith.check import check
from megalith.checkpoint.pieces import Piece
from megalith.checkpoint.store import load_latest
from megalith.config import ConfigError, Run
from megalith.data.indexed import IndexedWriter
from megalith.sources import read_command_line
from megalith.train import train
from tests.ranks import run_ranks

MODEL = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16
    --micro-batch-size 1 --global-batch-size 8 --lr 1e-2 --lr-warmup-iters 2 --weight-decay 0.1
    --tokenizer-type ByteLevelTokenizer --make-vocab-size-divisible-by 8 --log-interval 1 --log-params-norm
    --eval-interval 10 --eval-iters 1 --save-interval 10 --log-format json --device cpu
""".split()

END_OF_DOCUMENT = 256  # of the tokenizer of bytes


def write_data(folder: Path) -> Path:
    """A small token file of bytes that repeat with variations, so that there is something to learn."""
    random = np.random.RandomState(3)
    prefix = folder / "bytes_document"
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(60):
            start = random.randint(0, 200)
            text = (start + np.arange(random.randint(5, 60)) * 3) % 256
            writer.add_document([np.append(text, END_OF_DOCUMENT)])
    return prefix


def run_on(
    world_size: int,
    words: Sequence[str],
    save: Path,
    data: Path,
    *,
    model: Sequence[str] = MODEL,
    before: Callable[[int], None] | None = None,
    timeout: float = 300.0,
) -> int:
    """Train on that many ranks into a run directory; give the exit status, the same on all ranks.

    model: the words that the training begins with. before: called on each rank with its number, before anything else.
    """
    words = [*model, "--data-path", str(data), "--save", str(save), *words]
    on_rank = partial(run_rank, world_size=world_size, words=words, before=before)
    statuses = set(run_ranks(on_rank, world_size, timeout=timeout))
    assert len(statuses) == 1
    return int(statuses.pop())


def run_rank(rank: int, *, world_size: int, words: list[str], before: Callable[[int], None] | None) -> int:
    if before is not None:
        before(rank)
    return train(configured(rank, world_size, words), started=0.0)


def configured(rank: int, world_size: int, words: list[str]) -> Run:
    """The checked configuration of a rank, which is told its place and keeps silent."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    run = read_command_line(words)
    if faults := check(run, world_size):
        raise ConfigError(faults)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    return run


class Runs:
    """Trainings by command line, each run once and kept for all tests."""

    def __init__(
        self, folder: Path, *, model: Sequence[str] = MODEL, write: Callable[[Path], Path] = write_data
    ) -> None:
        self._folder = folder
        self._model = model
        self.data = write(folder)
        self._done: dict[tuple[int, tuple[str, ...]], Path] = {}

    def __call__(self, world_size: int, *words: str) -> Path:
        """The run directory of a training with the tiny model and these further flags."""
        asked = (world_size, words)
        if asked not in self._done:
            save = self._folder / f"run{len(self._done)}"
            assert self.go_on(world_size, words, save) == 0
            self._done[asked] = save
        return self._done[asked]

    def go_on(self, world_size: int, words: Sequence[str], save: Path) -> int:
        """Train into this run directory, from what it holds; give the exit status."""
        return run_on(world_size, words, save, self.data, model=self._model)

    def copied(self, save: Path, to: Path) -> Path:
        """A copy of a run directory, to go on from."""
        shutil.copytree(save, to)
        return to


def events_of(save: Path, kind: str) -> list[dict[str, Any]]:
    """What log.jsonl says of each event of a kind, at full precision."""
    records = [json.loads(line) for line in (save / "log.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == kind]


def steps_of(save: Path) -> list[dict[str, Any]]:
    """Losses and norms of each step."""
    return events_of(save, "step_done")


def weights_of(save: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint, whole."""
    tensors: dict[str, torch.Tensor] = {}

    def everything(index: Any) -> dict[str, Piece]:
        for name, stored in index.tensors.items():
            tensors[name] = torch.empty(stored.shape, dtype=torch.float32)
        return {name: Piece(tensor, tuple(tensor.shape), (0,) * tensor.dim()) for name, tensor in tensors.items()}

    assert load_latest(save, everything) is not None
    return tensors


def largest_difference(save: Path, other: Path, prefix: str = "") -> float:
    """The largest absolute difference between the tensors of two newest checkpoints whose names begin so."""
    tensors, others = weights_of(save), weights_of(other)
    assert tensors.keys() == others.keys()
    names = [name for name in tensors if name.startswith(prefix)]
    assert names
    return max((tensors[name] - others[name]).abs().max().item() for name in names)


def assert_same_steps(save: Path, reference: Path, *, first: int = 0, loss: float = 1e-5, norm: float = 1e-4) -> None:
    """Losses, norms and validations agree at every step, within these relative differences.

    first: how many steps of the reference came before the first of the run.
    """
    steps, wanted = steps_of(save), steps_of(reference)
    assert len(wanted) > first and len(steps) == len(wanted)
    for step, want in zip(steps[first:], wanted[first:], strict=True):
        assert step["step"] == want["step"]
        assert step["losses"] == pytest.approx(want["losses"], rel=loss)
        assert step["grad_norm"] == pytest.approx(want["grad_norm"], rel=norm)
        assert step["params_norm"] == pytest.approx(want["params_norm"], rel=loss)
    validated, wanted = events_of(save, "evaluated"), events_of(reference, "evaluated")
    assert len(validated) == len(wanted)
    for found, want in zip(validated, wanted, strict=True):
        assert found["losses"] == pytest.approx(want["losses"], rel=loss)


def assert_same_run(save: Path, reference: Path) -> None:
    """Steps agree as `assert_same_steps` says, weights within what as many steps of such rounding give."""
    assert_same_steps(save, reference)
    assert largest_difference(save, reference, "weight.") < 1e-3


def assert_goes_on(
    runs: Runs, to: Path, saved: tuple[int, Sequence[str]], loaded: tuple[int, Sequence[str]], reference: Path
) -> None:
    """What one layout saved at step 10 another goes on with to the end of the reference. Layouts: ranks and flags."""
    world_size, words = saved
    save = runs.copied(runs(world_size, "--exit-interval", "10", *words), to)
    world_size, words = loaded
    assert runs.go_on(world_size, words, save) == 0
    assert_same_steps(save, reference)
    assert largest_difference(save, reference, "weight.") < 1e-3


def assert_goes_on_bit_for_bit(runs: Runs, to: Path, layout: tuple[int, Sequence[str]]) -> None:
    """What a layout saved at step 7 it goes on with as if it had never stopped. layout: ranks and flags."""
    world_size, words = layout
    undisturbed = runs(world_size, *words)
    save = runs.copied(runs(world_size, *words, "--exit-interval", "7", "--save-interval", "7"), to)
    assert len(steps_of(save)) == 7
    assert runs.go_on(world_size, words, save) == 0
    assert largest_difference(save, undisturbed) == 0.0
    assert [step["losses"] for step in steps_of(save)] == [step["losses"] for step in steps_of(undisturbed)]
