"""A hung or dead rank ends the job in a bounded time, named with rank, phase and stack; whole runs on forked ranks."""

import ctypes
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import megalith.derived
import megalith.train
from megalith.checkpoint.directory import list_checkpoints
from megalith.checkpoint.verify import verify
from megalith.config import Run
from megalith.data import index_cache, index_maps
from megalith.data.causal import CausalBatches
from megalith.job import Job
from megalith.keeper import Keeper
from megalith.launch import HUNG, PEER_LOST
from megalith.monitor.board import ROW_BYTES, Beat, MemoryBoard
from megalith.monitor.events import StepDone
from megalith.monitor.peers import Peer, this_host, this_process
from megalith.monitor.watch import SECONDS_TO_UNWIND, Watch, find_guilty, is_stuck, waits_for_others
from tests.faults.cluster import Ended, run_ranks
from tests.faults.disk import slow
from tests.layouts.runs import MODEL, run_on, steps_of
from tests.test_train import assert_same

HANG_TIMEOUT = 2.0
STEP = 3  # in which it happens; the first step may take longer


def at_step(act: Callable[[], None], *, step: int = STEP) -> None:
    """From now on, call a function as that step begins."""
    take_step = megalith.train.take_step

    def acting(job: Job, keeper: Keeper) -> StepDone:
        if job.progress.step + 1 == step:
            act()
        return take_step(job, keeper)

    megalith.train.take_step = acting


def hang_asleep() -> None:
    time.sleep(60)


def hang_with_the_lock() -> None:
    ctypes.PyDLL(None).sleep(60)


def hang_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def start(
    folder: Path, data: Path, *words: str, disturb: Callable[[int], None], world_size: int = 2, save: str = "run"
) -> Ended:
    given = [*MODEL, "--data-path", str(data), "--save", str(folder / save), "--train-iters", "12", *words]
    return run_ranks(["pretrain", *given], world_size, folder, disturb=disturb, follow=1.0)


@pytest.mark.parametrize("hang", [hang_asleep, hang_with_the_lock, hang_stopped])
def test_a_hung_rank_is_named_with_phase_and_stack_at_the_timeout(
    hang: Callable[[], None], data: Path, tmp_path: Path
) -> None:
    at = tmp_path / "at"

    def hang_noted() -> None:
        time.sleep(0.5)  # for the watch to have seen this step
        at.write_text(str(time.monotonic()))
        hang()

    def disturb(rank: int) -> None:
        if rank == 1:
            at_step(hang_noted)

    ended = start(tmp_path, data, "--hang-timeout", str(HANG_TIMEOUT), disturb=disturb)
    seconds = time.monotonic() - float(at.read_text())
    print(f"{hang.__name__}: the job ended {seconds:.2f} s after it, limit {HANG_TIMEOUT} s (goal: limit + 1 s)")
    assert not ended.hung and HUNG in ended.statuses, ended
    # The last progress was up to half a second before, when the step began; and the machine may be busy.
    assert HANG_TIMEOUT - 0.8 <= seconds < HANG_TIMEOUT + 8.0
    named = re.search(r"rank 1 \(process \d+ on [^)]+\) made no progress for (\S+) s.* at step 3 in step", ended.said)
    assert named and float(named[1]) >= HANG_TIMEOUT / 2, ended.said
    assert "rank 0 (" not in ended.said
    if hang is hang_stopped:  # and is let go on for a moment, to say where it is
        assert "a signal has stopped it" in ended.said
        # The main thread comes last; it runs while its frames are read, so that only a few may be shown.
        assert re.search(r'megalith/\S+\.py", line \d+ in \w+', ended.said.split("hread 0x")[-1]), ended.said
        return
    assert f"line {hang.__code__.co_firstlineno + 1} in {hang.__name__}" in ended.said, ended.said


def test_a_hung_rank_of_a_measurement_is_named_too(tmp_path: Path) -> None:
    def disturb(rank: int) -> None:
        if rank == 1:
            at_step(hang_asleep)

    model = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --micro-batch-size 1".split()
    words = ["bench", *model, "--vocab-size", "64", "--device", "cpu", "--hang-timeout", str(HANG_TIMEOUT)]
    ended = run_ranks(words, 2, tmp_path, disturb=disturb, follow=1.0)
    assert not ended.hung and HUNG in ended.statuses, ended
    assert re.search(r"rank 1 \(process \d+ on [^)]+\) made no progress for \S+ s.* at step 3 in step", ended.said), (
        ended.said
    )
    assert f"in {hang_asleep.__name__}" in ended.said, ended.said


def test_a_hung_data_thread_is_named_with_phase_and_stack(data: Path, tmp_path: Path) -> None:
    def disturb(rank: int) -> None:
        read = CausalBatches.read

        def hanging(source: CausalBatches, indices: Any, samples: Any) -> Any:
            if rank == 1 and samples[0] >= 8 * STEP:
                hang_asleep()
            return read(source, indices, samples)

        setattr(CausalBatches, "read", hanging)  # noqa: B010 - mypy forbids to assign a method

    ended = start(tmp_path, data, "--hang-timeout", str(HANG_TIMEOUT), disturb=disturb)
    assert not ended.hung and HUNG in ended.statuses, ended
    assert re.search(r"rank 1 \(.*made no progress for \S+ s at step \d+ in data \(batch-generator\)", ended.said)
    assert "in hang_asleep" in ended.said and "rank 0 (" not in ended.said


@pytest.mark.parametrize("hang", [hang_asleep, hang_with_the_lock])
def test_a_single_rank_that_hangs_ends_too(hang: Callable[[], None], data: Path, tmp_path: Path) -> None:
    def hang_seen() -> None:
        time.sleep(0.5)  # for the watch to have seen this step
        hang()

    words = ("--hang-timeout", str(HANG_TIMEOUT))
    ended = start(tmp_path, data, *words, disturb=lambda rank: at_step(hang_seen), world_size=1)
    assert not ended.hung and ended.statuses[0] in (HUNG, 1)
    assert f"in {hang.__name__}" in ended.said


@pytest.mark.slow
def test_a_slow_disk_is_no_hang(data: Path, tmp_path: Path) -> None:
    # Each operation takes a tenth of the time that a rank may stand still, a save more than all of it.
    words = ("--hang-timeout", "1.5", "--save-interval", "4", "--train-iters", "4")
    ended = start(tmp_path, data, *words, disturb=slow(0.15))
    assert ended.statuses == (0, 0), ended
    assert len(steps_of(tmp_path / "run")) == 4


@pytest.mark.slow
def test_building_index_maps_for_longer_than_a_start_may_stand_still_is_no_hang(data: Path, tmp_path: Path) -> None:
    done = tmp_path / "done"

    def disturb(rank: int) -> None:
        # Each array takes less than the limit of the start, all of them twice as much.
        megalith.derived.START_SECONDS = 5.0
        real = index_maps.make_arrays

        def slowly(*arguments: Any, **named: Any) -> Iterator[tuple[str, Any]]:
            for name, array in real(*arguments, **named):
                time.sleep(0.0 if done.exists() else 3.4)
                yield name, array
            done.touch()

        setattr(index_cache, "make_arrays", slowly)  # noqa: B010 - mypy forbids to assign a function

    words = ("--hang-timeout", "2", "--train-iters", "3", "--data-cache-path", str(tmp_path / "cache"))
    ended = start(tmp_path, data, *words, disturb=disturb)
    assert ended.statuses == (0, 0), ended
    assert len(steps_of(tmp_path / "run")) == 3


def assert_death_of_the_first_is_told(ended: Ended) -> None:
    assert ended.statuses[0] == -signal.SIGKILL and ended.statuses[1] in (PEER_LOST, -signal.SIGKILL)
    if ended.statuses[1] == PEER_LOST:
        assert re.search(r"rank 1 ends: rank 0 \(process \d+ on [^)]+\) has died", ended.said)
    assert "Traceback" not in ended.said


def test_a_rank_that_dies_ends_the_others_who_name_it(data: Path, tmp_path: Path) -> None:
    at = tmp_path / "at"

    def die() -> None:
        at.write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)

    def disturb(rank: int) -> None:
        if rank == 0:
            at_step(die)

    ended = start(tmp_path, data, disturb=disturb)
    seconds = time.monotonic() - float(at.read_text())
    print(f"the job was down {seconds:.2f} s after a rank's death (goal 2 s)")
    assert_death_of_the_first_is_told(ended)
    assert seconds < 8.0


def test_a_rank_that_fails_is_named_and_those_that_end_for_it_are_not(tmp_path: Path) -> None:
    ranks = [Peer(rank, 1, this_host(), 0) for rank in range(8)]
    left = Beat(left=True, failed=True)
    rows = dict(enumerate([Beat(), replace(left, follows=True), left, *[replace(left, follows=True)] * 5]))

    def watch_of(rows: dict[int, Beat]) -> str:
        board = MemoryBoard(str(tmp_path / "board"), 0, len(ranks))
        with closing(board):
            watch = Watch(0, ranks, board, hang_timeout=1.0, longest_tick=0.3)
            return watch.lost(rows)

    (tmp_path / "board").touch()
    by_rank_2 = f"{ranks[2]} failed: what it printed says why"
    assert watch_of(rows) == by_rank_2
    # Whose error it was is not seen from everywhere.
    assert watch_of({1: rows[1]}) == f"{ranks[1]} failed: what it printed says why"
    several = watch_of(dict.fromkeys(range(1, 8), left))
    assert several.count("failed") == 4 and several.endswith("; and 3 more") and by_rank_2 in several


class SlowBoard:
    """A board whose rows are read when the test says so."""

    reads_all = True

    def __init__(self) -> None:
        self.rows: dict[int, bytes] = {}
        self.at = time.monotonic()
        self.asked = 0

    def write(self, row: bytes) -> None: ...
    def close(self) -> None: ...
    def read(self) -> dict[int, bytes]:
        return self.rows

    def read_at(self) -> float:
        return self.at

    def refresh(self) -> None:
        self.asked += 1

    def seconds_unanswered(self) -> float:
        return 0.0

    def claim(self) -> bool:
        return True


@pytest.mark.parametrize("left", [True, False])
def test_a_rank_that_is_gone_has_died_only_if_its_last_word_says_nothing_else(left: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        ended = Peer(1, process.pid, this_host(), 1)
    board = SlowBoard()
    board.rows = {1: Beat(beats=7).to_row()}
    watch = Watch(0, [this_process(0), ended], board, hang_timeout=1.0, longest_tick=0.3)
    # Its last word, which it gave before it ended, has not been read yet.
    assert watch.lost() == "" and board.asked == 1
    board.rows, board.at = {1: Beat(beats=8, left=left).to_row()}, time.monotonic()
    assert watch.lost() == ("" if left else f"{ended} has died")


def test_a_rank_whose_last_word_nobody_can_read_has_died_after_a_while() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        ended = Peer(1, process.pid, this_host(), 1)
    board = SlowBoard()
    watch = Watch(0, [this_process(0), ended], board, hang_timeout=1.0, longest_tick=0.3)
    began = time.monotonic()
    while not watch.lost():
        assert time.monotonic() - began < 30
        time.sleep(0.01)
    assert time.monotonic() - began >= SECONDS_TO_UNWIND


def test_a_rank_that_dies_while_settings_are_compared_ends_the_others_who_name_it(data: Path, tmp_path: Path) -> None:
    def die(run: Run) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def disturb(rank: int) -> None:
        if rank == 0:
            setattr(megalith.train, "require_same_settings", die)  # noqa: B010 - mypy knows of no such name

    ended = start(tmp_path, data, disturb=disturb)
    assert_death_of_the_first_is_told(ended)


@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        (signal.SIGUSR1, (1,)),
        (signal.SIGTERM, (0, 1)),
        pytest.param(signal.SIGTERM, (1,), marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, (1,), marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, (0, 1), marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, (0, 1), marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_rank_or_all_finishes_the_step_saves_and_ends_with_75(
    number: signal.Signals, ranks: tuple[int, ...], data: Path, tmp_path: Path
) -> None:
    def disturb(rank: int) -> None:
        if rank in ranks:
            at_step(lambda: os.kill(os.getpid(), number))

    ended = start(tmp_path, data, disturb=disturb)
    assert ended.statuses == (75, 75), ended
    assert [step["step"] for step in steps_of(tmp_path / "run")] == [1, 2, 3]
    assert [found.step for found in list_checkpoints(tmp_path / "run")] == [3]
    if number is signal.SIGUSR1 and len(ranks) == 1:
        ended = start(tmp_path, data, disturb=lambda rank: None)
        assert ended.statuses == (0, 0)
        assert run_on(2, ["--train-iters", "12"], tmp_path / "undisturbed", data) == 0
        assert_same(tmp_path / "run", tmp_path / "undisturbed")


def test_a_second_signal_stops_at_once_with_the_last_commit_intact(data: Path, tmp_path: Path) -> None:
    def ask_twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.2)  # what comes sooner is the same request
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the process goes on")

    def disturb(rank: int) -> None:
        at_step(ask_twice, step=7)

    ended = start(tmp_path, data, "--save-interval", "4", disturb=disturb)
    assert 128 + signal.SIGTERM in ended.statuses and "AssertionError" not in ended.said, ended
    (found,) = list_checkpoints(tmp_path / "run")
    assert found.step == 4 and verify(found.path).step == 4


def test_a_signal_without_save_ends_with_76(data: Path, tmp_path: Path) -> None:
    words = [*MODEL, "--data-path", str(data), "--train-iters", "12"]
    del words[words.index("--save-interval") : words.index("--save-interval") + 2]
    disturb = lambda rank: at_step(lambda: os.kill(os.getpid(), signal.SIGTERM))  # noqa: E731
    assert run_ranks(["pretrain", *words], 1, tmp_path, disturb=disturb).statuses == (76,)


def test_who_holds_up_the_others_is_found() -> None:
    still = Beat(step=5, moves=40, idle=9.0, limit=10.0)
    waiting = Beat(step=5, moves=41, idle=10.0, limit=10.0, waits=True)
    working = Beat(step=5, moves=42, idle=0.1, limit=10.0)
    assert find_guilty({0: waiting, 1: still, 2: waiting}) == [1]
    assert find_guilty({0: waiting, 1: working, 2: waiting}) == [0, 2]  # all wait: those who have come least far
    assert is_stuck({0: waiting, 1: replace(still, idle=10.0)})
    assert not is_stuck({0: waiting, 1: working}) and not is_stuck({0: still, 1: working})  # a slow disk, say
    assert is_stuck({0: waiting, 1: waiting})
    behind = Beat(step=4, moves=39, idle=9.5, limit=10.0, waits=True)
    assert find_guilty({0: waiting, 1: behind}) == [1]


def test_looking_at_what_the_main_thread_does_keeps_nothing_of_what_it_has_at_hand() -> None:
    class Activation:
        pass

    def work() -> "weakref.ref[Activation]":
        at_hand = Activation()
        watching = threading.Thread(target=waits_for_others, args=[threading.main_thread().ident])
        watching.start()
        watching.join()
        return weakref.ref(at_hand)

    gc.disable()
    try:
        assert work()() is None
    finally:
        gc.enable()


def test_a_row_that_is_being_written_is_not_read() -> None:
    memory = os.memfd_create("board")
    boards = [MemoryBoard(f"/proc/self/fd/{memory}", rank, 2) for rank in range(2)]
    os.close(memory)
    beat = Beat(beats=3, moves=2, step=7, phase="x" * 500, guilty=tuple(range(1000, 1100)))
    assert len(beat.to_row()) <= ROW_BYTES
    boards[0].write(beat.to_row())
    read = Beat.from_row(boards[1].read()[0])
    assert read is not None and (read.beats, read.step, read.phase) == (3, 7, "x" * 60)
    assert Beat.from_row(boards[1].read()[1]) is None
    boards[0].write(beat.to_row()[:100])
    assert Beat.from_row(boards[1].read()[0]) is None
    for board in boards:
        board.close()
