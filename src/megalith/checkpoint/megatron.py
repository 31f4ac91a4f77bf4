"""The files of a Megatron-LM checkpoint of a GPT, and which tensors of ours stand where in them.

Each file holds what one tensor rank of one pipeline stage has: rows or columns of projections, rows of the vocabulary,
some of the layers, numbered from 0 anew. `parts_of` lists a file's parameters in the order in which Megatron-LM's
modules hold them; reading and writing both follow that list. All functions are pure; tensors are moved, not changed.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from megalith.checkpoint.pieces import Place
from megalith.checkpoint.settings import TRACKER as TRACKER
from megalith.models.shape import Shape

FILE_NAME = "model_optim_rng.pt"
VERSION = 3.0  # of the files that are written
RANK_NAME = re.compile(r"mp_rank_([0-9]{2,})(?:_([0-9]{3,}))?")
Tree = Mapping[str, Any]
Keys = tuple[str, ...]


@dataclass(frozen=True)
class Grid(Shape):
    """The sizes of a model and over how many files it is cut.

    Raises ValueError if Megatron-LM could not cut it like that.
    """

    vocab_size: int  # padded
    tensor: int = 1  # files that share each layer
    stages: int = 1  # files that share the layers
    chunks: int = 1  # runs of consecutive layers in each file

    def __post_init__(self) -> None:
        rules = {
            "attention heads": (self.num_heads, self.tensor, "tensor-model-parallel size"),
            "inner features": (self.inner, self.tensor, "tensor-model-parallel size"),
            "rows of the padded vocabulary": (self.vocab_size, self.tensor, "tensor-model-parallel size"),
            "layers": (self.num_layers, self.stages * self.chunks, "stages x chunks of the pipeline"),
        }
        for name, (total, parts, what) in rules.items():
            if min(total, parts) < 1 or total % parts:
                raise ValueError(f"{total} {name} cannot be shared out by a {what} of {parts}: choose one that divides")

    @property
    def files(self) -> list[tuple[int, int]]:
        """Tensor rank and stage of each file."""
        return [(tensor, stage) for stage, tensor in product(range(self.stages), range(self.tensor))]


class Part(NamedTuple):
    """One parameter in a file."""

    theirs: Keys  # keys from the model's dict on
    ours: str
    shape: tuple[int, ...]  # of the whole
    place: Place  # of this file's part
    decays: bool  # is in the optimizer's first group, the one with weight decay
    is_copy: bool = False  # another file holds the same

    @property
    def extent(self) -> tuple[int, ...]:
        return self.place.extent


# The parameters of a layer in Megatron-LM's order, ours, and the dimension that tensor ranks share out.
LAYER: tuple[tuple[str, str, int | None], ...] = (
    ("input_layernorm.weight", "attention_norm.weight", None),
    ("input_layernorm.bias", "attention_norm.bias", None),
    ("self_attention.query_key_value.weight", "attention.qkv.weight", 0),
    ("self_attention.query_key_value.bias", "attention.qkv.bias", 0),
    ("self_attention.dense.weight", "attention.out.weight", 1),
    ("self_attention.dense.bias", "attention.out.bias", None),
    ("post_attention_layernorm.weight", "feedforward_norm.weight", None),
    ("post_attention_layernorm.bias", "feedforward_norm.bias", None),
    ("mlp.dense_h_to_4h.weight", "feedforward.up.weight", 0),
    ("mlp.dense_h_to_4h.bias", "feedforward.up.bias", 0),
    ("mlp.dense_4h_to_h.weight", "feedforward.down.weight", 1),
    ("mlp.dense_4h_to_h.bias", "feedforward.down.bias", None),
)
WORDS: Keys = ("language_model", "embedding", "word_embeddings", "weight")
POSITIONS: Keys = ("language_model", "embedding", "position_embeddings", "weight")
ENCODER: Keys = ("language_model", "encoder")
HEAD_COPY: Keys = ("word_embeddings_for_head", "weight")
# How the same things were called before; read only.
FORMER = {"encoder": "transformer", "self_attention": "attention"}


def layer_shapes(grid: Grid) -> dict[str, tuple[int, ...]]:
    """The shape of each of a layer's parameters, whole, by our name."""
    width, inner, joined = grid.width, grid.inner, grid.num_heads * grid.head_width
    shapes: dict[str, tuple[int, ...]] = {
        "attention.qkv.weight": (3 * joined, width),
        "attention.qkv.bias": (3 * joined,),
        "attention.out.weight": (width, joined),
        "feedforward.up.weight": (inner, width),
        "feedforward.up.bias": (inner,),
        "feedforward.down.weight": (width, inner),
    }
    return {ours: shapes.get(ours, (width,)) for _, ours, _ in LAYER}


def parts_of(grid: Grid, tensor_rank: int, stage: int) -> list[list[Part]]:
    """The parameters in the file of a tensor rank and stage, chunk by chunk, in the order of Megatron-LM's modules."""
    return [list(_chunk(grid, tensor_rank, stage, chunk)) for chunk in range(grid.chunks)]


def _chunk(grid: Grid, tensor_rank: int, stage: int, chunk: int) -> Iterator[Part]:
    is_first = stage == chunk == 0
    is_last = stage == grid.stages - 1 and chunk == grid.chunks - 1
    words, width = (grid.vocab_size, grid.width), (grid.width,)
    vocabulary = _place(words, 0, grid.tensor, tensor_rank)
    if is_first:
        positions = (grid.num_positions, grid.width)
        yield Part(WORDS, "word_embedding.weight", words, vocabulary, decays=True)
        yield Part(
            POSITIONS,
            "position_embedding.weight",
            positions,
            _place(positions, None, grid.tensor, tensor_rank),
            decays=True,
            is_copy=tensor_rank > 0,
        )
    shapes = layer_shapes(grid)
    count = grid.num_layers // (grid.stages * grid.chunks)
    first = chunk * (grid.num_layers // grid.chunks) + stage * count
    for number in range(count):
        for theirs, ours, cut in LAYER:
            shape = shapes[ours]
            yield Part(
                (*ENCODER, f"layers.{number}.{theirs}"),
                f"layers.{first + number}.{ours}",
                shape,
                _place(shape, cut, grid.tensor, tensor_rank),
                decays=len(shape) > 1,
                is_copy=cut is None and tensor_rank > 0,
            )
    if is_last:
        for kind in ("weight", "bias"):
            yield Part(
                (*ENCODER, f"final_layernorm.{kind}"),
                f"final_norm.{kind}",
                width,
                _place(width, None, grid.tensor, tensor_rank),
                decays=False,
                is_copy=tensor_rank > 0,
            )
    if is_last and grid.stages > 1:
        yield Part(HEAD_COPY, "word_embedding.weight", words, vocabulary, decays=True, is_copy=True)


def _place(shape: tuple[int, ...], cut: int | None, parts: int, number: int) -> Place:
    """The part of that number along the cut dimension; the whole if there is none."""
    offset, extent = [0] * len(shape), list(shape)
    if cut is not None:
        extent[cut] = shape[cut] // parts
        offset[cut] = number * extent[cut]
    return Place(tuple(offset), tuple(extent))


def in_optimizer(chunks: list[list[Part]]) -> list[list[Part]]:
    """The parts of a file in the optimizer's two groups, with and without weight decay."""
    parts = [part for chunk in chunks for part in chunk]
    return [[part for part in parts if part.decays], [part for part in parts if not part.decays]]


def chunk_names(chunks: int) -> list[str]:
    """The keys under which a file holds its chunks."""
    return ["model"] if chunks == 1 else [f"model{number}" for number in range(chunks)]


def rank_name(tensor_rank: int, stage: int, *, stages: int) -> str:
    """The directory of a file."""
    return f"mp_rank_{tensor_rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")


def iteration_name(iteration: int) -> str:
    """The directory of a checkpoint."""
    return f"iter_{iteration:07d}"


class Files(NamedTuple):
    """A checkpoint that was found: its directory, how it is cut, and whether it holds no more than weights."""

    folder: Path
    tensor: int
    stages: int
    is_release: bool

    def path(self, tensor_rank: int, stage: int) -> Path:
        return self.folder / rank_name(tensor_rank, stage, stages=self.stages) / FILE_NAME


def find_files(directory: Path, iteration: int | None) -> Files:
    """The files of a checkpoint; iteration None takes what the tracker file names.

    Raises ValueError if there is none, or a file is missing.
    """
    name = _tracked(directory) if iteration is None else iteration_name(iteration)
    folder = directory / name
    if not folder.is_dir():
        raise ValueError(f"{folder}: is not a directory. Choose an iteration that is there: {_iterations(directory)}")
    ranks = set()
    for entry in folder.iterdir():
        if (found := RANK_NAME.fullmatch(entry.name)) and entry.is_dir():
            ranks.add((int(found[1]), int(found[2] or 0)))
    if not ranks:
        raise ValueError(f"{folder}: holds no mp_rank_... directory, so it is no Megatron-LM checkpoint")
    tensor, stages = 1 + max(rank for rank, _ in ranks), 1 + max(stage for _, stage in ranks)
    files = Files(folder, tensor, stages, is_release=name == "release")
    for stage, tensor_rank in product(range(stages), range(tensor)):
        path = files.path(tensor_rank, stage)
        if not path.is_file():
            raise ValueError(f"{path}: is missing, and the others are those of {tensor} x {stages} ranks")
    return files


def _tracked(directory: Path) -> str:
    """The directory that the tracker file names."""
    path = directory / TRACKER
    if not path.is_file():
        raise ValueError(
            f"{path}: does not exist. Name the directory that --save had in Megatron-LM, or give --iteration; it has "
            f"{_iterations(directory)}"
        )
    text = path.read_text(encoding="utf-8", errors="replace")[:32].strip()
    if text != "release" and not (text.isascii() and text.isdigit()):
        raise ValueError(f"{path}: must hold an iteration or the word release, found {text!r}")
    return text if text == "release" else iteration_name(int(text))


def _iterations(directory: Path) -> str:
    names = sorted(path.name for path in directory.glob("iter_*")) if directory.is_dir() else []
    return ", ".join(names[-5:]) or "none"


def modern_qkv(rows: Tensor, version: float, head_width: int) -> Tensor:
    """The rows of a file's QKV projection in today's order: for each head its query, key and value rows.

    Version 0 has the queries of all heads first, then the keys, then the values; version 1 has for each head the first
    row of query, key and value, then the second of each, and so on. (Orders as Megatron-LM's own loader takes them.)
    """
    if version >= 2:
        return rows
    heads = rows.shape[0] // (3 * head_width)
    if version == 0:
        return rows.view(3, heads, head_width, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)
    if version == 1:
        return rows.view(heads, head_width, 3, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
    raise ValueError(f"checkpoint_version={version} is not known: 0, 1, and 2 or above are")
