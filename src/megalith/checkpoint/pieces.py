"""Pieces of tensors: what each rank holds of the whole, and which rank writes what.

A checkpoint knows tensors by name and global shape only. Every rank says which rectangle of each tensor it holds;
copies are written once, shared out so that all ranks write about the same amount.
"""

import math
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Names of number types in safetensors files.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,254}")


class Place(NamedTuple):
    """A rectangle in a tensor: its first index and its size along every dimension."""

    offset: tuple[int, ...]
    extent: tuple[int, ...]

    @property
    def volume(self) -> int:
        """Elements."""
        return math.prod(self.extent)

    def overlap(self, other: "Place") -> "Place | None":
        """The rectangle that both share; None if there is none."""
        offset = tuple(map(max, self.offset, other.offset))
        ends = tuple(map(min, self._end(), other._end()))
        extent = tuple(end - start for start, end in zip(offset, ends, strict=True))
        return Place(offset, extent) if all(size > 0 for size in extent) else None

    def slices(self, origin: Sequence[int]) -> tuple[slice, ...]:
        """Indices of this rectangle in a tensor whose first element stands at origin."""
        return tuple(
            slice(start - zero, start - zero + size)
            for start, size, zero in zip(self.offset, self.extent, origin, strict=True)
        )

    def _end(self) -> tuple[int, ...]:
        return tuple(start + size for start, size in zip(self.offset, self.extent, strict=True))


@dataclass(frozen=True, eq=False)
class Piece:
    """The part of a tensor that lies on this rank: its elements, the whole's shape, and where they start in it.

    read: gives the elements where they are kept in another form; local then has their type and shape only (meta).
    Raises ValueError if the part does not lie inside the whole or its number type cannot be stored.
    """

    local: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    read: Callable[[], Tensor] | None = None

    def __post_init__(self) -> None:
        extent = tuple(self.local.shape)
        if len(self.shape) != len(self.offset) or len(self.shape) != len(extent):
            raise ValueError(
                f"shape={self.shape}, offset={self.offset} and the local shape {extent} differ in dimensions"
            )
        inside = all(
            0 <= start <= start + size <= whole
            for start, size, whole in zip(self.offset, extent, self.shape, strict=True)
        )
        if not inside:
            raise ValueError(f"a part of shape {extent} at offset={self.offset} does not lie inside shape={self.shape}")
        if self.local.dtype not in DTYPES:
            raise ValueError(f"dtype={self.local.dtype} cannot be stored: use one of {', '.join(map(str, DTYPES))}")

    @property
    def place(self) -> Place:
        return Place(self.offset, tuple(self.local.shape))

    @property
    def elements(self) -> Tensor:
        """What is to be written."""
        return self.local.detach() if self.read is None else self.read()

    def to_fill(self) -> "Piece":
        """The piece with memory for its elements; a copy of them where they are kept in another form."""
        return self if self.read is None else Piece(self.read(), self.shape, self.offset)


def whole(tensor: Tensor) -> Piece:
    """A tensor that lies on this rank as a whole."""
    return Piece(tensor.detach(), tuple(tensor.shape), (0,) * tensor.dim())


class StoredPiece(NamedTuple):
    """A rectangle of a tensor and the file that holds it, under the tensor's name."""

    file: str
    place: Place


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in a checkpoint. The pieces cover it, each element once; an empty tensor has none."""

    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    pieces: tuple[StoredPiece, ...]


Table = Mapping[str, Stored]


def file_of(rank: int) -> str:
    """The name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def announce(tensors: Mapping[str, Piece]) -> dict[str, Any]:
    """What a rank holds, as JSON: name -> number type, global shape, offset and extent of its part."""
    for name in tensors:
        if TENSOR_NAME.fullmatch(name) is None:
            raise ValueError(f"tensor name {name!r} must match {TENSOR_NAME.pattern}")
    return {
        name: [DTYPES[piece.local.dtype], list(piece.shape), list(piece.offset), list(piece.local.shape)]
        for name, piece in tensors.items()
    }


def share_out(announced: Sequence[Mapping[str, Any]]) -> dict[str, Stored]:
    """Which rank writes what, from the announcements of all ranks in order; every rank finds the same.

    Raises ValueError if ranks disagree about a tensor, or if their parts overlap without being equal or leave a gap.
    """
    holders: dict[str, dict[Place, list[int]]] = {}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for rank, tensors in enumerate(announced):
        for name, (dtype, shape, offset, extent) in tensors.items():
            kind = (dtype, tuple(shape))
            if kinds.setdefault(name, kind) != kind:
                raise ValueError(f"{name} is {kinds[name]} on one rank and {kind} on rank {rank}: it must be the same")
            places = holders.setdefault(name, {})
            if math.prod(extent):
                places.setdefault(Place(tuple(offset), tuple(extent)), []).append(rank)
    load = [0] * len(announced)
    table = {}
    # Most tensors of a model are cut as many others: what is equal is looked at, and kept in memory, once.
    covers: set[tuple[tuple[int, ...], tuple[Place, ...]]] = set()
    layouts: dict[tuple[StoredPiece, ...], tuple[StoredPiece, ...]] = {}
    for name in sorted(holders):
        dtype, shape = kinds[name]
        cells = tuple(sorted(holders[name]))
        if (shape, cells) not in covers:
            check_cover(name, shape, cells)
            covers.add((shape, cells))
        pieces = []
        for place in cells:
            writer = min(holders[name][place], key=lambda rank: (load[rank], rank))
            load[writer] += place.volume * TORCH_DTYPES[dtype].itemsize
            pieces.append(StoredPiece(file_of(writer), place))
        table[name] = Stored(dtype, shape, layouts.setdefault(tuple(pieces), tuple(pieces)))
    return table


def num_bytes_of(table: Table) -> int:
    """Bytes of all tensors."""
    return sum(math.prod(stored.shape) * TORCH_DTYPES[stored.dtype].itemsize for stored in table.values())


def by_file(table: Table, files: Container[str]) -> dict[str, dict[str, Place]]:
    """The table from the other side: for each of the files the tensors of which it holds a piece, and which."""
    held: dict[str, dict[str, Place]] = {}
    for name, stored in table.items():
        for file, place in stored.pieces:
            if file in files:
                held.setdefault(file, {})[name] = place
    return held


def check_cover(name: str, shape: tuple[int, ...], places: Sequence[Place]) -> None:
    """Raise ValueError if the places do not cover a tensor of that shape, each element once."""
    # Sorted by the first dimension, a place can only meet those before it that have not ended yet.
    open_places: list[Place] = []
    for place in sorted(places):
        if place.offset:
            open_places = [other for other in open_places if other.offset[0] + other.extent[0] > place.offset[0]]
        for other in open_places:
            if place.overlap(other) is not None:
                raise ValueError(f"{name}: the parts {tuple(other)} and {tuple(place)} (offset, extent) overlap")
        open_places.append(place)
    covered, elements = sum(place.volume for place in places), math.prod(shape)
    if covered != elements:
        raise ValueError(f"{name}: the parts hold {covered} of {elements} elements of shape {shape}")
