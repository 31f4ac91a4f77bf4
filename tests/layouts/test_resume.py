"""A checkpoint knows no layout: saved under one, a run goes on under any other as if nothing had happened."""

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray

from megalith.checkpoint.settings import FOLDER
from megalith.job import build_job
from megalith.parallel.mesh import make_layout
from megalith.resume import resume
from megalith.run_state import tensors_of
from tests.layouts.runs import (
    MODEL,
    Runs,
    assert_same_steps,
    configured,
    events_of,
    largest_difference,
    run_on,
    weights_of,
)
from tests.ranks import run_ranks

TP, PP, CP, SHARD = (
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--context-parallel-size",
    "--data-parallel-sharding",
)
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "dp2": (2, []),
    "dp4": (4, []),
    "tp2-sp": (2, [TP, "2", "--sequence-parallel"]),
    "pp2": (2, [PP, "2"]),
    "pp2-interleaved": (2, [PP, "2", "--num-layers-per-virtual-pipeline-stage", "1"]),
    "cp2": (2, [CP, "2"]),
    "zero1": (2, [SHARD, "optimizer"]),
    "zero2": (2, [SHARD, "gradients"]),
    "zero3": (2, [SHARD, "parameters"]),
    "zero3-dp4": (4, [SHARD, "parameters"]),
    "hybrid": (4, [SHARD, "parameters", "--data-parallel-shard-size", "2"]),
    "pp2-tp2": (4, [PP, "2", TP, "2"]),
}
PAIRS = [
    ("one", "pp2-tp2"),
    ("dp2", "zero3"),
    ("tp2-sp", "pp2-interleaved"),
    ("zero3", "dp4"),
    ("pp2-tp2", "zero1"),
    ("zero1", "tp2-sp"),
    ("pp2", "cp2"),
    ("dp4", "one"),
    ("zero2", "pp2"),
    ("cp2", "zero2"),
    ("zero3-dp4", "zero3"),
    ("pp2-interleaved", "zero3-dp4"),
    ("zero1", "zero2"),
    ("hybrid", "pp2"),
    ("zero2", "hybrid"),
    ("zero3", "tp2-sp"),
]
QUICK = PAIRS[:3]
STEPS = ["--train-iters", "14"]


@pytest.mark.parametrize(("saved", "loaded"), PAIRS, ids=lambda name: name)
def test_a_run_goes_on_under_another_layout(
    saved: str, loaded: str, runs: Runs, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--slow") and (saved, loaded) not in QUICK:
        pytest.skip("run with --slow")
    undisturbed = runs(1, *STEPS)
    world_size, words = LAYOUTS[saved]
    save = runs.copied(runs(world_size, *STEPS, "--exit-interval", "10", *words), tmp_path / "run")
    world_size, words = LAYOUTS[loaded]
    assert run_on(world_size, [*STEPS, *words], save, runs.data) == 0
    assert_same_steps(save, undisturbed)
    assert largest_difference(save, undisturbed, "weight.") < 1e-3
    # Moments are of the size of gradients, and of their squares.
    assert largest_difference(save, undisturbed, "exp_avg.") < 1e-4
    assert largest_difference(save, undisturbed, "exp_avg_sq.") < 1e-5


def test_ranks_go_on_together_although_one_lists_no_checkpoint(runs: Runs, tmp_path: Path) -> None:
    def sees_nothing(rank: int) -> None:
        # As where a network file system keeps the listing of before the first checkpoint.
        listdir = os.listdir
        if rank == 1:
            os.listdir = lambda path=".": [] if Path(path).name == FOLDER else listdir(path)  # type: ignore[assignment]

    save = runs.copied(runs(2, *STEPS, "--exit-interval", "10"), tmp_path / "run")
    assert run_on(2, STEPS, save, runs.data, before=sees_nothing, timeout=60) == 0
    assert_same_steps(save, runs(1, *STEPS))
    assert [event["step"] for event in events_of(save, "load_started")] == [10]


def pieces_on(rank: int, *, world_size: int, words: list[str]) -> list[tuple[str, tuple[int, ...], NDArray[Any]]]:
    """What a rank holds of weights and optimizer state after it has loaded the run's newest checkpoint."""
    from megalith.job import open_log

    run = configured(rank, world_size, words)
    parallel = run.parallel
    layout = make_layout(
        os.environ,
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        context=parallel.context_parallel_size,
    )
    with open_log(run, layout) as log:
        job = build_job(run, layout, torch.device("cpu"), log, started=time.monotonic())
        resume(job)
    sys.stdout.flush()
    return [(name, piece.offset, piece.local.detach().numpy()) for name, piece in tensors_of(job).items()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_ranks_load_is_bit_for_bit_what_was_saved(
    layout: str, runs: Runs, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--slow") and layout not in {"zero3", "pp2-tp2"}:
        pytest.skip("run with --slow")
    save = runs.copied(runs(1, *STEPS), tmp_path / "run")
    saved = weights_of(save)
    found = {name: torch.full_like(tensor, torch.nan) for name, tensor in saved.items()}
    world_size, words = LAYOUTS[layout]
    words = [*MODEL, "--data-path", str(runs.data), "--save", str(save), *STEPS, *words]
    for pieces in run_ranks(partial(pieces_on, world_size=world_size, words=words), world_size):
        for name, offset, piece in pieces:
            place = tuple(slice(start, start + size) for start, size in zip(offset, piece.shape, strict=True))
            found[name][place] = torch.from_numpy(piece)
    for name, tensor in saved.items():
        assert torch.equal(found[name], tensor), name
