"""Tensors of a pretended run, and its checkpoints, for tests."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalith.checkpoint.pieces import Piece, whole
from megalith.checkpoint.store import Loaded, load_latest, save
from megalith.files import digest_of_bytes

SHAPES = {"model.table": (12, 8), "model.bias": (5,), "optimizer.exp_avg.table": (12, 8), "count": ()}


def tensors_at(step: int) -> dict[str, Tensor]:
    """The run's tensors after a step."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def pieces_of(tensors: Mapping[str, Tensor], rank: int = 0, world_size: int = 1) -> dict[str, Piece]:
    """What a rank holds: its rows of the model's table, its columns of the moments, copies of the rest.

    For any number of ranks, also such as do not divide the sizes.
    """

    def cut(tensor: Tensor, dim: int) -> Piece:
        size = tensor.shape[dim]
        start, end = size * rank // world_size, size * (rank + 1) // world_size
        offset = tuple(start if number == dim else 0 for number in range(tensor.dim()))
        return Piece(tensor.narrow(dim, start, end - start), tuple(tensor.shape), offset)

    return {
        "model.table": cut(tensors["model.table"], 0),
        "optimizer.exp_avg.table": cut(tensors["optimizer.exp_avg.table"], 1),
        "model.bias": whole(tensors["model.bias"]),
        "count": whole(tensors["count"]),
    }


def empty() -> dict[str, Tensor]:
    """Tensors to load into."""
    return {name: torch.full(shape, float("nan")) for name, shape in SHAPES.items()}


def save_step(run_dir: Path, step: int) -> Path:
    """The run's checkpoint after a step, saved by one rank."""
    return save(run_dir, step, pieces_of(tensors_at(step)), {"consumed_samples": 8 * step})


def load_newest(run_dir: Path) -> Loaded | None:
    """What one rank loads; checked to be the run's tensors and state after the step that it says."""
    tensors = empty()
    loaded = load_latest(run_dir, pieces_of(tensors))
    if loaded is not None:
        assert loaded.index.state == {"consumed_samples": 8 * loaded.index.step}
        assert_equal(tensors, tensors_at(loaded.index.step))
    return loaded


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Fail unless both hold the same bits."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def names_in(run_dir: Path) -> list[str]:
    """What lies in the folder of checkpoints."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def signed(fields: Any) -> bytes:
    """The text of an index whose digest fits, whatever it says: as an attacker would write it."""
    text = json.dumps(fields).encode()
    body = text[:-1] + b",\n" if text.endswith(b"}") else text
    return body + f'"sha256":"{digest_of_bytes(body)}"\n}}\n'.encode()
