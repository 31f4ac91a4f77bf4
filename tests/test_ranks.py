"""What ranks say to each other on the host, through a tree of small groups."""

import json
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from megalith.host_tree import EVERYONE, WIDTH, make_tree
from megalith.ranks import Ranks
from tests.ranks import run_ranks

LIMIT = timedelta(seconds=50)


def values_of(rank: int) -> dict[str, Any]:
    """What one rank says: each something of another length."""
    return {"rank": rank, "text": "ä\n" * (7 * rank % 5) * (1 + 1000 * (rank == 2))}


# Ranks and ranks of a group: one level, several that are full, several whose last groups are not.
@pytest.mark.parametrize(("size", "width"), [(2, 2), (3, 4), (4, 2), (5, 2), (8, 2), (9, 3), (10, 3), (7, 6)])
def test_all_that_ranks_say_arrives_in_order(size: int, width: int) -> None:
    def on_rank(rank: int) -> tuple[int, ...]:
        ranks = Ranks(make_tree(timeout=LIMIT, width=width))
        all_values = [values_of(number) for number in range(size)]
        assert (ranks.rank, ranks.size) == (rank, size)
        for _ in range(2):
            assert ranks.gather(values_of(rank)) == all_values
            assert ranks.to_first(values_of(rank)) == (all_values if rank == 0 else [])
            assert ranks.from_first(values_of(rank)) == all_values[0]
            assert ranks.part_from_first(all_values if rank == 0 else []) == all_values[rank]
            assert ranks.largest([rank, -rank, 2**62 + rank]) == [size - 1, 0, 2**62 + size - 1]
            assert ranks.is_same("alike") and not ranks.is_same("alike" if rank else "other")
            assert not ranks.is_same("other" if rank == size - 1 else "alike")
        assert ranks.tree is not None
        sizes = tuple(dist.get_world_size(group) for group in ranks.tree.groups)
        # Ranks that are in different numbers of groups go on making groups of the same names.
        again = Ranks(make_tree(timeout=LIMIT, width=size))
        assert again.gather(rank) == list(range(size))
        return sizes

    for rank, sizes in enumerate(run_ranks(on_rank, size)):
        assert max(sizes) <= width
        level = 1
        while rank % width**level == 0 and width**level < size:
            level += 1
        assert len(sizes) == level


def test_ranks_wait_for_the_last_one() -> None:
    def on_rank(rank: int) -> tuple[float, float]:
        ranks = Ranks(make_tree(timeout=LIMIT, width=2))
        if rank == 4:
            time.sleep(0.5)
        came = time.monotonic()
        ranks.wait_for_all()
        return came, time.monotonic()

    times = run_ranks(on_rank, 5)
    assert max(came for came, _ in times) <= min(went for _, went in times)


def test_all_that_have_joined_have_a_tree_of_their_own_if_they_are_many_or_on_devices() -> None:
    def on_rank(rank: int) -> list[bool]:
        found = []
        for on_host in (True, False):
            with EVERYONE.joined(timeout=LIMIT, on_host=on_host):
                found.append(dist.group.WORLD in EVERYONE.tree().groups)
                assert Ranks().gather(rank) == Ranks(EVERYONE.patient_tree()).gather(rank) == [0, 1]
                assert EVERYONE.patient_tree() is EVERYONE.patient_tree() is not EVERYONE.tree()
        return found

    assert run_ranks(on_rank, 2) == [[True, False]] * 2


def test_more_ranks_than_a_group_holds_are_a_tree_without_being_asked() -> None:
    size = WIDTH + 2

    def on_rank(rank: int) -> tuple[int, list[int]]:
        with EVERYONE.joined(timeout=LIMIT, on_host=True):
            return len(EVERYONE.tree().groups), Ranks().gather(rank)

    assert run_ranks(on_rank, size) == [(2 if rank in (0, WIDTH) else 1, list(range(size))) for rank in range(size)]


def test_a_rank_that_does_not_come_is_waited_for_as_long_as_was_said() -> None:
    def on_rank(rank: int) -> str:
        ranks = Ranks(make_tree(timeout=timedelta(seconds=1), width=2))
        ranks.wait_for_all()
        if rank == 3:
            return ""
        try:
            ranks.wait_for_all()
        except RuntimeError as error:
            return str(error)
        return "it came"

    said = run_ranks(on_rank, 4)
    assert all("imed out" in text or "closed" in text for text in said[:3]), said


def test_a_value_is_what_json_makes_of_it_also_of_one_rank() -> None:
    def on_rank(rank: int) -> list[Any]:
        return Ranks().gather((rank, {1: "one"}))

    assert run_ranks(on_rank, 2) == [[[0, {"1": "one"}], [1, {"1": "one"}]]] * 2
    assert Ranks().gather((0, {1: "one"})) == [json.loads('[0, {"1": "one"}]')]
    assert Ranks().largest([3, 4]) == [3, 4] and Ranks().is_same("x")
