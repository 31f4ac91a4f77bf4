"""Pieces: what covers a tensor, and who writes what."""

import itertools
import random

import pytest
import torch

from megalith.checkpoint.pieces import Piece, Place, announce, check_cover, file_of, share_out, whole


def covers(shape: tuple[int, ...], places: list[Place]) -> bool:
    """Whether the places cover a tensor once, found by counting on every element."""
    counts = torch.zeros(shape, dtype=torch.int64)
    for place in places:
        counts[place.slices((0,) * len(shape))] += 1
    return bool((counts == 1).all())


def grid(shape: tuple[int, ...], cuts: list[list[int]]) -> list[Place]:
    """All cells of a tensor that is cut at those indices of every dimension."""
    sides = [itertools.pairwise([0, *sorted(set(cut)), size]) for cut, size in zip(cuts, shape, strict=True)]
    return [Place(tuple(a for a, _ in cell), tuple(b - a for a, b in cell)) for cell in itertools.product(*sides)]


def test_a_cover_is_told_from_gaps_and_overlaps() -> None:
    random.seed(0)
    outcomes = []
    for _ in range(400):
        shape = tuple(random.randint(1, 6) for _ in range(random.randint(1, 3)))
        places = grid(shape, [random.sample(range(1, n), random.randint(0, n - 1)) if n > 1 else [] for n in shape])
        random.shuffle(places)
        if random.random() < 0.6:
            victim = random.randrange(len(places))
            offset, extent = places[victim]
            dim = random.randrange(len(shape))
            grown = random.choice([extent[dim] - 1, extent[dim] + 1, extent[dim]])
            if 0 < grown <= shape[dim] - offset[dim]:
                places[victim] = Place(offset, (*extent[:dim], grown, *extent[dim + 1 :]))
            elif random.random() < 0.5:
                del places[victim]
        expected = covers(shape, places)
        outcomes.append(expected)
        if expected:
            check_cover("w", shape, places)
        else:
            with pytest.raises(ValueError, match=r"w: the parts"):
                check_cover("w", shape, places)
    assert 100 < sum(outcomes) < 350


def test_scalars_and_empty_tensors_are_covered() -> None:
    check_cover("step", (), [Place((), ())])
    check_cover("empty", (0, 3), [])
    with pytest.raises(ValueError, match="hold 0 of 1"):
        check_cover("step", (), [])


def test_copies_are_written_once_and_shared_out_evenly() -> None:
    tensors = {f"layers.{n}.weight": whole(torch.zeros(10, n + 1)) for n in range(40)}
    table = share_out([announce(tensors) for _ in range(4)])
    written = {file_of(rank): 0 for rank in range(4)}
    for stored in table.values():
        (piece,) = stored.pieces
        written[piece.file] += piece.place.volume
    assert sum(written.values()) == sum(piece.local.numel() for piece in tensors.values())
    assert max(written.values()) < 1.1 * min(written.values())


def test_a_piece_is_written_by_a_rank_that_holds_it() -> None:
    table = torch.zeros(4, 6)
    announced = [announce({"w": Piece(table[:, :3], (4, 6), (0, 3 * (rank % 2)))}) for rank in range(4)]
    (left, right) = share_out(announced)["w"].pieces
    assert (left.place.offset, right.place.offset) == ((0, 0), (0, 3))
    assert left.file in (file_of(0), file_of(2)) and right.file in (file_of(1), file_of(3))


def test_disagreeing_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"w is .*F32.*\(4,\).* on one rank and .*F64.* on rank 1"):
        share_out([announce({"w": whole(torch.zeros(4))}), announce({"w": whole(torch.zeros(4).double())})])
    with pytest.raises(ValueError, match="hold 2 of 4 elements"):
        share_out([announce({"w": Piece(torch.zeros(2), (4,), (2,))}), {}])
    with pytest.raises(ValueError, match="overlap"):
        share_out([announce({"w": Piece(torch.zeros(3), (4,), (offset,))}) for offset in (0, 1)])


@pytest.mark.parametrize(
    "local, shape, offset",
    [((2,), (4,), (3,)), ((2,), (4,), (-1,)), ((2,), (4, 4), (0, 0)), ((2,), (4,), (0, 0)), ((2, 5), (4, 4), (0, 0))],
)
def test_a_part_outside_of_the_whole_is_refused(
    local: tuple[int, ...], shape: tuple[int, ...], offset: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="shape"):
        Piece(torch.zeros(local), shape, offset)


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.complex64 cannot be stored"):
        whole(torch.zeros(2, dtype=torch.complex64))
    for name in ("", "../w", "w\n", "a b", "x" * 300, "/etc/passwd", "naïve"):
        with pytest.raises(ValueError, match="tensor name"):
            announce({name: whole(torch.zeros(1))})
