"""The kernel gives no more memory, for real: a sentence, status 79, and the last commit is whole and goes on."""

import os
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import megalith.evaluations
from megalith.checkpoint.directory import list_checkpoints
from megalith.checkpoint.saver import AsyncSaver, HostCopy
from megalith.checkpoint.verify import verify
from megalith.cli import OUT_OF_MEMORY
from megalith.keeper import Keeper
from tests.disturbed import start_run
from tests.faults.cluster import Ended
from tests.faults.disk import Disturbance, undisturbed
from tests.test_train import assert_same

# Wide enough for a pass to need blocks that a starved process has not got.
WIDE = "--num-layers 2 --hidden-size 128 --seq-length 64 --max-position-embeddings 64".split()
WIDE += "--micro-batch-size 8 --global-batch-size 16".split()
STEPS = 6
SMALLEST_BLOCK = 1 << 16  # bytes; what is smaller is left, for Python to say what is wrong
# Of glibc's malloc, which keeps freed blocks in arenas: a thread's own, and those of threads that have ended. It turns
# to one other if one has nothing.
ARENAS = 8 * (os.cpu_count() or 1)
LIMITS = {"address-space": resource.RLIMIT_AS, "data": resource.RLIMIT_DATA}


def start(folder: Path, data: Path, *words: str, disturb: Disturbance = undisturbed, world_size: int = 1) -> Ended:
    given = [*WIDE, "--eval-interval", "3", "--eval-first", "--hang-timeout", "20", *words]
    return start_run(folder, data, *given, num_steps=STEPS, disturb=disturb, world_size=world_size)


def starve(limit: int, *, spare: int = 0) -> list[torch.Tensor]:
    """From now on the kernel gives this process nothing; what malloc has kept is taken, but for small blocks.

    spare: bytes that are given back in the end. Holds for as long as the result lives.
    """
    name = "VmSize" if limit == resource.RLIMIT_AS else "VmData"
    kibibytes = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if name in line)
    resource.setrlimit(limit, (1024 * int(kibibytes), resource.RLIM_INFINITY))
    taken: list[torch.Tensor] = []
    size = 1 << 26
    while size >= SMALLEST_BLOCK:
        for _ in range(ARENAS):
            with suppress(RuntimeError):
                while True:
                    taken.append(torch.empty(size, dtype=torch.uint8))
        size //= 2
    while spare > 0 and taken:
        spare -= taken.pop().numel()
    return taken


def in_evaluation(limit: int, *, number: int = 2, spare: int = 0) -> Disturbance:
    """The number-th evaluation; the first starts a thread, the second is that of step 3."""

    def on_rank(rank: int) -> None:
        evaluate = megalith.evaluations.evaluate
        count = 0

        def starved(*arguments: Any, **named: Any) -> str | None:
            nonlocal count
            count += 1
            taken = starve(limit, spare=spare) if count == number else []
            cut = evaluate(*arguments, **named)
            del taken
            return cut

        megalith.evaluations.evaluate = starved

    return on_rank


def in_save(limit: int, *, number: int = 1, spare: int = 0) -> Disturbance:
    """The number-th save of a start, until its end."""

    def on_rank(rank: int) -> None:
        save = Keeper.save
        taken: list[Any] = []

        def starved(keeper: Keeper, **how: bool) -> None:
            taken.append(starve(limit, spare=spare) if len(taken) + 1 == number else None)
            save(keeper, **how)

        setattr(Keeper, "save", starved)  # noqa: B010 - mypy forbids to assign a method

    return on_rank


def in_copy(limit: int, *, rank: int = 0) -> Disturbance:
    """The first copy of the weights, in the thread that makes it: malloc keeps blocks for each thread by itself.

    The step waits for the copy, which can then not have the blocks that the step frees.
    """

    def on_rank(own: int) -> None:
        save, copy = AsyncSaver.save, HostCopy.copy

        def waiting(saver: AsyncSaver, *arguments: Any, **named: Any) -> float:
            return save(saver, *arguments, **{**named, "overlap": False})

        def starved(host: HostCopy, *arguments: Any) -> None:
            taken = starve(limit)
            copy(host, *arguments)
            del taken

        if own == rank:
            setattr(AsyncSaver, "save", waiting)  # noqa: B010
            setattr(HostCopy, "copy", starved)  # noqa: B010

    return on_rank


def whole_steps(folder: Path) -> list[int]:
    """The checkpoints, each verified; what a save had begun may lie beside them for the next to remove."""
    return [verify(found.path).step for found in list_checkpoints(folder / "run")]


def assert_told(ended: Ended) -> None:
    assert ended.statuses == (OUT_OF_MEMORY,) and not ended.raised, ended
    said = ended.said.splitlines()
    assert said[0].startswith("megalith: out of memory: ") and len(said[0]) > len("megalith: out of memory: "), said
    assert said[1] == "megalith: checkpoints that were saved are whole; the same command goes on from the newest"


@pytest.mark.parametrize("limit", ["data", pytest.param("address-space", marks=pytest.mark.slow)])
def test_memory_that_runs_out_in_an_evaluation(limit: str, data: Path, whole: Path, tmp_path: Path) -> None:
    assert_told(start(tmp_path, data, disturb=in_evaluation(LIMITS[limit])))
    assert whole_steps(tmp_path) == [2]
    assert start(tmp_path, data).statuses == (0,)
    assert_same(tmp_path / "run", whole)


def test_memory_that_runs_out_in_a_save(data: Path, whole: Path, tmp_path: Path) -> None:
    # A limit of the address space does not strike: what the thread may allocate was set aside when it began.
    assert start(tmp_path, data, "--exit-interval", "2").statuses == (0,)
    ended = start(tmp_path, data, disturb=in_copy(resource.RLIMIT_DATA))
    assert_told(ended)
    assert "can't allocate memory" in ended.said  # for the copy of the weights
    assert whole_steps(tmp_path) == [2]
    assert start(tmp_path, data).statuses == (0,)
    assert_same(tmp_path / "run", whole)


def test_memory_that_runs_out_in_one_ranks_save_ends_all(data: Path, tmp_path: Path) -> None:
    assert start(tmp_path, data, "--exit-interval", "2", world_size=2).statuses == (0, 0)
    ended = start(tmp_path, data, disturb=in_copy(resource.RLIMIT_DATA, rank=1), world_size=2)
    assert ended.statuses[1] == OUT_OF_MEMORY and ended.statuses[0] in (77, -9) and not ended.raised, ended
    assert "megalith: out of memory: " in ended.said
    assert whole_steps(tmp_path) == [2]
    assert start(tmp_path, data, world_size=2).statuses == (0, 0)


PLACES: dict[str, Callable[..., Disturbance]] = {
    "evaluation": in_evaluation,
    "first-save": in_save,
    "second-save": lambda limit, spare: in_save(limit, number=2, spare=spare),
    "start-of-a-thread": lambda limit, spare: in_evaluation(limit, number=1, spare=spare),
}


@pytest.mark.slow
@pytest.mark.parametrize("spare", [0, 1 << 17, 1 << 18, 1 << 19, 1 << 20, 1 << 21, 1 << 22, 1 << 24])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("limit", LIMITS)
def test_wherever_memory_runs_out_a_run_ends_well_or_goes_on_well(
    limit: str, place: str, spare: int, data: Path, whole: Path, tmp_path: Path
) -> None:
    ended = start(tmp_path, data, disturb=PLACES[place](LIMITS[limit], spare=spare))
    if ended.hung and place == "start-of-a-thread":
        # CPython 3.11 waits for ever for a thread that had no memory to say that it runs; before the first step the
        # watch waits for half an hour.
        assert ended.statuses == (-9,), ended
    elif ended.statuses != (0,):
        assert_told(ended)
    if ended.statuses != (0,):
        assert whole_steps(tmp_path) in ([], [2], [2, 4], [2, 4, 6])
        assert start(tmp_path, data).statuses == (0,)
    assert_same(tmp_path / "run", whole)
