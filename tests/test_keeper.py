"""What is found out of --save before the first step."""

from pathlib import Path

import pytest

import megalith.keeper as keeper_module
from megalith.checkpoint.directory import try_run_directory
from megalith.config import Run
from megalith.files import Disk, Location
from megalith.keeper import try_save_directory
from megalith.parallel.mesh import Layout
from megalith.sources import read_command_line
from tests.ranks import run_ranks

WORDS = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 8 --max-position-embeddings 8".split()


def run_into(save: Path) -> Run:
    return read_command_line([*WORDS, "--train-iters", "1", "--save", str(save)])


def test_a_save_directory_is_tried_once_a_host_and_all_ranks_learn_of_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = 0

    def counting(run_dir: Location, *, disk: Disk) -> None:
        nonlocal tried
        tried += 1
        try_run_directory(run_dir, disk=disk)

    monkeypatch.setattr(keeper_module, "try_run_directory", counting)
    (tmp_path / "file").write_text("in the way")

    def on_rank(rank: int) -> tuple[int, str]:
        # Two hosts of two ranks.
        layout = Layout(world_size=4, rank=rank, local_rank=rank % 2)
        try_save_directory(run_into(tmp_path / "run"), layout)
        with pytest.raises(ValueError, match=r"--save = .*file: checkpoints cannot be written") as raised:
            try_save_directory(run_into(tmp_path / "file"), layout)
        return tried, str(raised.value)

    found = run_ranks(on_rank, 4)
    assert [times for times, _ in found] == [2, 0, 2, 0]
    assert len({said for _, said in found}) == 1
