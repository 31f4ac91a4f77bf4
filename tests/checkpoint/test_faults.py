"""A save that is killed, or whose disk fails, at any operation: a whole checkpoint remains, and the next save works."""

import errno
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megalith.checkpoint import store
from megalith.checkpoint.directory import CheckpointError, step_name
from megalith.checkpoint.pieces import whole
from megalith.checkpoint.retention import delete_old
from megalith.checkpoint.store import save
from megalith.files import Disk
from megalith.ranks import Ranks
from tests.checkpoint.runs import load_newest, names_in, pieces_of, save_step, tensors_at
from tests.disks import HookedDisk, Moment, failing_disk, killing_disk, recording_disk
from tests.ranks import run_ranks, watch_ranks

Record = list[tuple[Moment, str, Path]]


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of syncs of a shared disk would take most of the time."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="megalith-test-") as folder:
        yield Path(folder)


def save_second(run_dir: Path, disk: Disk, rank: int = 0, world_size: int = 1) -> None:
    """A rank's part in saving step 2."""
    save(run_dir, 2, pieces_of(tensors_at(2), rank, world_size), {"consumed_samples": 16}, disk=disk)


def save_second_and_delete_old(run_dir: Path, disk: Disk) -> None:
    save_second(run_dir, disk)
    delete_old(Ranks(), run_dir, keep_last=1, disk=disk)


def moments_of(run_dir: Path, work: Callable[[Path, Disk], None]) -> Record:
    """All moments of the disk in a save that is not disturbed."""
    record: Record = []
    save_step(run_dir, 1)
    work(run_dir, recording_disk(record))
    return record


def different(count: int) -> list[int]:
    """Of that many moments of a disk those that differ: the one after an operation is that before the next."""
    return [*range(0, count, 2), count - 1]


def killed(run_dir: Path, work: Callable[[Path, Disk], None], moment: int) -> None:
    """Do the work in a process that is killed at that moment."""
    child = os.fork()
    if child == 0:
        try:
            work(run_dir, killing_disk(moment))
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("work", [save_second, save_second_and_delete_old])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, work: Callable[[Path, Disk], None]) -> None:
    record = moments_of(tmp_path / "undisturbed", work)
    assert len(record) > 40
    found = []
    for number in different(len(record)):
        run_dir = tmp_path / str(number)
        save_step(run_dir, 1)
        killed(run_dir, work, number)
        loaded = load_newest(run_dir)
        assert loaded is not None and not loaded.refused
        found.append(loaded.index.step)
        save_step(run_dir, 3)
        left = names_in(run_dir)
        assert {"step-0000003"} <= set(left) <= {"step-0000001", "step-0000002", "step-0000003"}
        shutil.rmtree(run_dir)
    committed = record.index(("after", "rename", tmp_path / "undisturbed" / "checkpoints" / "step-0000002"))
    assert found == [1 if number < committed else 2 for number in different(len(record))]


def test_two_ranks_of_which_one_is_killed_at_any_moment_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    world_size = 2
    save_step(tmp_path / "undisturbed", 1)
    counts = run_ranks(lambda rank: count_moments(tmp_path / "undisturbed", rank, world_size), world_size)
    found = set()
    for victim, count in enumerate(counts):
        assert count > 15
        for number in different(count):
            run_dir = tmp_path / f"{victim}-{number}"
            save_step(run_dir, 1)
            ends = watch_ranks(
                lambda rank, victim=victim, number=number, run_dir=run_dir: save_second(  # type: ignore[misc]
                    run_dir, killing_disk(number) if rank == victim else Disk(), rank, world_size
                ),
                world_size,
                timeout=20,
            )
            assert ends[victim].status == -signal.SIGKILL
            # The other noticed, or had done its part: it did not wait.
            assert ends[1 - victim].status in (0, 1)
            loaded = load_newest(run_dir)
            assert loaded is not None and not loaded.refused
            found.add(loaded.index.step)
            save_step(run_dir, 3)
            assert set(names_in(run_dir)) <= {"step-0000001", "step-0000002", "step-0000003"}
            shutil.rmtree(run_dir)
    assert found == {1, 2}


def count_moments(run_dir: Path, rank: int, world_size: int) -> int:
    record: Record = []
    save_second(run_dir, recording_disk(record), rank, world_size)
    return len(record)


def unsynced(record: Record, target: Path) -> tuple[set[Path], set[Path]]:
    """Files and directories with changes that were not synced: when target gets its name, and at the end.

    What is written but not synced may be gone after a power loss; so may a name in a directory that is not synced.
    """
    changed: set[Path] = set()
    at_commit: set[Path] = set()
    for moment, operation, path in record:
        if (moment, operation, path) == ("before", "rename", target):
            at_commit = set(changed)
        if moment == "before":
            continue
        if operation in ("create", "rename", "make_directory", "remove", "remove_directory"):
            changed.add(path.parent)
        if operation in ("create", "write"):
            changed.add(path)
        if operation == "sync":
            changed.discard(path)
    return at_commit, changed


def test_nothing_that_a_commit_relies_on_is_still_in_the_cache(tmp_path: Path) -> None:
    record = moments_of(tmp_path, save_second)
    at_commit, at_end = unsynced(record, tmp_path / "checkpoints" / "step-0000002")
    # The temporary directory's own name goes with the commit or is kept by it.
    assert at_commit == {tmp_path / "checkpoints"}
    assert at_end == set()


def test_a_save_that_does_not_sync_would_be_noticed(tmp_path: Path) -> None:
    class NoSync(HookedDisk):
        def sync(self, descriptor: int) -> None:
            pass

    record: Record = []
    save_second(tmp_path, NoSync(lambda moment, operation, path: record.append((moment, operation, path))))
    at_commit, at_end = unsynced(record, tmp_path / "checkpoints" / "step-0000002")
    assert any(path.name.startswith(".rank-00000.safetensors") for path in at_commit)
    assert tmp_path / "checkpoints" in at_end


@pytest.mark.parametrize("code, lasting", [(errno.ENOSPC, True), (errno.EIO, False), (errno.EROFS, False)])
def test_a_disk_that_fails_at_any_operation_costs_that_checkpoint_only(
    tmp_path: Path, code: int, lasting: bool
) -> None:
    operations = len(moments_of(tmp_path / "undisturbed", save_second)) // 2
    outcomes = set()
    for number in range(operations):
        run_dir = tmp_path / str(number)
        save_step(run_dir, 1)
        with pytest.raises(CheckpointError, match="step-0000002 was not written") as raised:
            save_second(run_dir, failing_disk(number, code, lasting=lasting))
        error = raised.value
        assert os.strerror(code) in str(error) and error.need == sum(t.numel() * 4 for t in tensors_at(2).values())
        assert error.free is not None and str(error.path) == str(run_dir / "checkpoints" / "step-0000002")
        loaded = load_newest(run_dir)
        assert loaded is not None and not loaded.refused
        outcomes.add(loaded.index.step)
        # The disk works again: so does saving, and what could not be removed goes.
        save_second(run_dir, Disk())
        assert names_in(run_dir) == ["step-0000001", "step-0000002"]
        shutil.rmtree(run_dir)
    # Step 2 where only the last sync failed: it is whole, but might not survive a power loss.
    assert outcomes == {1, 2}


def test_ranks_agree_that_a_save_failed_and_go_on_together(tmp_path: Path) -> None:
    world_size = 2
    save_step(tmp_path / "undisturbed", 1)
    counts = run_ranks(lambda rank: count_moments(tmp_path / "undisturbed", rank, world_size) // 2, world_size)
    save_step(tmp_path / "run", 1)

    def on_rank(rank: int) -> list[str]:
        said = []
        for victim in range(world_size):
            for number in range(counts[victim]):
                disk = failing_disk(number, errno.ENOSPC) if rank == victim else Disk()
                try:
                    save_second(tmp_path / "run", disk, rank, world_size)
                    said.append("saved")
                except CheckpointError as error:
                    said.append(f"{victim}: {error}")
                    left = names_in(tmp_path / "run")
                    assert not any(name.startswith(".tmp") for name in left), left
                # The commit's last sync fails after the checkpoint has its name: out of the way for the next.
                Ranks().gather(None)
                if rank == 0 and "step-0000002" in names_in(tmp_path / "run"):
                    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-0000002")
                Ranks().gather(None)
        save_second(tmp_path / "run", Disk(), rank, world_size)
        return said

    first, second = run_ranks(on_rank, world_size)
    assert first == second and len(first) == sum(counts)
    for sentence in first:
        assert f"rank {sentence[0]}: [Errno 28] No space left on device" in sentence
    loaded = load_newest(tmp_path / "run")
    assert loaded is not None and loaded.index.step == 2


def test_too_little_room_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    class FullDisk(Disk):
        def free_bytes(self, path: Path) -> int:
            return 10

    with pytest.raises(CheckpointError, match=r"No space left on device.*needs 792 bytes; 10 are free") as raised:
        save_second(tmp_path, FullDisk())
    assert (raised.value.need, raised.value.free) == (792, 10)
    assert names_in(tmp_path) == []


def test_a_disk_that_writes_a_byte_at_a_time_is_slow_and_right(tmp_path: Path) -> None:
    class Slow(Disk):
        def write(self, descriptor: int, data: memoryview) -> int:
            return super().write(descriptor, data[:7])

    save(tmp_path, 1, pieces_of(tensors_at(1)), {"consumed_samples": 8}, disk=Slow())
    assert load_newest(tmp_path) is not None


def test_a_missing_or_unusable_run_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "dangling"):
        with pytest.raises(CheckpointError, match=name):
            save(tmp_path / name, 1, {"w": whole(torch.zeros(1))}, {})


def test_a_save_straight_into_the_steps_directory_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = 0
    for number in range(0, 30, 3):
        run_dir = tmp_path / str(number)
        save_step(run_dir, 1)
        with monkeypatch.context() as patched:
            patched.setattr(store, "new_name", lambda kind, step: step_name(step))
            killed(run_dir, save_second, number)
        loaded = load_newest(run_dir)
        assert loaded is not None
        refused += bool(loaded.refused)
    assert refused > 5
