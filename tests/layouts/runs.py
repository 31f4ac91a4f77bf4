"""Tiny trainings on forked ranks, whole: the command's own train function, real files, real process groups."""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalith.check import check
from megalith.checkpoint.pieces import Piece
from megalith.checkpoint.store import load_latest
from megalith.config import ConfigError
from megalith.data.indexed import IndexedWriter
from megalith.sources import read_command_line
from megalith.train import train
from tests.ranks import run_ranks

MODEL = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16
    --micro-batch-size 1 --global-batch-size 8 --lr 1e-2 --lr-warmup-iters 2 --weight-decay 0.1
    --tokenizer-type ByteLevelTokenizer --make-vocab-size-divisible-by 8 --log-interval 1 --log-params-norm
    --eval-interval 10 --eval-iters 1 --save-interval 10 --log-format json --device cpu
""".split()


def write_data(folder: Path) -> Path:
    """A small token file of bytes that repeat with variations, so that there is something to learn."""
    random = np.random.RandomState(3)
    prefix = folder / "bytes_document"
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(60):
            start = random.randint(0, 200)
            writer.add_document(
                [
                    (start + np.arange(random.randint(5, 60)) * 3) % 256,
                ]
            )
    return prefix


def run_on(world_size: int, words: list[str], save: Path, data: Path, *, timeout: float = 120.0) -> int:
    """Train on that many ranks into a run directory; give the exit status, the same on all ranks."""
    words = [*MODEL, "--data-path", str(data), "--save", str(save), *words]
    statuses = set(run_ranks(partial(run_rank, world_size=world_size, words=words), world_size, timeout=timeout))
    assert len(statuses) == 1
    return int(statuses.pop())


def run_rank(rank: int, *, world_size: int, words: list[str]) -> int:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    run = read_command_line(words)
    if faults := check(run, world_size):
        raise ConfigError(faults)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    return train(run, started=0.0)


def steps_of(save: Path) -> list[dict[str, Any]]:
    """What log.jsonl says of each step: loss and norms at full precision."""
    records = [json.loads(line) for line in (save / "log.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == "step_done"]


def weights_of(save: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint, whole."""
    tensors: dict[str, torch.Tensor] = {}

    def everything(index: Any) -> dict[str, Piece]:
        for name, stored in index.tensors.items():
            tensors[name] = torch.empty(stored.shape, dtype=torch.float32)
        return {name: Piece(tensor, tuple(tensor.shape), (0,) * tensor.dim()) for name, tensor in tensors.items()}

    assert load_latest(save, everything) is not None
    return tensors
