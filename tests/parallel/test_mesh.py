"""Which ranks are in which group, for how long a collective of theirs may take, and what making them costs."""

from dataclasses import dataclass, fields
from datetime import timedelta
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalith.launch import ranks_in
from megalith.parallel.mesh import AXES, Groups, Layout, make_groups
from megalith.parallel.shard import replica_mesh
from tests.ranks import run_ranks

SHAPES = [shape for shape in product((1, 2, 3), repeat=4) if 1 < shape[0] * shape[1] * shape[2] * shape[3] <= 24]
SECONDS = 5461.0
MANY = 4096

Members = dict[str, list[int] | None]


def layout_of(pipeline: int, data: int, context: int, tensor: int, rank: int) -> Layout:
    return Layout(pipeline * data * context * tensor, rank, 0, tensor=tensor, pipeline=pipeline, context=context)


def along(layout: Layout, *axes: str) -> list[int]:
    """By looking at every rank: those whose places differ along these axes only."""
    sizes = list(layout.sizes.values())
    places = list(product(*map(range, sizes)))
    mine = places[layout.rank]
    return [r for r, at in enumerate(places) if all(a in axes or at[i] == mine[i] for i, a in enumerate(AXES))]


def expected(layout: Layout, shard_size: int | None) -> Members:
    """The members of each group of a rank; None for no group."""
    found: Members = {axis: along(layout, axis) for axis in ("tensor", "context", "pipeline")}
    replicas = along(layout, "data", "context")
    found |= {"replicas": replicas, "world": list(range(layout.world_size)), "shards": None, "copies": None}
    if shard_size is not None and shard_size != len(replicas):
        row, place = divmod(replicas.index(layout.rank), shard_size)
        found |= {"shards": replicas[row * shard_size :][:shard_size], "copies": replicas[place::shard_size]}
    stages = along(layout, "pipeline")
    found["embedding"] = sorted({stages[0], stages[-1]}) if layout.rank in (stages[0], stages[-1]) else None
    return {
        name: ranks if ranks is not None and (len(ranks) > 1 or name == "shards") else None
        for name, ranks in found.items()
    }


def members(groups: Groups) -> Members:
    found = {field.name: getattr(groups, field.name) for field in fields(groups)}
    return {name: None if group is None else dist.get_process_group_ranks(group) for name, group in found.items()}


def timeouts(groups: list[Any]) -> set[timedelta]:
    return {group._get_backend(torch.device("cpu")).options._timeout for group in groups if group is not None}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_groups_hold_the_ranks_that_differ_along_their_axes_only(shape: tuple[int, int, int, int]) -> None:
    world_size = shape[0] * shape[1] * shape[2] * shape[3]
    for rank in range(world_size):
        layout = layout_of(*shape, rank)
        for axes in (("tensor",), ("context",), ("data",), ("pipeline",), ("data", "context"), ("pipeline", "tensor")):
            assert layout.ranks_along(*axes) == along(layout, *axes)
            divided = layout.divided(*axes)
            assert layout.ranks_along(*axes) in divided
            assert sorted(member for ranks in divided for member in ranks) == list(range(world_size))


def test_an_axis_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="axis = expert: must be one of pipeline, data, context, tensor"):
        Layout(2, 0, 0).place("expert")


@pytest.mark.parametrize(
    ("shape", "shard_size"),
    [((3, 2, 1, 1), 1), ((1, 2, 2, 1), 2), ((2, 2, 1, 2), None), ((1, 4, 1, 1), None)],
    ids=["pp3-dp2-shard1", "dp2-cp2-shard2", "pp2-dp2-tp2", "dp4"],
)
def test_every_group_has_the_jobs_timeout(shape: tuple[int, int, int, int], shard_size: int | None) -> None:
    def on_rank(rank: int) -> tuple[Members, set[timedelta], set[timedelta], int]:
        layout = layout_of(*shape, rank)
        groups = make_groups(layout, timeout=SECONDS, shard_size=shard_size)
        mesh = replica_mesh(groups, torch.device("cpu"))
        parts = [getattr(groups, field.name) for field in fields(groups)]
        own = [group for group in parts if group is not dist.group.WORLD]
        total = torch.ones(())
        for group in own:
            if group is not None:
                dist.all_reduce(total, group=group)
        made_again = make_groups(layout, timeout=SECONDS, shard_size=shard_size)
        assert members(made_again) == members(groups)
        of_mesh = [group for group in mesh.get_all_groups() if group is not dist.group.WORLD]
        return members(groups), timeouts(own), timeouts(of_mesh), int(total)

    world_size = shape[0] * shape[1] * shape[2] * shape[3]
    for rank, (found, own, of_mesh, total) in enumerate(run_ranks(on_rank, world_size)):
        want = expected(layout_of(*shape, rank), shard_size)
        assert found == want
        assert own <= {timedelta(seconds=SECONDS)} and of_mesh <= own
        sizes = [len(ranks) for name, ranks in want.items() if ranks is not None and len(ranks) < world_size]
        assert total == torch.tensor(sizes).prod()


@dataclass
class Made:
    """Stands in for a process group: there are no 4,096 processes."""

    ranks: list[int]
    timeouts: list[timedelta]
    bound_device_id: torch.device | None = None


@pytest.mark.parametrize("splits", [False, True], ids=["gloo", "nccl"])
@pytest.mark.parametrize("rank", [0, 1, 2048, MANY - 1])
def test_making_the_groups_of_4096_ranks_costs_a_call_for_each_kind(
    rank: int, splits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Made] = []

    def new_group(ranks: list[int], *, timeout: timedelta, use_local_synchronization: bool) -> Made:
        assert use_local_synchronization and not splits
        calls.append(Made(ranks, [timeout]))
        return calls[-1]

    def split_group(*, split_ranks: list[list[int]], timeout: timedelta) -> Made:
        assert splits and sorted(member for ranks in split_ranks for member in ranks) == list(range(MANY))
        calls.append(Made(next(ranks for ranks in split_ranks if rank in ranks), [timeout]))
        return calls[-1]

    world = Made(list(range(MANY)), [], torch.device("cuda", 0) if splits else None)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=world))
    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(dist, "split_group", split_group)
    layout = Layout(MANY, rank, 0, tensor=8, pipeline=16, context=2)
    groups = make_groups(layout, timeout=SECONDS, shard_size=8)
    held: dict[str, Any] = {field.name: getattr(groups, field.name) for field in fields(groups)}
    found = {name: None if group is None else group.ranks for name, group in held.items()}
    assert found == expected(layout, 8)
    assert len(calls) == 7 and all(made.timeouts == [timedelta(seconds=SECONDS)] for made in calls)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK = x: is no rank"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK = 3: must be below WORLD_SIZE = 2"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "-1"}, "SLURM_NTASKS = -1: is no rank"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": ""}, "SLURM_LOCALID = : is no rank"),
    ],
)
def test_ranks_that_no_launcher_announces_are_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ranks_in(environment)


def test_ranks_are_those_that_a_launcher_announces() -> None:
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
    assert ranks_in({}) == (0, 1, 0)
    assert ranks_in(slurm) == (5, 8, 1)
    assert ranks_in({**slurm, "RANK": "1", "WORLD_SIZE": "2"}) == (1, 2, 0)
