"""Pieces that repeat: the shards of thousands of ranks as a few blocks, in which the index lists them.

Ranks that cut a tensor alike hold pieces of one size at a constant distance, in files whose numbers are a constant
apart, and tensor ranks beside data ranks make a grid of them. So a block is a piece and how often it repeats, along
each side of such a grid.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from megalith.checkpoint.pieces import Place


class Repeat(NamedTuple):
    """All that is before it stands so many times, each time so many file numbers and elements further."""

    times: int  # at least 2
    file_step: int
    offset_step: tuple[int, ...]


class Block(NamedTuple):
    """A piece, by the number of its file, and its repeats, the innermost first."""

    file: int
    offset: tuple[int, ...]
    extent: tuple[int, ...]
    repeats: tuple[Repeat, ...] = ()

    def unfolded(self) -> Iterator[tuple[int, Place]]:
        """The pieces, in the order in which `folded` got them."""
        starts = [(self.file, self.offset)]
        for times, file_step, offset_step in self.repeats:
            starts = [
                (file + turn * file_step, tuple(a + turn * b for a, b in zip(offset, offset_step, strict=True)))
                for turn in range(times)
                for file, offset in starts
            ]
        return ((file, Place(offset, self.extent)) for file, offset in starts)

    def to_json(self) -> list[Any]:
        """The block as the index writes it."""
        repeats = ([repeat.times, repeat.file_step, list(repeat.offset_step)] for repeat in self.repeats)
        return [self.file, list(self.offset), list(self.extent), *repeats]


def folded(pieces: Iterable[tuple[int, Place]]) -> list[Block]:
    """The blocks that unfold to these pieces (file number, place), in their order."""
    blocks = [Block(file, place.offset, place.extent) for file, place in pieces]
    while len(fewer := list(_merged(blocks))) < len(blocks):
        blocks = fewer
    return blocks


def _merged(blocks: list[Block]) -> Iterator[Block]:
    """Neighbours that differ by where they start only, and by the same step each, as one block."""
    start = 0
    while start < len(blocks):
        first, end, step = blocks[start], start + 1, None
        while end < len(blocks) and blocks[end][2:] == first[2:]:
            moved = _step(blocks[end - 1], blocks[end])
            if step is not None and moved != step:
                break
            step, end = moved, end + 1
        yield first if step is None else first._replace(repeats=(*first.repeats, Repeat(end - start, *step)))
        start = end


def _step(one: Block, other: Block) -> tuple[int, tuple[int, ...]]:
    """From the start of one to that of the other: file numbers, and elements along each dimension."""
    return other.file - one.file, tuple(b - a for a, b in zip(one.offset, other.offset, strict=True))
