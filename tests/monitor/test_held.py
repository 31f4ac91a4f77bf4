"""A disk operation that never returns: named with rank, path and stack, and no rank waits for it for ever."""

import faulthandler
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megalith.files import Disk, write_whole
from megalith.launch import HUNG
from megalith.monitor.ledger import Ledger
from megalith.monitor.noted import Held, NotedDisk
from megalith.monitor.peers import this_process
from megalith.monitor.watch import Place, Watch
from tests.faults.cluster import Ended, run_ranks
from tests.faults.disk import Disturbance, Moment, Operation, Wire
from tests.layouts.runs import MODEL, steps_of
from tests.monitor.test_watch import at_step

HANG_TIMEOUT = 3.0
SECONDS_OF_STEP = 0.6
INTERVAL = 10  # steps, which take twice as long as an operation may


def start(folder: Path, data: Path, *words: str, disturb: Disturbance, world_size: int = 1) -> Ended:
    given = [*MODEL, "--data-path", str(data), "--save", str(folder / "run"), "--hang-timeout", str(HANG_TIMEOUT)]
    return run_ranks(["pretrain", *given, *words], world_size, folder, disturb=disturb, follow=1.0)


def write_into_a_full_pipe() -> None:
    """The kernel itself does not return from this."""
    _, writer = os.pipe()
    while True:
        os.write(writer, bytes(1 << 16))


def holding(name: str, rank: int, hold: Callable[[], None]) -> Disturbance:
    """Lets the first operation of that name on the rank's own file be held up, in the thread that saves."""

    def on_rank(number: int) -> None:
        met: list[Operation] = []

        def act(moment: Moment, operation: Operation) -> None:
            is_meant = (operation.lane, operation.name, moment) == ("save", name, "before") and not met
            if is_meant and f"rank-0000{rank}.safetensors" in operation.path:
                met.append(operation)
                hold()

        if number == rank:
            Wire(act).install()

    return on_rank


def test_a_writer_that_hangs_ends_the_job_with_rank_path_and_stack(data: Path, tmp_path: Path) -> None:
    words = ("--save-interval", "4", "--train-iters", "40")
    disturb = holding("write", 1, write_into_a_full_pipe)
    ended = start(tmp_path, data, *words, disturb=disturb, world_size=2)
    assert not ended.hung and HUNG in ended.statuses and set(ended.statuses) <= {HUNG, -9}, ended
    # The save of step 4 hangs; that of step 8 must wait for it.
    assert [step["step"] for step in steps_of(tmp_path / "run")][-1] <= 8
    assert re.search(r"rank 1 \(process \d+ on [^)]+\) made no progress for \S+ s at step 9 in checkpoint", ended.said)
    path = re.escape(f"{tmp_path}/run/checkpoints/.tmp-step-0000004.")
    named = rf"rank 1: the write of {path}\w{{8}}/\.rank-00001\.safetensors\.\w{{8}}\.tmp has not returned for (\S+) s"
    assert (found := re.search(named, ended.said)) and float(found[1]) >= HANG_TIMEOUT, ended.said
    assert "in write_into_a_full_pipe" in ended.said and "in write_shard" in ended.said
    assert "rank 0 (" not in ended.said and "Traceback" not in ended.said


@pytest.mark.slow
def test_steps_that_go_on_do_not_hide_it_and_end_where_they_must_wait(data: Path, tmp_path: Path) -> None:
    def disturb(rank: int) -> None:
        holding("sync", 0, write_into_a_full_pipe)(rank)
        for step in range(1, 3 * INTERVAL):
            at_step(lambda: time.sleep(SECONDS_OF_STEP), step=step)

    ended = start(tmp_path, data, "--save-interval", str(INTERVAL), "--train-iters", "900", disturb=disturb)
    assert ended.statuses == (HUNG,), ended
    assert steps_of(tmp_path / "run")[-1]["step"] == 2 * INTERVAL
    told = re.findall(
        r"at step (\d+): the sync of \S+rank-00000\S+ has not returned for (\S+) s \(limit 3 s", ended.said
    )
    assert len(told) == 1 and INTERVAL < int(told[0][0]) <= 2 * INTERVAL and float(told[0][1]) >= HANG_TIMEOUT
    assert "The steps go on until they must wait for it" in ended.said
    # What it took before the next save has to wait counts, so that does not wait as long again.
    (seconds,) = re.findall(r"made no progress for (\S+) s at step 21 in checkpoint", ended.said)
    assert float(seconds) >= 2 * HANG_TIMEOUT - 0.5, ended.said
    assert ended.said.count("in write_into_a_full_pipe") == 2


@pytest.mark.slow
def test_one_that_returns_late_but_before_a_step_must_wait_is_told_and_forgiven(data: Path, tmp_path: Path) -> None:
    def disturb(rank: int) -> None:
        holding("sync", 0, lambda: time.sleep(1.5 * HANG_TIMEOUT))(rank)
        for step in range(1, 2 * INTERVAL + 1):
            at_step(lambda: time.sleep(SECONDS_OF_STEP), step=step)

    words = ("--save-interval", str(INTERVAL), "--train-iters", str(2 * INTERVAL))
    ended = start(tmp_path, data, *words, disturb=disturb)
    assert ended.statuses == (0,), ended
    assert ended.said.count("The steps go on until they must wait for it") == 1


def test_a_training_has_no_process_of_its_own_that_could_hang(data: Path, tmp_path: Path) -> None:
    seen = tmp_path / "seen"

    def look() -> None:
        threads = list(Path("/proc/self/task").iterdir())
        children = [(thread / "children").read_text() for thread in threads]
        seen.write_text(f"{len(threads)} threads, children: {''.join(children)}")

    words = ("--save-interval", "2", "--train-iters", "4")
    assert start(tmp_path, data, *words, disturb=lambda rank: at_step(look, step=3)).statuses == (0,)
    assert re.fullmatch(r"[3-9] threads, children: ", seen.read_text()), seen.read_text()


@pytest.fixture
def watch() -> Iterator[Watch]:
    """A watch of one rank whose thread does not run: the test looks for it, a quarter of a second at a time."""
    yield Watch(0, (this_process(0),), None, hang_timeout=2.0, longest_tick=0.3)
    faulthandler.cancel_dump_traceback_later()


def look(watch: Watch, place: Callable[[int], Place], times: int) -> list[float]:
    """How long the rank has stood still, at each look."""
    stood = []
    for number in range(times):
        watch.follow(lambda number=number: place(number))  # type: ignore[misc]
        watch._look_at_self(0.25)
        stood.append(watch._idle)
    return stood


def test_an_operation_is_counted_from_look_to_look(watch: Watch, capfd: pytest.CaptureFixture[str]) -> None:
    held = Held(7, "write of /a/file")
    stood = look(watch, lambda number: Place(1 + number, number, "step", 2.0, held), 12)
    assert stood == [0.0] * 12
    assert capfd.readouterr().err.count("the write of /a/file has not returned for 2.0 s") == 1
    # Steps ask how the save is; whoever looks just then must not take that for waiting.
    stood = look(watch, lambda number: Place(100 + number, 50, "checkpoint", 2.0, held, True), 5)
    assert stood == [0.0] * 5
    stood = look(watch, lambda number: Place(200, 51, "checkpoint", 2.0, held, True), 4)
    assert stood[:3] == [0.0, 0.25, 4.75] and stood[3] == 5.0
    # Another operation begins anew, and so does a rank that goes on.
    stood = look(watch, lambda number: Place(201, 51, "checkpoint", 2.0, Held(8, "sync of /a/file"), True), 9)
    assert stood == [0.25 * number for number in range(9)]


def test_without_a_limit_nothing_is_said(watch: Watch, capfd: pytest.CaptureFixture[str]) -> None:
    stood = look(watch, lambda number: Place(1, 1, "checkpoint", 0.0, Held(7, "write of /a/file"), True), 30)
    assert max(stood) == 0.25 * 29 and capfd.readouterr().err == ""


def test_each_operation_is_a_move_and_is_known_while_it_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operations = [name for name in vars(Disk) if not name.startswith("_")]
    assert set(operations) <= set(vars(NotedDisk)), "an operation that is not noted"
    ledger = Ledger()
    disk = NotedDisk(ledger)
    seen: list[tuple[str, str, int]] = []

    def noting(name: str, original: Any) -> Any:
        def operation(disk: NotedDisk, *arguments: Any) -> Any:
            seen.append((name, disk.held.what if disk.held is not None else "", ledger.moves))
            return original(disk, *arguments)

        return operation

    for name in operations:
        monkeypatch.setattr(Disk, name, noting(name, getattr(Disk, name)))
    write_whole(tmp_path / "file", b"x", disk=disk)
    assert [name for name, _, _ in seen] == ["create", "write", "sync", "close", "rename", "open", "sync", "close"]
    assert all(what.startswith(f"{name} of {tmp_path}") for name, what, _ in seen), seen
    assert [moves for _, _, moves in seen] == [1 + 2 * number for number in range(8)]
    assert disk.held is None and ledger.moves == 16
    with pytest.raises(FileNotFoundError):
        disk.remove(tmp_path / "nothing")
    assert disk.held is None
