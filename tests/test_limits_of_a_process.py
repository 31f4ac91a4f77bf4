"""What the kernel itself refuses a run: descriptors, names that are too long, directories that it may not write to."""

import errno
import os
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megalith.monitor.peers import Peer, this_process
from tests.disturbed import start_run
from tests.faults.cluster import Ended
from tests.layouts.runs import steps_of
from tests.processes import give_up_privileges, permissions_hold
from tests.test_cli import megalith
from tests.test_disk_faults import each_step, saved_steps, warned
from tests.test_train import assert_same

STEPS = 10
NOT_SEEN = "which there are before it cannot be seen (Too many open files)"
LONGEST_PATH = 4095  # bytes, without the zero at its end


start = partial(start_run, num_steps=STEPS)


def from_step_to_step(first: int, last: int, break_it: Callable[[], None], repair: Callable[[], None]) -> None:
    """Break something as the first step begins, and repair it after the last."""

    def act(step: int) -> None:
        if step == first:
            break_it()
        if step == last + 1:
            repair()

    each_step(act)


def assert_recovered(ended: Ended, folder: Path, sentence: str, before: str) -> None:
    """The saves of steps 4 and 6 were lost and told, and those after were not. before: what is told of earlier ones."""
    assert set(ended.statuses) == {0} and not ended.raised and not ended.said, ended
    told = [text for text in warned(folder) if "was not written" in text]
    assert len(told) == 2 and all(sentence in text for text in told), told
    for step, text in zip((4, 6), told, strict=True):
        assert f"{folder}/run/checkpoints/step-{step:07d} was not written: rank" in text
        assert f"; {before}. " in text and "The run goes on; the next checkpoint is tried" in text
    assert saved_steps(folder) == [2, 8, 10]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_process_without_descriptors_goes_on_and_saves_again_when_it_has_some(
    world_size: int, data: Path, whole: Path, tmp_path: Path
) -> None:
    """Two ranks: that one cannot open what tells whether the other lives does not mean that it is dead."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def use_up() -> None:
        free = os.dup(2)  # the lowest that is free
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        with pytest.raises(OSError, match="Too many open files"):
            os.open("/dev/null", os.O_RDONLY)

    def disturb(rank: int) -> None:
        if rank == world_size - 1:
            from_step_to_step(3, 6, use_up, lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits))

    ended = start(tmp_path, data, disturb=disturb, world_size=world_size)
    # Of two ranks the first looks, which has descriptors.
    before = NOT_SEEN if world_size == 1 else "the newest before is of step 2"
    assert_recovered(ended, tmp_path, "[Errno 24] Too many open files: ", before)
    if world_size == 1:
        assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.EACCES])
def test_a_peer_that_cannot_be_looked_at_is_not_gone(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = this_process(0)
    assert not peer.is_gone and Peer(1, 2**22 + 1, peer.host, peer.started).is_gone

    def fails(path: Any, *how: Any, **named: Any) -> Any:
        if str(path).startswith(f"/proc/{peer.pid}/"):
            raise OSError(code, os.strerror(code), path)
        return open(path, *how, **named)

    monkeypatch.setattr("megalith.monitor.peers.open", fails, raising=False)
    assert not peer.is_gone and not peer.is_stopped


def folder_of_length(folder: Path, length: int) -> Path:
    """A path of that many bytes below a folder; its parents exist."""
    while length - len(str(folder)) > 220:
        folder = folder / ("d" * 200)
        folder.mkdir()
    return folder / ("e" * (length - len(str(folder)) - 1))


# What the longest name of a save adds to that of the run directory: the temporary name of a shard.
ADDED = len("/checkpoints/.tmp-step-0000000.01234567/.rank-00000.safetensors.01234567.tmp")


@pytest.mark.parametrize("too_long_by", [1, 12, 60, 2000])
def test_a_path_that_is_too_long_for_a_shard_is_refused_before_the_first_step(
    too_long_by: int, data: Path, tmp_path: Path
) -> None:
    length = min(LONGEST_PATH - ADDED + too_long_by, LONGEST_PATH + 400)
    save = folder_of_length(tmp_path, min(length, LONGEST_PATH - 20))
    save = save if length < LONGEST_PATH - 20 else save / ("f" * 200) / ("f" * 200)
    ended = start(tmp_path, data, "--save", str(save))
    assert ended.statuses == (2,) and not ended.raised, ended
    (line,) = ended.said.splitlines()
    assert line.startswith(f"megalith: --save = {save}: ") and "hoose another directory" in line
    assert "[Errno 36] File name too long: " in line


def test_the_longest_path_that_a_run_accepts_is_long_enough_for_it(data: Path, whole: Path, tmp_path: Path) -> None:
    save = folder_of_length(tmp_path, LONGEST_PATH - ADDED)
    ended = start(tmp_path, data, "--save", str(save))
    assert ended.statuses == (0,) and not ended.said, ended
    os.rename(save, tmp_path / "run")
    assert saved_steps(tmp_path) == [2, 4, 6, 8, 10]
    assert not any("written" in text for text in warned(tmp_path)), warned(tmp_path)
    assert_same(tmp_path / "run", whole)


def test_a_name_that_is_too_long_is_refused(data: Path, tmp_path: Path) -> None:
    ended = start(tmp_path, data, "--save", str(tmp_path / ("n" * 256)))
    assert ended.statuses == (2,) and "[Errno 36] File name too long: " in ended.said and "--save = " in ended.said


@pytest.fixture
def unprivileged(tmp_path: Path) -> Callable[[], None]:
    """What a rank calls to be stopped by permissions, whoever runs the tests."""
    (tmp_path / "trial").mkdir()
    if not permissions_hold(tmp_path / "trial"):
        pytest.skip("permissions stop no process here, not even one without capabilities")
    return give_up_privileges


def test_a_directory_without_permission_is_refused_before_the_first_step(
    unprivileged: Callable[[], None], data: Path, tmp_path: Path
) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0o555)
    save = tmp_path / "closed" / "run"
    ended = start(tmp_path, data, "--save", str(save), disturb=lambda rank: unprivileged())
    assert ended.statuses == (2,) and not ended.raised, ended
    (line,) = ended.said.splitlines()
    assert line.startswith(f"megalith: --save = {save}: ") and f"[Errno 13] Permission denied: '{save}'" in line
    assert line.endswith("Choose another directory.") and not save.exists()


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_checkpoint_without_permission_is_not_damaged_and_the_run_goes_on_once_it_has_it(
    world_size: int, unprivileged: Callable[[], None], data: Path, whole: Path, tmp_path: Path
) -> None:
    words = ["--exit-interval", "6"]
    assert set(start(tmp_path, data, *words, world_size=world_size).statuses) == {0}
    newest = tmp_path / "run" / "checkpoints" / "step-0000006"
    before = newest.stat().st_ino
    for shard in newest.glob("*.safetensors"):
        shard.chmod(0)
    ended = start(tmp_path, data, disturb=lambda rank: unprivileged(), world_size=world_size)
    assert set(ended.statuses) <= {2, 77} and 2 in ended.statuses and not ended.raised, ended
    said = f"megalith: {newest} cannot be read (Permission denied): correct its permissions"
    assert said in ended.said.splitlines()
    assert newest.stat().st_ino == before and len(list(newest.parent.iterdir())) == 3
    for path, named in ((newest.parent.parent, newest), (newest, newest)):
        done = megalith("verify", str(path), unprivileged=True)
        assert done.returncode == 2 and "DAMAGED" not in done.stdout, done
        assert f"UNREAD   checkpoint {named}" in done.stdout and "cannot be read (Permission denied)" in done.stdout
    for shard in newest.glob("*.safetensors"):
        shard.chmod(0o644)
    assert set(start(tmp_path, data, world_size=world_size).statuses) == {0}
    if world_size == 1:
        assert_same(tmp_path / "run", whole)


def test_a_permission_that_is_taken_away_costs_the_saves_meanwhile(
    unprivileged: Callable[[], None], data: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run" / "checkpoints"

    def disturb(rank: int) -> None:
        unprivileged()
        from_step_to_step(3, 6, lambda: folder.chmod(0o555), lambda: folder.chmod(0o755))

    ended = start(tmp_path, data, disturb=disturb)
    assert_recovered(
        ended, tmp_path, f"[Errno 13] Permission denied: '{folder}/.tmp-step-", "the newest before is of step 2"
    )
    assert_same(tmp_path / "run", whole)
    assert [step["step"] for step in steps_of(tmp_path / "run")] == list(range(1, STEPS + 1))
