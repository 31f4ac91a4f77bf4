"""What is found out of --save before the first step."""

import re
from pathlib import Path

import pytest
import torch

import megalith.keeper as keeper_module
from megalith.checkpoint.directory import try_run_directory
from megalith.checkpoint.index import STATE_ROOM
from megalith.checkpoint.pieces import Piece
from megalith.checkpoint.saver import AsyncSaver
from megalith.config import ConfigError, Run
from megalith.files import Disk, Location
from megalith.keeper import try_save_directory
from megalith.parallel.mesh import Layout
from megalith.sources import read_command_line
from tests.layouts.runs import run_on, write_data
from tests.ranks import run_ranks

# All of a file but its first lines is for the state of a run.
INDEX_LIMIT = STATE_ROOM + 200
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

    said: list[str] = []
    monkeypatch.setattr("megalith.agreement.say", said.append)

    def on_rank(rank: int) -> tuple[int, list[str]]:
        # Two hosts of two ranks.
        layout = Layout(world_size=4, rank=rank, local_rank=rank % 2)
        try_save_directory(run_into(tmp_path / "run"), layout)
        with pytest.raises(ConfigError):
            try_save_directory(run_into(tmp_path / "file"), layout)
        return tried, said

    found = run_ranks(on_rank, 4)
    assert [times for times, _ in found] == [2, 0, 2, 0]
    (told,) = found[0][1]
    assert re.search(r"--save = .*file: on rank 0, checkpoints cannot be written", told)
    assert not any(said for _, said in found[1:])


def test_an_index_that_would_be_too_large_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megalith.checkpoint.index.INDEX_LIMIT", INDEX_LIMIT)
    told = r"--save = .*run: no checkpoint can be written: the index of the checkpoint takes \d+ bytes .* fewer ranks"
    with pytest.raises(AssertionError, match=told):
        run_on(1, ["--train-iters", "4"], tmp_path / "run", write_data(tmp_path))
    assert "step_done" not in (tmp_path / "run" / "log.jsonl").read_text()


def test_all_ranks_learn_of_an_index_that_would_be_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalith.checkpoint.index.INDEX_LIMIT", INDEX_LIMIT)

    def on_rank(rank: int) -> str:
        saver = AsyncSaver(tmp_path)
        pieces = {f"layers.{n}.weight": Piece(torch.zeros(2), (4,), (2 * rank,)) for n in range(50)}
        with pytest.raises(ValueError, match="the index of the checkpoint takes") as raised:
            saver.room(pieces)
        saver.close()
        return str(raised.value)

    first, second = run_ranks(on_rank, 2)
    assert first == second
    assert not list(tmp_path.iterdir())
