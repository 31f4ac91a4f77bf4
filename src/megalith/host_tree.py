"""All ranks as a tree of small process groups on the host, through which they send each other a few bytes.

Gloo connects each rank of a group with each other one when the group is made, and sends what is reduced or gathered by
all around them, one after the other. In one group 4,096 ranks would hold 4,095 sockets each, find 16.8 million
addresses in one store, and wait for 8,190 messages at each step. Here neighbours form groups of WIDTH, the firsts of
neighbouring groups another one, and so on: a rank holds some 15 sockets a level. What all have to say goes up through
three levels, from all of a group to its first at once, and what follows from it comes down again.
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# 4,096 ranks are three levels of 16.
WIDTH = 16
# Of what two ranks send each other here; stages of a pipeline do in the same group.
TAG = 16
# For a rank whose disk does not return, while steps go on beside that: the watch ends it, and says where it was.
LONGEST_WAIT = timedelta(days=7)


@dataclass(frozen=True)
class Tree:
    """One rank's place in the tree. Every method is called by all ranks in the same order.

    groups: those that this rank is in, its neighbours' first; each group's first rank is in the next one.
    """

    rank: int
    size: int
    groups: tuple[ProcessGroup, ...]
    width: int = WIDTH

    def largest(self, numbers: Tensor) -> Tensor:
        """The largest of each number over all ranks."""
        for group in self.groups:
            # A reduction would go around the ranks of a group, one after the other.
            if found := _gather_alike(numbers, group):
                numbers = torch.stack(found).amax(0)
        for group in reversed(self.groups):
            dist.broadcast(numbers, group=group, group_src=0)
        return numbers

    def to_first(self, part: bytes) -> list[bytes]:
        """The parts of all ranks, in order, on rank 0; nothing on the others."""
        parts = [part]
        for group in self.groups:
            parts = [one for packed in _gather(_pack(parts), group) for one in _unpack(packed)]
        return parts

    def from_first(self, data: bytes) -> bytes:
        """The bytes of rank 0, of which there is one at least; those of the others are not looked at."""
        for group in reversed(self.groups):
            data = _broadcast(data, group)
        return data

    def gather(self, part: bytes) -> list[bytes]:
        """The parts of all ranks, in order."""
        return _unpack(self.from_first(_pack(self.to_first(part))))

    def part_from_first(self, parts: Sequence[bytes]) -> bytes:
        """The part that rank 0 has for this rank. parts: one for each rank, on rank 0."""
        for level, group in reversed([*enumerate(self.groups)]):
            span = self.width**level  # ranks that one of the group stands for
            packed = [_pack(parts[start : start + span]) for start in range(0, len(parts), span)]
            parts = _unpack(_scatter(packed, group))
        return parts[0]


ALONE = Tree(0, 1, ())


def make_tree(*, timeout: timedelta, width: int = WIDTH) -> Tree:
    """A tree of all ranks, with groups of its own, which end with the process group; every rank calls it.

    A rank without a process group is alone.

    timeout: after which a rank no longer waits for the others of a group.
    """
    if not dist.is_initialized():
        return ALONE
    rank, size = dist.get_rank(), dist.get_world_size()
    groups: list[ProcessGroup] = []
    span = 1
    while span < size:
        first = rank - rank % (span * width)
        is_first_below = rank % span == 0
        # The others make one of themselves alone, and all stay: torch derives names from how many a process has.
        members = [*range(first, min(first + span * width, size), span)] if is_first_below else [rank]
        group = dist.new_group(members, timeout=timeout, backend="gloo", use_local_synchronization=True)
        if is_first_below:
            groups.append(group)
        span *= width
    return Tree(rank, size, tuple(groups), width)


def tree_of(group: ProcessGroup) -> Tree:
    """The ranks of a group that stands, few enough to be in one."""
    return Tree(dist.get_rank(group), dist.get_world_size(group), (group,))


class Everyone:
    """The trees of all ranks that have joined."""

    def __init__(self) -> None:
        self._tree: Tree | None = None
        self._patient: tuple[ProcessGroup, Tree] | None = None

    def tree(self) -> Tree:
        """What `joined` has made; where others have made the process group, its own."""
        if self._tree is not None:
            return self._tree
        world = dist.group.WORLD
        return ALONE if world is None or world.size() == 1 else tree_of(world)

    def patient_tree(self) -> Tree:
        """Another one, in which ranks wait for each other as long as it takes. Every rank calls it."""
        world = dist.group.WORLD
        assert world is not None, "ranks have joined"
        if self._patient is None or self._patient[0] is not world:
            self._patient = world, make_tree(timeout=LONGEST_WAIT)
        return self._patient[1]

    @contextmanager
    def joined(self, *, timeout: timedelta, on_host: bool) -> Iterator[None]:
        """While entered, all ranks have a tree. on_host: the process group itself is gloo's, which serves if small."""
        try:
            if not on_host or dist.get_world_size() > WIDTH:
                self._tree = make_tree(timeout=timeout)
            yield
        finally:
            # Groups that outlive the process group have threads that nobody ends: the interpreter aborts as it exits.
            self._tree = self._patient = None


EVERYONE = Everyone()


def _gather_alike(tensor: Tensor, group: ProcessGroup) -> list[Tensor]:
    """The tensors of all ranks of a group, of one shape, in order, on its first; nothing on the others."""
    ranks = dist.get_world_size(group) if dist.get_rank(group) == 0 else 0
    received = [torch.empty_like(tensor) for _ in range(ranks)]
    dist.gather(tensor, received or None, group=group, group_dst=0)
    return received


def _gather(data: bytes, group: ProcessGroup) -> list[bytes]:
    """What all ranks of a group have, in order, on its first; nothing on the others."""
    lengths = _gather_alike(torch.tensor([len(data)]), group)
    if not lengths:
        dist.send(_tensor(data), group=group, group_dst=0, tag=TAG)
        return []
    received = [_room(int(length)) for length in lengths[1:]]
    for work in [dist.irecv(room, group=group, group_src=rank, tag=TAG) for rank, room in enumerate(received, 1)]:
        _wait(work)
    return [data, *map(_bytes, received)]


def _broadcast(data: bytes, group: ProcessGroup) -> bytes:
    """What the first rank of a group has."""
    length = torch.tensor([len(data)])
    dist.broadcast(length, group=group, group_src=0)
    sent = _tensor(data) if dist.get_rank(group) == 0 else _room(int(length))
    dist.broadcast(sent, group=group, group_src=0)
    return _bytes(sent)


def _scatter(parts: Sequence[bytes], group: ProcessGroup) -> bytes:
    """What the first rank of a group has for this one. parts: one for each rank, on the first."""
    lengths = torch.zeros(dist.get_world_size(group), dtype=torch.int64)
    lengths[: len(parts)] = torch.tensor([len(part) for part in parts])
    dist.broadcast(lengths, group=group, group_src=0)
    if not parts:
        received = _room(int(lengths[dist.get_rank(group)]))
        dist.recv(received, group=group, group_src=0, tag=TAG)
        return _bytes(received)
    sent = [_tensor(part) for part in parts]
    for work in [dist.isend(sent[rank], group=group, group_dst=rank, tag=TAG) for rank in range(1, len(sent))]:
        _wait(work)
    return parts[0]


def _wait(work: dist.Work | None) -> None:
    assert work is not None, "this rank is in the group"
    work.wait()


def _room(length: int) -> Tensor:
    return torch.empty(length, dtype=torch.uint8)


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


def _pack(parts: Sequence[bytes]) -> bytes:
    """Several parts as one, which tells where each ends."""
    return struct.pack(f"<{len(parts) + 1}q", len(parts), *map(len, parts)) + b"".join(parts)


def _unpack(packed: bytes) -> list[bytes]:
    (count,) = struct.unpack_from("<q", packed)
    lengths = struct.unpack_from(f"<{count}q", packed, 8)
    ends = accumulate(lengths, initial=8 + 8 * count)
    return [packed[start:end] for start, end in pairwise(ends)]
