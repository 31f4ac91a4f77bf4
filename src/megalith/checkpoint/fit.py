"""From a checkpoint into the tensors of a run: whether it fits, from its index alone, and the copying."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from megalith.checkpoint.index import Index
from megalith.checkpoint.pieces import DTYPES, Piece, Place, Table
from megalith.checkpoint.shards import DamagedError, open_shard
from megalith.checkpoint.writers import chosen, marks
from megalith.files import Disk
from megalith.ranks import Ranks, RanksError


class UnfitError(ValueError):
    """A checkpoint that a run cannot go on from, sound as it may be."""

    def __init__(self, message: str, index: Index) -> None:
        super().__init__(message)
        self.index = index


def check_fit(
    ranks: Ranks, path: Path, index: Index, pieces: Mapping[str, Piece], may_stay_unread: Callable[[str], bool]
) -> None:
    """Raise UnfitError on all ranks unless the checkpoint holds what is wanted, as it is wanted, and nothing else."""

    def read_here() -> str:
        faults = []
        for name, piece in pieces.items():
            stored = index.tensors.get(name)
            kind = (DTYPES[piece.local.dtype], piece.shape)
            if stored is None:
                faults.append(f"it has no {name}")
            elif (stored.dtype, stored.shape) != kind:
                faults.append(f"{name} is {stored.dtype} {stored.shape} in it, but {kind[0]} {kind[1]} in this run")
        if faults:
            raise ValueError(_some(faults))
        return marks(index.tensors, pieces)

    try:
        marked = ranks.together_to_first(read_here)
    except RanksError as failed:
        raise UnfitError(f"{path} does not fit this run: {failed}", index) from failed
    read = {name for names in set(marked) for name in chosen(index.tensors, names)}
    unread = [name for name in index.tensors if name not in read and not may_stay_unread(name)]
    if said := ranks.from_first(_some(unread) if ranks.rank == 0 else ""):
        raise UnfitError(f"{path} does not fit this run: the run has no {said}", index)


def _some(faults: list[str]) -> str:
    """The first few faults, and how many there are."""
    return "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")


class Part(NamedTuple):
    """What of a stored piece goes into a piece of this rank."""

    name: str
    place: Place  # of the stored piece
    overlap: Place


def parts_by_file(table: Table, pieces: Mapping[str, Piece]) -> dict[str, list[Part]]:
    """For each file what is to be read of it to fill the pieces."""
    parts: dict[str, list[Part]] = {}
    # Tensors that are cut alike share their stored pieces, so a few are looked at, not those of every tensor.
    overlaps: dict[tuple[int, Place], list[tuple[str, Place, Place]]] = {}
    for name, piece in pieces.items():
        stored = table[name].pieces
        key = (id(stored), piece.place)
        if key not in overlaps:
            pairs = ((file, place, place.overlap(piece.place)) for file, place in stored)
            overlaps[key] = [(file, place, overlap) for file, place, overlap in pairs if overlap is not None]
        for file, place, overlap in overlaps[key]:
            parts.setdefault(file, []).append(Part(name, place, overlap))
    return parts


def fill(ranks: Ranks, path: Path, index: Index, pieces: Mapping[str, Piece], *, disk: Disk) -> None:
    """Copy from the files into the pieces, file by file; RanksError on all ranks if a file fails on any."""

    def fill_own() -> None:
        for file, parts in sorted(parts_by_file(index.tensors, pieces).items()):
            with open_shard(path / file, disk=disk) as shard:
                for name, place, overlap in parts:
                    target = pieces[name].local.detach()[overlap.slices(pieces[name].offset)]
                    if shard.kind(name) != (index.tensors[name].dtype, place.extent):
                        raise DamagedError(f"{path / file} holds another {name} than the index says")
                    origin = tuple(start - zero for start, zero in zip(overlap.offset, place.offset, strict=True))
                    shard.fill(name, Place(origin, overlap.extent), target)

    ranks.together(fill_own)
