"""Checkpoints of thousands of ranks, made up: what one rank reads, keeps and looks at stays small."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import megalith.host_tree as host_tree
from megalith.checkpoint.fit import check_fit, fill, parts_by_file
from megalith.checkpoint.index import Index, check_size, parse, render
from megalith.checkpoint.pieces import (
    Piece,
    Place,
    Stored,
    StoredPiece,
    Table,
    announce,
    by_file,
    file_of,
    num_bytes_of,
    share_out,
)
from megalith.checkpoint.store import save
from megalith.checkpoint.verify import check_files
from megalith.checkpoint.writers import plan
from megalith.files import DISK, Written
from megalith.ranks import Ranks
from tests.ranks import run_ranks

PATH = Path("step-0000007/index.json")
TENSOR = 8  # ranks that cut a layer, beside as many data ranks as are left
MOMENTS = ("weight", "exp_avg", "exp_avg_sq")
# Shape, and the dimension that tensor ranks cut; data ranks cut the first one of what is left.
LAYER: dict[str, tuple[tuple[int, ...], int | None]] = {
    "attention.qkv.weight": ((3 * 8192, 8192), 0),
    "attention.out.weight": ((8192, 8192), 1),
    "attention.out.bias": ((8192,), None),
    "norm.weight": ((1000,), None),  # does not divide
    "feedforward.in.bias": ((8 * 1000,), 0),
}


def share(total: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and number of a rank's rows; the last rank's are fewer where they do not divide."""
    most = -(-total // world_size)
    first = min(rank * most, total)
    return first, min(most, total - first)


def held(rank: int, world_size: int, num_layers: int) -> dict[str, Piece]:
    """What a rank of a mesh of data and tensor ranks holds of the model, without elements."""
    data, tensor = divmod(rank, TENSOR)
    pieces = {}
    for name, (shape, dim) in LAYER.items():
        offset, extent = [0] * len(shape), list(shape)
        if dim is not None:
            offset[dim], extent[dim] = share(shape[dim], tensor, TENSOR)
        first, extent[0] = share(extent[0], data, world_size // TENSOR)
        offset[0] += first
        local = torch.empty(extent, device="meta")
        for moment in MOMENTS:
            for layer in range(num_layers):
                pieces[f"{moment}.layers.{layer}.{name}"] = Piece(local, shape, tuple(offset))
    return pieces


def table_of(world_size: int, num_layers: int) -> dict[str, Stored]:
    return share_out([announce(held(rank, world_size, num_layers)) for rank in range(world_size)])


def index_of(table: Table, step: int = 7) -> Index:
    files = {piece.file: Written(1 << 40, "0" * 64) for stored in table.values() for piece in stored.pieces}
    return Index(step, {}, {}, files, table)


def test_the_index_lists_each_tensor_in_a_few_hundred_bytes() -> None:
    world_size = 3000  # no power of two
    table = table_of(world_size, num_layers=1)
    num_pieces = sum(len(stored.pieces) for stored in table.values())
    assert num_pieces > len(table) * world_size / 3
    text = render(index_of(table))
    lines = text.split(b'"tensors":{\n')[1].splitlines()[: len(table)]
    assert max(map(len, lines)) < 600
    assert len(text) < 110 * world_size + 600 * len(table)
    # Every piece is there again, in its order.
    assert parse(PATH, text) == index_of(table)
    # So many ranks with 1,500 layers of this kind need less than half of what is read.
    assert 110 * world_size + 600 * len(table) * 1500 < 32 << 20


def test_what_no_pattern_holds_together_is_refused_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of(64, num_layers=1)
    check_size(table)
    monkeypatch.setattr("megalith.checkpoint.index.STATE_ROOM", 0)
    monkeypatch.setattr("megalith.checkpoint.index.INDEX_LIMIT", len(render(index_of(table))) - 1000)
    with pytest.raises(ValueError, match="the index of the checkpoint takes"):
        check_size(table)


def test_tensors_that_are_cut_alike_are_kept_once() -> None:
    world_size, num_layers = 256, 12
    table = table_of(world_size, num_layers)
    for kept in (table, parse(PATH, render(index_of(table))).tensors):
        layouts = {id(stored.pieces) for stored in kept.values()}
        # Copies are shared out to other ranks from layer to layer.
        assert len(layouts) <= len(LAYER) * TENSOR < len(table)


class Looked(tuple[StoredPiece, ...]):
    """The pieces of a tensor; counts how many are looked at."""

    looks = 0

    def __iter__(self) -> Iterator[StoredPiece]:
        Looked.looks += len(self)
        return super().__iter__()


def watched(table: Table) -> tuple[dict[str, Stored], int]:
    """The table, in which looks at pieces are counted from now on, and how many pieces it has."""
    Looked.looks = 0
    # One for each layout, as a table has them.
    layouts = {id(stored.pieces): Looked(stored.pieces) for stored in table.values()}
    counted = {name: Stored(s.dtype, s.shape, layouts[id(s.pieces)]) for name, s in table.items()}
    return counted, sum(len(stored.pieces) for stored in table.values())


class NoFile:
    """A shard that holds what it is asked for; what is filled is kept."""

    def __init__(self, table: Mapping[str, Stored], tensors: Mapping[str, Place]) -> None:
        self.table, self.tensors = table, tensors
        self.names = list(tensors)

    def kind(self, name: str) -> tuple[str, tuple[int, ...]]:
        return self.table[name].dtype, self.tensors[name].extent

    def fill(self, name: str, place: Place, target: Any) -> None:
        assert tuple(target.shape) == place.extent


@contextmanager
def no_files(monkeypatch: pytest.MonkeyPatch, table: Table) -> Iterator[list[str]]:
    """Checking and filling see files that were never written; the names of those that were opened."""
    opened: list[str] = []
    contents = by_file(table, index_of(table).files)

    @contextmanager
    def open_shard(path: Path, *, disk: Any) -> Iterator[NoFile]:
        opened.append(path.name)
        yield NoFile(table, contents[path.name])

    with monkeypatch.context() as patch:
        patch.setattr("megalith.checkpoint.fit.open_shard", open_shard)
        patch.setattr("megalith.checkpoint.verify.open_shard", open_shard)
        patch.setattr("megalith.checkpoint.verify.digest_of", lambda path, disk: Written(1 << 40, "0" * 64))
        yield opened


def test_checking_all_files_looks_at_each_piece_once(monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of(2048, num_layers=1)
    index = index_of(table)
    counted, num_pieces = watched(table)
    with no_files(monkeypatch, table) as opened:
        check_files(PATH.parent, Index(7, {}, {}, index.files, counted), list(index.files), disk=DISK)
    assert len(opened) == len(index.files) == 2048
    assert Looked.looks == num_pieces


def test_filling_looks_at_the_pieces_of_each_layout_once(monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of(2048, num_layers=2)
    counted, num_pieces = watched(table)
    # This run has a quarter of the ranks.
    pieces = held(77, 512, num_layers=2)
    with no_files(monkeypatch, table) as opened:
        fill(Ranks(), PATH.parent, Index(7, {}, {}, {}, counted), pieces, disk=DISK)
    # Pieces of four ranks to each of this one's, copies in the files of others.
    assert 4 <= len(opened) == len(set(opened)) < 64
    assert Looked.looks <= num_pieces / 2
    filled = dict.fromkeys(pieces, 0)
    for parts in parts_by_file(table, pieces).values():
        for part in parts:
            filled[part.name] += part.overlap.volume
    assert filled == {name: piece.local.numel() for name, piece in pieces.items()}


def test_a_rank_reads_only_its_own_part_of_what_all_hold(tmp_path: Path) -> None:
    world_size, num_layers = 3, 40

    def on_rank(rank: int) -> tuple[list[str], int, bool, int, int]:
        read = 0
        from_tensor = host_tree._bytes

        def counting(tensor: torch.Tensor) -> bytes:
            nonlocal read
            read += tensor.numel()
            return from_tensor(tensor)

        host_tree._bytes = counting
        pieces = {
            f"layers.{layer}.weight": Piece(torch.full((2, 3), float(rank)), (2 * world_size, 3), (2 * rank, 0))
            for layer in range(num_layers)
        }
        pieces["norm.weight"] = Piece(torch.zeros(5), (5,), (0,))
        planned = plan(Ranks(), pieces)
        for_plan, read = read, 0
        path = save(tmp_path, 1, pieces, {})
        index = parse(path / "index.json", (path / "index.json").read_bytes())
        read = 0
        check_fit(Ranks(), path, index, pieces, lambda name: False)
        return list(planned.own), planned.num_bytes, bool(planned.table), for_plan, read

    found = run_ranks(on_rank, world_size)
    names = [f"layers.{layer}.weight" for layer in range(num_layers)]
    assert [sorted(own) for own, *_ in found] == [sorted([*names, "norm.weight"]), sorted(names), sorted(names)]
    assert {num_bytes for _, num_bytes, *_ in found} == {num_layers * 18 * 4 + 5 * 4}
    assert [has_table for _, _, has_table, *_ in found] == [True, False, False]
    for *_, for_plan, for_fit in found[1:]:
        assert 0 < for_plan < 100 + num_layers
        assert 0 < for_fit < 100


def test_a_table_tells_its_bytes() -> None:
    table = table_of(64, num_layers=1)
    by_pieces = sum(4 * piece.place.volume for stored in table.values() for piece in stored.pieces)
    assert num_bytes_of(table) == by_pieces
    assert {file_of(rank) for rank in range(64)} >= by_file(table, index_of(table).files).keys()
