"""One owner: of all who start in a run directory one goes on, and a dead one's lease is taken over by a stated rule."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megalith.files import Disk
from megalith.monitor.peers import this_host, this_process
from megalith.owner import FILE_NAME, Entry, Lease, OwnedError
from tests.disks import killing_disk, recording_disk
from tests.layouts.runs import MODEL, configured, run_on, run_rank, steps_of, write_data
from tests.ranks import watch_ranks

SHARD = "rank-00000.safetensors"


def quiet(text: str) -> None:
    raise AssertionError(f"nobody was to be patient: {text}")


def forked(work: Callable[[], int]) -> int:
    """Do the work in a child, which ends with its status; give the child's number."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(work())
        finally:
            os._exit(99)
    return pid


def status_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def holder(run_dir: Path, ready: int) -> Callable[[], int]:
    """What a process does that takes the lease, says so, and keeps it until it is killed."""

    def work() -> int:
        Lease(run_dir).take(quiet)
        os.write(ready, b"!")
        time.sleep(60)
        return 0

    return work


def elsewhere(run_dir: Path, **changes: object) -> Entry:
    """Leave a lease of another host in the directory."""
    me = this_process(0)
    entry = Entry("other-host a-boot pid:[1]", 4711, 12345, "a token", 10.0, time.time() - 7200.0)
    entry = replace(entry, **changes)  # type: ignore[arg-type]
    assert entry.host != me.host or entry.pid != me.pid
    (run_dir / FILE_NAME).write_text(json.dumps(asdict(entry)))
    return entry


def test_the_second_is_refused_by_host_process_and_age_and_the_dead_ones_lease_is_taken_over_at_once(
    tmp_path: Path,
) -> None:
    reading, writing = os.pipe()
    first = forked(holder(tmp_path, writing))
    assert os.read(reading, 1) == b"!"
    with pytest.raises(OwnedError) as refused:
        Lease(tmp_path).take(quiet)
    name = this_host().split()[0]
    assert f"another job writes there, process {first} on host {name}, for " in str(refused.value)
    os.kill(first, signal.SIGKILL)
    status_of(first)
    began = time.monotonic()
    with Lease(tmp_path) as lease:
        lease.take(quiet)
        assert Entry.parsed((tmp_path / FILE_NAME).read_bytes()).pid == os.getpid()  # type: ignore[union-attr]
    assert time.monotonic() - began < 2.0
    assert list(tmp_path.iterdir()) == []
    os.close(reading)
    os.close(writing)


def sleeper() -> int:
    time.sleep(60)
    return 0


def test_a_zombie_is_dead_and_a_process_number_that_is_used_again_too(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    first = forked(holder(tmp_path, writing))
    assert os.read(reading, 1) == b"!"
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)  # dead, and not yet buried
    with Lease(tmp_path) as lease:
        lease.take(quiet)
    status_of(first)
    # The number of a process that lives, of which another start is known.
    living = forked(sleeper)
    try:
        elsewhere(tmp_path, host=this_host(), pid=living, started=1)
        with Lease(tmp_path) as lease:
            lease.take(quiet)
    finally:
        os.kill(living, signal.SIGKILL)
        status_of(living)


def test_of_many_who_start_at_once_exactly_one_wins(tmp_path: Path) -> None:
    for attempt in range(5):
        run_dir = tmp_path / str(attempt)
        run_dir.mkdir()
        if attempt % 2:  # of a dead process of this host
            elsewhere(run_dir, host=this_host(), pid=2**22 - 1)
        go_reading, go_writing = os.pipe()
        done_reading, done_writing = os.pipe()

        def work(run_dir: Path = run_dir, go: int = go_reading, done: int = done_reading) -> int:
            os.read(go, 1)
            try:
                Lease(run_dir).take(quiet)
            except OwnedError:
                return 3
            # The owner lives until all have looked.
            os.read(done, 1)
            return 0

        pids = [forked(work) for _ in range(8)]
        os.write(go_writing, b"x" * 8)
        refused: set[int] = set()
        deadline = time.monotonic() + 30
        while len(refused) < 7 and time.monotonic() < deadline:
            for pid in set(pids) - refused:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    assert os.waitstatus_to_exitcode(status) == 3
                    refused.add(pid)
            time.sleep(0.01)
        assert len(refused) == 7
        (winner,) = set(pids) - refused
        assert Entry.parsed((run_dir / FILE_NAME).read_bytes()).pid == winner  # type: ignore[union-attr]
        os.write(done_writing, b"x")
        assert status_of(winner) == 0
        for descriptor in (go_reading, go_writing, done_reading, done_writing):
            os.close(descriptor)


def test_another_hosts_lease_is_taken_over_once_its_heart_has_stood_still(tmp_path: Path) -> None:
    elsewhere(tmp_path)
    said: list[str] = []
    with Lease(tmp_path, without_beat=1.5) as lease:
        began = time.monotonic()
        lease.take(said.append)
        assert 1.5 <= time.monotonic() - began < 10.0
    (text,) = said
    assert "is held by process 4711 on host other-host, for 2.0 h" in text and "watched for 1.5 s" in text


def test_another_hosts_job_whose_heart_beats_is_not_disturbed(tmp_path: Path) -> None:
    entry = elsewhere(tmp_path)

    def beat() -> int:
        for number in range(1, 200):
            time.sleep(0.3)
            (tmp_path / "next").write_text(json.dumps(asdict(replace(entry, beat=number))))
            os.rename(tmp_path / "next", tmp_path / FILE_NAME)
        return 0

    pid = forked(beat)
    try:
        with pytest.raises(OwnedError, match="process 4711 on host other-host"):
            Lease(tmp_path, without_beat=30.0).take(lambda text: None)
    finally:
        os.kill(pid, signal.SIGKILL)
        status_of(pid)


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"pid": -1}', b"\xff" * 100, b"[" * 4000], ids=str)
def test_a_lease_that_cannot_be_read_is_watched_too(text: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(text)
    said: list[str] = []
    with Lease(tmp_path, without_beat=0.2) as lease:
        lease.take(said.append)
    assert "cannot be read" in said[0]


def test_no_calendar_makes_a_living_job_look_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    first = forked(holder(tmp_path, writing))
    assert os.read(reading, 1) == b"!"
    real = time.time
    for days in (-1, 1, 365):
        monkeypatch.setattr(time, "time", lambda days=days: real() + 86400 * days)
        with pytest.raises(OwnedError, match=r"for \d+ s\."):
            Lease(tmp_path).take(quiet)
    os.utime(tmp_path / FILE_NAME, (0, 0))
    with pytest.raises(OwnedError):
        Lease(tmp_path).take(quiet)
    os.kill(first, signal.SIGKILL)
    status_of(first)
    os.close(reading)
    os.close(writing)


def test_the_heart_beats_and_an_owner_that_was_taken_for_dead_writes_nothing_more(tmp_path: Path) -> None:
    lease = Lease(tmp_path, between_beats=0.05)
    lease.take(quiet)
    deadline = time.monotonic() + 20
    while json.loads((tmp_path / FILE_NAME).read_text())["beat"] < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lease.check()
    with Lease(tmp_path)._locked():  # as whoever takes a lease over: between a look and a writing nobody else writes
        other = elsewhere(tmp_path)
    while not lease.lost:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(OwnedError, match="has taken this directory over, process 4711 on host other-host"):
        lease.check()
    lease.give_back()
    assert Entry.parsed((tmp_path / FILE_NAME).read_bytes()) == other  # and does not remove what is not its own


def test_killed_at_every_operation_the_next_takes_over_at_once_and_nothing_is_left(tmp_path: Path) -> None:
    record: list[tuple[str, str, Path]] = []
    with Lease(tmp_path / "counted", disk=recording_disk(record)) as lease:  # type: ignore[arg-type]
        lease.take(quiet)
    assert len(record) > 20
    for number in range(len(record)):
        run_dir = tmp_path / str(number)

        def work(run_dir: Path = run_dir, number: int = number) -> int:
            with Lease(run_dir, disk=killing_disk(number)) as lease:
                lease.take(quiet)
            return 0

        assert status_of(forked(work)) == -signal.SIGKILL
        with Lease(run_dir) as lease:
            lease.take(quiet)
            assert [path.name for path in run_dir.iterdir()] == [FILE_NAME]
        assert list(run_dir.iterdir()) == []
    print(f"killed at {len(record)} of {len(record)} moments of taking a lease and giving it back")


def test_without_locks_the_one_who_wrote_last_wins(tmp_path: Path) -> None:
    class NoLocks(Disk):
        def lock(self, descriptor: int) -> None:
            raise OSError(95, "Operation not supported")

    class Interrupted(NoLocks):
        """Another job writes its lease between this one's look and its own writing."""

        def rename(self, source: Path, target: Path) -> None:
            super().rename(source, target)
            elsewhere(tmp_path)

    with pytest.raises(OwnedError, match="taken this directory over, process 4711"):
        Lease(tmp_path, disk=Interrupted()).take(quiet)
    (tmp_path / FILE_NAME).unlink()
    with Lease(tmp_path, disk=NoLocks()) as lease:
        lease.take(quiet)


def test_a_link_in_the_leases_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / FILE_NAME).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        Lease(tmp_path).take(quiet)
    assert (tmp_path / "precious").read_text() == "mine"


REMAINS = (
    *(f"checkpoints/.del-step-0000002.0123abcd/{name}" for name in ("index.json", SHARD)),
    *(f"checkpoints/.tmp-step-0000002.4567cdef/{name}" for name in ("index.json", SHARD)),
    f"checkpoints/.tmp-step-0000004.89abcdef/.{SHARD}.01234567.tmp",
    "checkpoints/.tmp-step-0000000.89abcdef/.index.json.01234567.tmp",
    *(f".{name}.01234567.tmp" for name in ("lease.json", "ledger.json", "run.toml")),
    "tokenizer/.vocabulary.json.01234567.tmp",
)
OTHERS = (
    *(
        "checkpoints/.del-step-0000001.00000000/precious",
        "checkpoints/.tmp-notes/index.json",
        "checkpoints/.del-step-1",
    ),
    *(".run.toml.swp", ".notes.01234567.tmp", "tokenizer/.vocabulary.json.swp"),
)


def leave_remains(save: Path) -> None:
    """What kills leave behind, and what others have put beside it."""
    for name in (*REMAINS, *OTHERS):
        (save / name).parent.mkdir(parents=True, exist_ok=True)
        (save / name).write_text("half of it")


def left_of(save: Path, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if (save / name).exists()]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_start_removes_what_a_kill_has_left_also_of_a_run_that_is_finished(world_size: int, tmp_path: Path) -> None:
    data, save = write_data(tmp_path), tmp_path / "run"
    for words in (["--exit-interval", "2"], [], ["--save-interval", "9"]):  # new; going on, one save; finished
        leave_remains(save)
        num_taken = len(steps_of(save)) if (save / "log.jsonl").exists() else 0
        assert run_on(world_size, ["--train-iters", "4", "--eval-iters", "0", *words], save, data) == 0
        assert left_of(save, REMAINS) == [] and left_of(save, OTHERS) == list(OTHERS)
    assert num_taken == 4


def test_what_a_living_job_is_writing_is_not_removed_by_a_start_that_is_refused(tmp_path: Path) -> None:
    data, save = write_data(tmp_path), tmp_path / "run"
    leave_remains(save)
    reading, writing = os.pipe()
    first = forked(holder(save, writing))
    assert os.read(reading, 1) == b"!"
    leave_remains(save)
    (end,) = watch_ranks(
        lambda rank: run_rank(
            rank,
            world_size=1,
            words=[*MODEL, "--data-path", str(data), "--save", str(save), "--train-iters", "4"],
            before=None,
        ),
        1,
    )
    assert "OwnedError" in end.error
    assert left_of(save, REMAINS) == list(REMAINS)
    os.kill(first, signal.SIGKILL)
    status_of(first)
    os.close(reading)
    os.close(writing)


def test_two_jobs_in_one_run_directory_one_goes_on(tmp_path: Path) -> None:
    data, save = write_data(tmp_path), tmp_path / "run"
    words = ["pretrain", *MODEL, "--data-path", str(data), "--save", str(save), "--train-iters", "4"]
    reading, writing = os.pipe()
    save.mkdir()
    first = forked(holder(save, writing))
    assert os.read(reading, 1) == b"!"
    program = f"import sys; from megalith.cli import main; sys.exit(main({words!r}))"
    refused = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert f"another job writes there, process {first} on host" in line
    assert [path.name for path in save.iterdir()] == [FILE_NAME]

    # Two ranks: rank 0 speaks, the other ends alike.
    def on_rank(rank: int) -> None:
        from megalith.train import train

        train(configured(rank, 2, words[1:]), started=0.0)

    one, two = watch_ranks(on_rank, 2)
    assert "OwnedError" in one.error and "ConfigError" in two.error
    os.kill(first, signal.SIGKILL)
    status_of(first)
    assert run_on(1, ["--train-iters", "4"], save, data) == 0
    assert len(steps_of(save)) == 4 and not (save / FILE_NAME).exists()
    os.close(reading)
    os.close(writing)
