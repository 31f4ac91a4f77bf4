"""Which tensors of a Megatron-LM checkpoint are which of ours, without any file."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megalith.checkpoint.foreign import TensorRef
from megalith.checkpoint.megatron import Grid, modern_qkv, parts_of
from megalith.checkpoint.megatron_contents import Kept, file_contents, tensors_in
from megalith.checkpoint.pieces import Place, check_cover
from megalith.optim.settings import OptimizerConfig

GRID = Grid(
    num_layers=2, width=32, inner=128, num_heads=4, head_width=8, num_positions=32, vocab_size=512
)  # of golden/checkpoint_tree.json
STATE = {
    "step": 40,
    "num_updates": 25,
    "schedule_samples": 200,
    "schedule": {"max_lr": 1.5e-4, "min_lr": 1e-5, "warmup": 16.0, "decay": 160, "style": "cosine"},
    "loss_scale": {"scale": 65536.0, "clean_steps": 24, "tolerance": -13},
}


def kept_for(grid: Grid, dtype: torch.dtype) -> Kept:
    shapes = {part.ours: part.shape for t, s in grid.files for chunk in parts_of(grid, t, s) for part in chunk}
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"{kind}.{name}": torch.rand(shape, generator=generator)
        for name, shape in shapes.items()
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    }
    return Kept(tensors, STATE, OptimizerConfig(lr=1.5e-4), dtype, seed=1234)


def rows_of(value: Any, path: str) -> dict[str, list[Any]]:
    """The tree of an object as golden/checkpoint_tree.json lists it, by path."""
    if isinstance(value, Tensor):
        return {path: ["tensor", str(value.dtype), list(value.shape)]}
    if isinstance(value, dict):
        return {p: row for key, item in value.items() for p, row in rows_of(item, f"{path}/{key}").items()}
    if isinstance(value, list | tuple):
        rows: dict[str, list[Any]] = {path: [type(value).__name__, len(value)]}
        for number, item in enumerate(value):
            rows |= rows_of(item, f"{path}[{number}]")
        return rows
    return {path: [type(value).__name__, value if isinstance(value, np.ndarray) else str(value)]}


def test_a_file_has_the_keys_shapes_types_and_values_of_one_that_megatron_wrote(golden: Path) -> None:
    tree = json.loads((golden / "checkpoint_tree.json").read_text())
    contents = file_contents(kept_for(GRID, torch.float16), {"num_layers": 2}, GRID, 0, 0)
    assert list(contents) == tree["top_level"]
    ours = rows_of({key: value for key, value in contents.items() if key != "args"}, "")
    for path, *row in tree["tree"]:
        if path in ("/cuda_rng_state", "/rng_tracker_states/model-parallel-rng"):
            # The golden run had no GPU, so a CPU generator's state stands there.
            assert ours[path] == ["tensor", "torch.uint8", [16]]
        elif row[0] == "ndarray":
            assert ours[path][1].dtype == np.uint32 and ours[path][1].shape == (624,)
            assert str(ours[path][1])[1:50].split()[0] == str(row[1])[1:50].split()[0]
        else:
            assert ours[path] == row, path
    golden_paths = {path for path, *_ in tree["tree"]}
    # apex counts steps in the groups, and so does the bias correction that it can switch off.
    beyond = {p for p in ours if p.startswith("/optimizer/optimizer/param_groups[") and "/" in p.rpartition("]")[2]}
    assert {p.rpartition("/")[2] for p in beyond - golden_paths if not p.endswith("]")} == {"step", "bias_correction"}


@pytest.mark.parametrize(("tensor", "stages", "chunks"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (4, 4, 2)])
def test_the_files_cover_every_parameter_once_beside_copies(tensor: int, stages: int, chunks: int) -> None:
    grid = Grid(8, 32, 4, 8, 128, 32, 512, tensor, stages, chunks)
    places: dict[str, list[Place]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor_rank, stage in grid.files:
        for part in (p for chunk in parts_of(grid, tensor_rank, stage) for p in chunk):
            shapes[part.ours] = part.shape
            if part.is_copy:
                assert part.place in places[part.ours], "a copy comes after what it is a copy of"
            else:
                places.setdefault(part.ours, []).append(part.place)
    for name, shape in shapes.items():
        check_cover(name, shape, places[name])
    assert sum(math.prod(shape) for shape in shapes.values()) == 512 * 32 + 32 * 32 + 8 * (12 * 32**2 + 13 * 32) + 64


def test_stages_and_chunks_have_the_layers_that_megatron_gives_them(golden: Path) -> None:
    for case in json.loads((golden / "layer_assignment.json").read_text())["cases"]:
        grid = Grid(case["num_layers"], 8, 2, 4, 32, 8, 16, 1, case["pp"], case["chunks"] or 1)
        for stage, expected in enumerate(case["per_rank_chunks"]):
            found = [
                [int(part.ours.split(".")[1]) + 1 for part in chunk if part.ours.endswith("qkv.weight")]
                for chunk in parts_of(grid, 0, stage)
            ]
            assert found == expected


@pytest.mark.parametrize("shape", [(24, 5), (24,)])
def test_older_orders_of_qkv_rows_become_todays(shape: tuple[int, ...]) -> None:
    heads, width = 2, 4
    today = torch.randn(shape)
    number = {key: row for row, key in enumerate(product(range(heads), range(3), range(width)))}
    orders = {
        0.0: [number[head, kind, i] for kind, head, i in product(range(3), range(heads), range(width))],
        1.0: [number[head, kind, i] for head, i, kind in product(range(heads), range(width), range(3))],
        2.0: list(range(24)),
        3.0: list(range(24)),
    }
    for version, order in orders.items():
        assert torch.equal(modern_qkv(today[order], version, width), today)
    with pytest.raises(ValueError, match=r"checkpoint_version=0\.5 is not known"):
        modern_qkv(today, 0.5, width)


def references(value: Any) -> Any:
    """A file's tree as it arrives: with references for tensors."""
    if isinstance(value, dict):
        return {key: references(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [references(item) for item in value]
    return TensorRef("t", value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else value


@pytest.fixture
def tree() -> Any:
    return references(file_contents(kept_for(GRID, torch.float16), {}, GRID, 0, 0))


def read(tree: Any) -> None:
    list(tensors_in(tree, GRID, 0, 0, moments=("exp_avg", "exp_avg_sq")))


def test_what_a_gpt_file_must_have_is_named_where_it_is_not_so(tree: Any) -> None:
    read(tree)
    encoder = tree["model"]["language_model"]["encoder"]
    qkv = encoder.pop("layers.1.self_attention.query_key_value.weight")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attention\.query_key_value\.weight is missing"):
        read(tree)
    encoder["layers.1.self_attention.query_key_value.weight"] = qkv
    tree["model"]["language_model"]["embedding"]["tokentype_embeddings"] = {"weight": qkv}
    with pytest.raises(ValueError, match=r"embedding/tokentype_embeddings/weight is not part of a GPT"):
        read(tree)
    del tree["model"]["language_model"]["embedding"]["tokentype_embeddings"]
    tree["optimizer"]["optimizer"]["state"][3]["exp_avg"] = TensorRef("t", torch.float32, (7,))
    with pytest.raises(ValueError, match=r"optimizer/state/3/exp_avg has the shape \[7\], expected \[32, 32\]"):
        read(tree)


def test_other_shapes_and_types_and_counts_are_named(tree: Any) -> None:
    main = tree["optimizer"]["fp32_from_fp16_params"]
    main[0][0] = TensorRef("t", torch.float32, (511, 32))
    with pytest.raises(
        ValueError, match=r"fp32_from_fp16_params\[0\]\[0\] has the shape \[511, 32\], expected \[512, 32\]"
    ):
        read(tree)
    main[0][0] = TensorRef("t", torch.int64, (512, 32))
    with pytest.raises(ValueError, match=r"is of torch\.int64, expected one of torch\.float32"):
        read(tree)
    main[1].pop()
    with pytest.raises(ValueError, match=r"groups of \[10, 17\] tensors, expected \[10, 18\]"):
        read(tree)


def test_a_cut_that_does_not_divide_is_refused() -> None:
    with pytest.raises(
        ValueError, match="25 attention heads cannot be shared out by a tensor-model-parallel size of 2"
    ):
        Grid(48, 1600, 25, 64, 6400, 1024, 50304, 2)
    with pytest.raises(ValueError, match="48 layers cannot be shared out by a stages x chunks of the pipeline of 5"):
        Grid(48, 1600, 25, 64, 6400, 1024, 50304, 1, 5)
