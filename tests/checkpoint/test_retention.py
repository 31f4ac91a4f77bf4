"""Old checkpoints go only when a newer one is known to be whole, and nothing else ever goes."""

import os
from pathlib import Path

import pytest

from megalith.checkpoint.directory import CheckpointError, list_checkpoints
from megalith.checkpoint.retention import delete_old
from megalith.checkpoint.store import save
from megalith.ranks import Ranks
from tests.checkpoint.runs import load_newest, names_in, pieces_of, save_step, tensors_at
from tests.disks import failing_disk
from tests.ranks import run_ranks


def steps_in(run_dir: Path) -> list[int]:
    return [found.step for found in list_checkpoints(run_dir)]


def saved(run_dir: Path, steps: list[int]) -> Path:
    for step in steps:
        save_step(run_dir, step)
    return run_dir


def test_the_newest_and_the_multiples_stay(tmp_path: Path) -> None:
    saved(tmp_path, [10, 20, 30, 40, 50, 60])
    assert delete_old(Ranks(), tmp_path, keep_last=2, keep_every=20) == [10, 30]
    assert steps_in(tmp_path) == [20, 40, 50, 60]
    assert delete_old(Ranks(), tmp_path, keep_last=2, keep_every=20) == []
    assert delete_old(Ranks(), tmp_path, keep_last=3) == [20]
    assert delete_old(Ranks(), tmp_path, keep_last=1) == [40, 50]
    assert names_in(tmp_path) == ["step-0000060"]
    assert load_newest(tmp_path) is not None


def test_nothing_goes_while_the_newest_does_not_verify(tmp_path: Path) -> None:
    saved(tmp_path, [1, 2, 3])
    shard = tmp_path / "checkpoints" / "step-0000003" / "rank-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"are kept: .*step-0000003/rank-00000\.safetensors was changed"):
        delete_old(Ranks(), tmp_path, keep_last=1)
    assert steps_in(tmp_path) == [1, 2, 3]


def test_checkpoints_that_do_not_look_whole_do_not_count_as_kept(tmp_path: Path) -> None:
    saved(tmp_path, [1, 2, 3, 4, 5])
    (tmp_path / "checkpoints" / "step-0000003" / "index.json").unlink()
    os.truncate(tmp_path / "checkpoints" / "step-0000004" / "rank-00000.safetensors", 10)
    assert delete_old(Ranks(), tmp_path, keep_last=3) == []
    assert delete_old(Ranks(), tmp_path, keep_last=2) == [1]
    assert steps_in(tmp_path) == [2, 3, 4, 5]


def test_a_checkpoint_of_two_files_is_not_whole_if_either_is_cut(tmp_path: Path) -> None:
    def on_rank(rank: int) -> None:
        for step in (1, 2, 3):
            save(tmp_path, step, pieces_of(tensors_at(step), rank, 2), {})

    run_ranks(on_rank, 2)
    os.truncate(tmp_path / "checkpoints" / "step-0000002" / "rank-00001.safetensors", 10)
    assert delete_old(Ranks(), tmp_path, keep_last=2) == []


def test_a_linked_checkpoint_is_neither_counted_nor_followed(tmp_path: Path) -> None:
    elsewhere = saved(tmp_path / "elsewhere", [1])
    run = saved(tmp_path / "run", [2, 3])
    (run / "checkpoints" / "step-0000001").symlink_to(elsewhere / "checkpoints" / "step-0000001")
    assert delete_old(Ranks(), run, keep_last=1) == [2]
    assert load_newest(elsewhere) is not None
    assert names_in(run) == ["step-0000001", "step-0000003"]


def test_files_of_others_survive_in_a_directory_of_another_name(tmp_path: Path) -> None:
    saved(tmp_path, [1, 2])
    (tmp_path / "checkpoints" / "step-0000001" / "notes.txt").write_text("precious")
    (tmp_path / "checkpoints" / "step-0000001" / "link").symlink_to(tmp_path)
    assert delete_old(Ranks(), tmp_path, keep_last=1) == [1]
    assert steps_in(tmp_path) == [2]
    (left,) = [name for name in names_in(tmp_path) if name.startswith(".del-step-0000001.")]
    assert sorted(os.listdir(tmp_path / "checkpoints" / left)) == ["link", "notes.txt"]


def test_a_failing_deletion_is_reported_and_finished_by_the_next_save(tmp_path: Path) -> None:
    number = 0
    while True:
        run_dir = tmp_path / str(number)
        saved(run_dir, [1, 2])
        try:
            if delete_old(Ranks(), run_dir, keep_last=1, disk=failing_disk(number)):
                break
        except CheckpointError as error:
            assert "Input/output error" in str(error)
        loaded = load_newest(run_dir)
        assert loaded is not None and loaded.index.step == 2
        save_step(run_dir, 3)
        assert set(names_in(run_dir)) <= {"step-0000001", "step-0000002", "step-0000003"}
        number += 1
    assert number > 10 and names_in(run_dir) == ["step-0000002"]


def test_ranks_delete_together(tmp_path: Path) -> None:
    saved(tmp_path, [1, 2, 3])
    assert run_ranks(lambda rank: delete_old(Ranks(), tmp_path, keep_last=2), 2) == [[1], [1]]
    assert steps_in(tmp_path) == [2, 3]


@pytest.mark.parametrize("keep_last, keep_every", [(0, None), (-1, None), (1, 0)])
def test_keeping_nothing_is_refused(tmp_path: Path, keep_last: int, keep_every: int | None) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        delete_old(Ranks(), tmp_path, keep_last=keep_last, keep_every=keep_every)
