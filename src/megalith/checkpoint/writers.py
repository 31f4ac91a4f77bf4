"""Which rank writes which piece: rank 0 finds it from what all ranks hold, and tells each its own part.

What thousands of ranks hold is large, so no other rank sees all of it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megalith.checkpoint.index import check_size
from megalith.checkpoint.pieces import Piece, Table, announce, by_file, file_of, num_bytes_of, share_out
from megalith.ranks import Ranks, RanksError


@dataclass(frozen=True)
class Plan:
    """What a checkpoint of a layout consists of; it stays the same as long as the layout does.

    own: the tensors of which this rank writes its piece. num_bytes: of all tensors. table: on rank 0; elsewhere empty.
    """

    own: tuple[str, ...]
    num_bytes: int
    table: Table


def plan(ranks: Ranks, tensors: Mapping[str, Piece]) -> Plan:
    """Which rank writes which piece, found by all ranks together.

    Raises ValueError on all ranks if the pieces do not make up whole tensors, or their index would be too large.
    """
    try:
        announced = ranks.together_to_first(lambda: announce(tensors))
    except RanksError as failed:
        raise ValueError(str(failed)) from failed
    table: Table = {}
    parts: list[Any] = []
    if ranks.rank == 0:
        try:
            table = share_out(announced)
            check_size(table)
        except ValueError as error:
            parts = [[str(error), "", 0]] * ranks.size
        else:
            files = [file_of(rank) for rank in range(ranks.size)]
            written, num_bytes = by_file(table, set(files)), num_bytes_of(table)
            for file, held in zip(files, announced, strict=True):
                parts.append(["", marks(held, written.get(file, ())), num_bytes])
    fault, marked, num_bytes = ranks.part_from_first(parts)
    if fault:
        raise ValueError(fault)
    return Plan(tuple(chosen(tensors, marked)), num_bytes, table)


def marks(names: Iterable[str], of: Iterable[str]) -> str:
    """Which of the names are among others, in alphabetical order: 1 or 0 for each, a byte where a name takes fifty."""
    some = set(of)
    return "".join("1" if name in some else "0" for name in sorted(names))


def chosen(names: Iterable[str], marked: str) -> list[str]:
    """The names that `marks` has marked."""
    return [name for name, mark in zip(sorted(names), marked, strict=True) if mark == "1"]
