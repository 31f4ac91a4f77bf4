"""Digests that no flipped bit passes, and who is named when they differ."""

import numpy as np
import pytest
import torch

from megalith.parallel.digest import digest
from megalith.parallel.replicas import Difference, all_alike, differences, folded

KINDS = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int64]
SHAPES: list[tuple[int, ...]] = [(), (1,), (7,), (3, 5), (700, 9), (4096,)]


def filled(shape: tuple[int, ...], kind: torch.dtype) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 50).to(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_changes_the_digest(kind: torch.dtype) -> None:
    random = np.random.RandomState(0)
    for shape in SHAPES:
        tensor = filled(shape, kind)
        before = int(digest(tensor))
        data = tensor.reshape(-1).view(torch.uint8)
        num_bits = 8 * data.numel()
        flips = range(num_bits) if num_bits <= 256 else random.choice(num_bits, 100, replace=False).tolist()
        for bit in flips:
            data[bit // 8] ^= 1 << bit % 8
            assert int(digest(tensor)) != before, (shape, bit)
            data[bit // 8] ^= 1 << bit % 8
        assert int(digest(tensor)) == before


def test_a_digest_does_not_depend_on_where_the_tensor_lies() -> None:
    tensor = filled((700, 9), torch.float32)
    beside = torch.cat([torch.zeros(1), tensor.reshape(-1)])[1:].view(700, 9)
    assert beside.storage_offset() % 2 == 1
    strided = tensor.t().contiguous().t()
    assert int(digest(tensor)) == int(digest(beside)) == int(digest(strided))


def test_swapped_rows_change_the_digest() -> None:
    tensor = filled((64, 1024), torch.float32)
    assert int(digest(tensor)) != int(digest(tensor.flip(0)))


def test_nothing_has_a_digest_too() -> None:
    assert int(digest(torch.empty(0, 3))) == 0


ALIKE = {"stage 0": {"a": 1, "b": 2}}
OTHER = {"stage 0": {"a": 1, "b": 3}}


def test_of_three_the_one_that_differs_is_named_with_its_tensor() -> None:
    assert differences([ALIKE, OTHER, ALIKE]) == [Difference((1,), True, ("b",))]


def test_of_two_neither_can_be_told_right() -> None:
    assert differences([ALIKE, OTHER]) == [Difference((0, 1), False, ("b",))]
    assert differences([ALIKE, OTHER, ALIKE, OTHER]) == [Difference((0, 1, 2, 3), False, ("b",))]


def test_ranks_that_hold_other_things_are_not_compared() -> None:
    assert differences([ALIKE, {"stage 1": {"a": 7, "b": 2}}, ALIKE]) == []


def test_a_rank_that_a_majority_convicts_settles_a_tie() -> None:
    tables = [{**ALIKE, "all": {"norm": 5}} for _ in range(4)]
    tables[2] = {"stage 0": {"a": 9, "b": 2}, "all": {"norm": 6}}
    for rank in (0, 1):
        tables[rank]["stage 1"] = tables[rank].pop("stage 0")
    assert differences(tables) == [Difference((2,), True, ("norm",))]


def test_all_are_alike_if_no_two_that_hold_the_same_differ() -> None:
    elsewhere = {"stage 1": {"a": 7}}
    assert all_alike([folded(table) for table in (ALIKE, elsewhere, ALIKE)])
    assert not all_alike([folded(table) for table in (ALIKE, elsewhere, OTHER)])
