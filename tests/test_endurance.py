"""A run holds no more after thousands of steps than it did when it was warm, and a leak of any kind would be seen."""

import mmap
import os
import statistics
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import megalith.train
from megalith.job import Job
from megalith.keeper import Keeper
from megalith.monitor.events import StepDone
from tests.faults.cluster import run_ranks
from tests.faults.disk import Disturbance, undisturbed
from tests.growth import COUNTED, Reading, growing, growth, read_each, readings_in, resident_bytes, slope
from tests.layouts.runs import write_data
from tests.processes import LEAKED

INTERVAL = 10  # steps between two saves, and between two readings
WARM = 5 * INTERVAL  # by then every thread has been started, and a checkpoint has been deleted
MODEL = f"""
    --num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --max-position-embeddings 8
    --micro-batch-size 1 --lr 1e-3 --tokenizer-type ByteLevelTokenizer --make-vocab-size-divisible-by 8
    --log-interval {INTERVAL} --eval-interval {4 * INTERVAL} --eval-iters 1 --log-format json --device cpu
    --save-interval {INTERVAL} --keep-last 2
""".split()


def readings_of(
    folder: Path, num_steps: int, *, world_size: int = 1, leak: Disturbance = undisturbed
) -> list[list[Reading]]:
    """Train the tiny model; what each rank held after every tenth step. leak: called on each rank before."""

    def on_rank(rank: int) -> None:
        leak(rank)
        read_each(INTERVAL, folder / f"held-{rank}")

    words = ["pretrain", *MODEL, "--global-batch-size", str(world_size), "--train-iters", str(num_steps)]
    words += ["--data-path", str(write_data(folder)), "--save", str(folder / "run")]
    ended = run_ranks(words, world_size, folder, disturb=on_rank, limit=1800)
    assert set(ended.statuses) == {0}, ended.said
    # The two that are kept, and nothing half-deleted.
    assert len(os.listdir(folder / "run" / "checkpoints")) == 2
    return [readings_in(folder / f"held-{rank}") for rank in range(world_size)]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("num_steps", "world_size"),
    [(150, 1), (80, 2), *(pytest.param(*long, marks=SLOW) for long in ((400, 1), (2000, 1), (600, 2)))],
    ids=lambda number: str(number),
)
def test_a_long_run_holds_no_more_at_its_end_than_when_it_was_warm(
    num_steps: int, world_size: int, tmp_path: Path
) -> None:
    for rank, readings in enumerate(readings_of(tmp_path, num_steps, world_size=world_size)):
        last = readings[-1]
        print(f"rank {rank} after {last.step} steps and {last.step // INTERVAL} saves: {last}; ", end="")
        print(f"resident memory grows by {100 * growth(readings):.3f} % in a thousand steps")
        assert len(readings) == num_steps // INTERVAL and last.step == num_steps - INTERVAL
        assert last.children == last.shared == 0 and last.descriptors > 5 and last.threads > 2
        assert list(growing(readings, warm=WARM, memory=num_steps >= 400)) == []


def after_each(leak: Callable[[], None]) -> None:
    """From now on, leak with each tenth step, as a save might."""
    take_step = megalith.train.take_step

    def leaking(job: Job, keeper: Keeper) -> StepDone:
        done = take_step(job, keeper)
        if done.step % INTERVAL == 0:
            leak()
        return done

    megalith.train.take_step = leaking


def leak_descriptor() -> None:
    os.open(os.devnull, os.O_RDONLY)


def leak_thread() -> None:
    threading.Thread(target=threading.Event().wait, daemon=True).start()


def leak_zombie() -> None:
    if os.fork() == 0:
        os._exit(0)


HOARD: list[mmap.mmap] = []


def leak_memory() -> None:
    """One and a half percent in a thousand steps, of what this process holds: the tests' own memory is in it."""
    size = resident_bytes() * INTERVAL * 15 // 1_000_000
    # Straight from the kernel: the allocator may have memory left from earlier tests.
    HOARD.append(mmap.mmap(-1, size))
    HOARD[-1].write(b"x" * size)


def leak_shared(folder: Path) -> Callable[[], None]:
    """Leave another entry in shared memory at each call, and its name in the folder."""

    def leak() -> None:
        descriptor, path = tempfile.mkstemp(dir="/dev/shm", prefix=f"{LEAKED}{os.getpid()}-")
        os.close(descriptor)
        with (folder / "left").open("a") as left:
            left.write(f"{path}\n")

    return leak


def test_leaks_of_all_kinds_are_seen_each_by_its_name(tmp_path: Path) -> None:
    """All in one run; with --slow each by itself."""

    def leak(rank: int) -> None:
        for a_leak in (leak_descriptor, leak_thread, leak_zombie, leak_shared(tmp_path), leak_memory):
            after_each(a_leak)

    try:
        (readings,) = readings_of(tmp_path, 400, leak=leak)
    finally:
        for path in (tmp_path / "left").read_text().splitlines():
            os.unlink(path)
    assert list(growing(readings, warm=WARM)) == [*COUNTED, "resident"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "leak"),
    [
        ("descriptors", leak_descriptor),
        ("threads", leak_thread),
        ("children", leak_zombie),
        ("resident", leak_memory),
    ],
)
def test_a_leak_of_one_kind_is_seen_and_none_else(name: str, leak: Callable[[], None], tmp_path: Path) -> None:
    (readings,) = readings_of(tmp_path, 400, leak=lambda rank: after_each(leak))
    assert list(growing(readings, warm=WARM)) == [name]


def made_up(resident: Callable[[int], float]) -> list[Reading]:
    return [Reading(step, 9, 3, 0, 0, int(resident(step))) for step in range(0, 1000, INTERVAL)]


def test_the_slope_is_that_of_a_steady_leak_and_no_jump_or_noise_moves_it_much() -> None:
    size = 300e6
    steady = made_up(lambda step: size + 3000 * step)
    assert slope(steady) == pytest.approx(3000) and growth(steady) == pytest.approx(0.01, rel=0.02)
    assert [*growing(made_up(lambda step: size + 3300 * step), warm=WARM)] == ["resident"]
    jump = made_up(lambda step: size + 8e6 * (step > 600) - 7e6 * (step > 200))
    assert slope(jump) == 0.0 and not list(growing(jump, warm=WARM))
    # A saw of a megabyte, as of caches that are emptied now and then.
    saw = made_up(lambda step: size + 1e6 * (step * 7 % 130) / 130)
    assert abs(growth(saw)) < 0.002
    both = made_up(lambda step: size + 1e6 * (step * 7 % 130) / 130 + 3600 * step)
    assert [*growing(both, warm=WARM)] == ["resident"]
    assert statistics.median(reading.resident for reading in saw) > size
