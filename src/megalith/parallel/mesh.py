"""How many ranks there are, what each is for, and joining them.

Rank order is Megatron-LM's, with context parallelism in its place: tensor fastest, then context, data, pipeline.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import product

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megalith.launch import STORE_VARIABLE
from megalith.monitor.peers import Peer, this_process
from megalith.parallel.rendezvous import call_roll, on_one_host, open_store

# The axes of the mesh, outermost first.
AXES = ("pipeline", "data", "context", "tensor")


@dataclass(frozen=True)
class Layout:
    """How many ways the model is cut along each axis, and this rank's place."""

    world_size: int
    rank: int
    local_rank: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1

    @property
    def data(self) -> int:
        """Replicas of the model, each with batches of its own."""
        return self.world_size // (self.tensor * self.pipeline * self.context)

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    def place(self, axis: str) -> int:
        """This rank's coordinate along an axis."""
        inner = 1
        for other in reversed(AXES):
            if other == axis:
                return self.rank // inner % self.sizes[axis]
            inner *= self.sizes[other]
        raise ValueError(f"axis = {axis}: must be one of {', '.join(AXES)}")

    def ranks_along(self, *axes: str) -> list[int]:
        """The ranks that differ from this one along these axes only, in order."""
        ranks = []
        for places in product(*(range(self.sizes[axis]) for axis in AXES)):
            if all(axis in axes or place == self.place(axis) for axis, place in zip(AXES, places, strict=True)):
                rank = 0
                for axis, place in zip(AXES, places, strict=True):
                    rank = rank * self.sizes[axis] + place
                ranks.append(rank)
        return ranks

    @property
    def is_first_stage(self) -> bool:
        return self.place("pipeline") == 0

    @property
    def is_last_stage(self) -> bool:
        return self.place("pipeline") == self.pipeline - 1


@dataclass(frozen=True)
class Groups:
    """The process groups of this rank; None where the group would be this rank alone."""

    mesh: DeviceMesh | None = None
    tensor: ProcessGroup | None = None
    context: ProcessGroup | None = None
    data: ProcessGroup | None = None
    pipeline: ProcessGroup | None = None
    replicas: ProcessGroup | None = None  # data x context: the ranks that hold the same weights
    model: ProcessGroup | None = None  # pipeline x tensor: the ranks that together hold one copy of the model
    world: ProcessGroup | None = None
    embedding: ProcessGroup | None = None  # first and last stage, where the tied table stands twice

    def total_over_stages(self, number: int) -> int:
        """The sum of what each pipeline stage has."""
        if self.pipeline is None:
            return number
        total = torch.tensor(number, dtype=torch.int64)
        dist.all_reduce(total, group=self.pipeline)
        return int(total)

    def agree(self, numbers: list[int]) -> list[int]:
        """The largest of each number over all ranks: what one rank knows, all know."""
        if self.world is None:
            return numbers
        agreed = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self.world)
        return [int(number) for number in agreed]


def ranks_in(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, world size, local rank) that torchrun or SLURM announces in the environment; (0, 1, 0) without either."""
    for rank, world, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ):
        if rank in environment and world in environment:
            return int(environment[rank]), int(environment[world]), int(environment.get(local, "0"))
    return 0, 1, 0


def make_layout(environment: Mapping[str, str], *, tensor: int, pipeline: int, context: int = 1) -> Layout:
    """This process's layout. The products were checked by check.py."""
    rank, world_size, local_rank = ranks_in(environment)
    return Layout(world_size, rank, local_rank, tensor, pipeline, context)


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device of this rank. wanted: auto, cpu or cuda.

    Raises ValueError if cuda is asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device = cuda: this machine has no usable CUDA device. Use --device cpu or auto.")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@dataclass(frozen=True)
class Company:
    """The ranks as processes, and the store through which they met; no store where they share memory."""

    peers: tuple[Peer, ...] = ()
    store: Store | None = None


@contextmanager
def joined(
    layout: Layout, device: torch.device, *, join_timeout: float = 300.0, timeout: float = 1860.0
) -> Iterator[Company]:
    """While entered, this process is in the process group: NCCL with GPUs, gloo without.

    A single process joins none, and a group that stands already is left as it is. join_timeout: seconds that the ranks
    wait for each other; ValueError then names the missing. timeout: seconds after which a collective fails.
    """
    if dist.is_initialized():
        yield Company()
        return
    if layout.world_size == 1:
        yield Company((this_process(0),))
        return
    if sys.platform == "linux" and on_one_host(os.environ, layout.world_size):
        # Else both would listen on the interface of the host's name.
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
    store = open_store(os.environ, rank=layout.rank, world_size=layout.world_size, seconds=join_timeout)
    peers = call_roll(store, layout.rank, layout.world_size, seconds=join_timeout)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=layout.rank,
        world_size=layout.world_size,
        timeout=timedelta(seconds=timeout),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield Company(tuple(peers), None if STORE_VARIABLE in os.environ else store)
    finally:
        dist.destroy_process_group()


def make_groups(layout: Layout, device: torch.device) -> Groups:
    """All process groups, from one DeviceMesh. Every rank calls it, after `join`."""
    if layout.world_size == 1:
        return Groups()
    mesh = init_device_mesh(device.type, tuple(layout.sizes.values()), mesh_dim_names=AXES)
    along = {axis: mesh.get_group(axis) if size > 1 else None for axis, size in layout.sizes.items()}
    return Groups(
        mesh=mesh,
        tensor=along["tensor"],
        context=along["context"],
        data=along["data"],
        pipeline=along["pipeline"],
        replicas=_group_over(layout, "data", "context"),
        model=_group_over(layout, "pipeline", "tensor"),
        world=dist.group.WORLD,
        embedding=_embedding_group(layout),
    )


def _group_over(layout: Layout, *axes: str) -> ProcessGroup | None:
    """The group of the ranks along several axes. Groups are made by all ranks in one order."""
    mine: ProcessGroup | None = None
    made: set[tuple[int, ...]] = set()
    for rank in range(layout.world_size):
        ranks = tuple(_at(layout, rank).ranks_along(*axes))
        if len(ranks) > 1 and ranks not in made:
            made.add(ranks)
            group = dist.new_group(list(ranks))
            if layout.rank in ranks:
                mine = group
    return mine


def _embedding_group(layout: Layout) -> ProcessGroup | None:
    mine: ProcessGroup | None = None
    if layout.pipeline == 1:
        return None
    for rank in range(layout.world_size // layout.pipeline):
        along = _at(layout, rank).ranks_along("pipeline")
        group = dist.new_group([along[0], along[-1]])
        if layout.rank in (along[0], along[-1]):
            mine = group
    return mine


def _at(layout: Layout, rank: int) -> Layout:
    return Layout(layout.world_size, rank, 0, layout.tensor, layout.pipeline, layout.context)
