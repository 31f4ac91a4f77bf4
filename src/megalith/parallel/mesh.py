"""How many ranks there are, what each is for, and joining them.

Rank order is Megatron-LM's, with context parallelism in its place: tensor fastest, then context, data, pipeline.
"""

import hashlib
import math
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import ProcessGroup

from megalith.descriptors import descriptor_remedy
from megalith.host_tree import EVERYONE
from megalith.launch import STORE_VARIABLE, ranks_in
from megalith.monitor.peers import Peer, this_process
from megalith.parallel.rendezvous import call_roll, on_one_host, open_store
from megalith.terminal import say

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
        return self.rank // self._stride(axis) % int(getattr(self, axis))

    def ranks_along(self, *axes: str) -> list[int]:
        """The ranks that differ from this one along these axes only, in order."""
        first = self.rank - sum(self.place(axis) * self._stride(axis) for axis in axes)
        return [first + offset for offset in self._offsets(axes)]

    def divided(self, *axes: str) -> list[list[int]]:
        """All ranks, each with those that differ from it along these axes only."""
        within = self._offsets(axes)
        firsts = self._offsets([axis for axis in AXES if axis not in axes])
        return [[first + offset for offset in within] for first in firsts]

    def _stride(self, axis: str) -> int:
        """How far neighbours along an axis are apart, in ranks."""
        if axis not in AXES:
            raise ValueError(f"axis = {axis}: must be one of {', '.join(AXES)}")
        return math.prod(getattr(self, inner) for inner in AXES[AXES.index(axis) + 1 :])

    def _offsets(self, axes: Collection[str]) -> list[int]:
        """How far the ranks along these axes are from the first of them, in order."""
        offsets = [0]
        for axis in AXES:
            if axis in axes:
                stride = self._stride(axis)
                offsets = [offset + place * stride for offset in offsets for place in range(getattr(self, axis))]
        return offsets

    @property
    def is_first_stage(self) -> bool:
        return self.place("pipeline") == 0


@dataclass(frozen=True)
class Groups:
    """The process groups of this rank; None where the group would be this rank alone."""

    tensor: ProcessGroup | None = None
    context: ProcessGroup | None = None
    pipeline: ProcessGroup | None = None
    replicas: ProcessGroup | None = None  # data x context: the ranks that hold the same weights
    shards: ProcessGroup | None = None  # of these, those that share one copy out, where they keep several
    copies: ProcessGroup | None = None  # and those that hold the same shard of each copy
    world: ProcessGroup | None = None
    embedding: ProcessGroup | None = None  # first and last stage, where the tied table stands twice


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
    """The ranks as processes, and the store through which they met; no store where they share memory.

    Of ranks that met in a store only rank 0 knows all others: the others know rank 0 and themselves.
    """

    peers: tuple[Peer, ...] = ()
    store: Store | None = None


@contextmanager
def joined(
    layout: Layout, device: torch.device, *, join_timeout: float = 300.0, timeout: float = 1860.0
) -> Iterator[Company]:
    """While entered, this process is in the process group: NCCL with GPUs, gloo without. On the host ranks speak
    through a tree of small groups of gloo's.

    A single process joins none, and a group that stands already is left as it is. join_timeout: seconds that the ranks
    wait for each other; ValueError then names the missing. timeout: seconds after which a collective fails.

    A ValueError that comes out of it is said here, by the first of the ranks that raise the same, and goes on wordless.
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
    in_memory = STORE_VARIABLE in os.environ
    whole = in_memory or layout.rank == 0
    peers = call_roll(store, layout.rank, layout.world_size, seconds=join_timeout, whole=whole)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=layout.rank,
        world_size=layout.world_size,
        timeout=timedelta(seconds=timeout),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        with EVERYONE.joined(timeout=timedelta(seconds=timeout), on_host=device.type == "cpu"):
            yield Company(tuple(peers), None if in_memory else store)
    except ValueError as error:
        if descriptor_remedy(str(error)) is not None:
            raise  # which is said with more than it says
        if _is_first_to_say(str(error), store):
            for line in str(error).splitlines():
                say(line)
        raise ValueError from error
    finally:
        dist.destroy_process_group()


def _is_first_to_say(text: str, store: Store) -> bool:
    """Whether no other rank has had the same to say."""
    try:
        return store.add(f"megalith/said/{hashlib.sha256(text.encode(errors='replace')).hexdigest()}", 1) == 1
    except RuntimeError:
        return True  # the store went with its keeper


def make_groups(layout: Layout, *, timeout: float, shard_size: int | None = None) -> Groups:
    """All process groups. Every rank calls it while `joined`.

    timeout: seconds after which a collective fails in any of them. shard_size: ranks that share out one copy of the
    weights, where replicas keep several; it divides them.
    """
    if layout.world_size == 1:
        return Groups()
    maker = _GroupMaker(layout, timedelta(seconds=timeout))
    tensor, context, pipeline = maker.along("tensor"), maker.along("context"), maker.along("pipeline")
    replicas, divided = maker.along("data", "context"), layout.divided("data", "context")
    shards = copies = None
    if shard_size is not None and shard_size != len(divided[0]):
        starts = range(0, len(divided[0]), shard_size)
        shards = maker.of([ranks[start : start + shard_size] for ranks in divided for start in starts])
        copies = maker.of([ranks[place::shard_size] for ranks in divided for place in range(shard_size)])
    embedding = pipeline
    if layout.pipeline > 2:
        between = [part for ranks in layout.divided("pipeline") for part in ([ranks[0], ranks[-1]], ranks[1:-1])]
        made = maker.of(between)
        embedding = made if layout.place("pipeline") in (0, layout.pipeline - 1) else None
    return Groups(tensor, context, pipeline, replicas, shards, copies, dist.group.WORLD, embedding)


class _GroupMaker:
    """Makes groups; all ranks ask for the same ones in the same order."""

    def __init__(self, layout: Layout, timeout: timedelta) -> None:
        self._layout, self._timeout = layout, timeout

    def along(self, *axes: str) -> ProcessGroup | None:
        """The group of the ranks along several axes; the world's own if that is everybody, None for this rank alone."""
        size = math.prod(self._layout.sizes[axis] for axis in axes)
        if size == self._layout.world_size:
            return dist.group.WORLD
        return self.of(self._layout.divided(*axes)) if size > 1 else None

    def of(self, divided: list[list[int]]) -> ProcessGroup:
        """The group of these that this rank is in; one call makes it, however many there are.

        Every rank must be in one, for torch derives names from how many groups a process has made.
        """
        world = dist.group.WORLD
        assert world is not None
        if world.bound_device_id is not None:
            # NCCL splits the communicator that stands, once for all these groups.
            group = dist.split_group(split_ranks=divided, timeout=self._timeout)
            assert group is not None
            return group
        mine = next(ranks for ranks in divided if self._layout.rank in ranks)
        made: ProcessGroup = dist.new_group(mine, timeout=self._timeout, use_local_synchronization=True)
        return made
