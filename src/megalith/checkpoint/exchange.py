"""JSON between ranks: the only way in which ranks speak to each other about a checkpoint.

Values travel as bytes of JSON in tensors; nothing is pickled. One rank without a process group speaks to itself.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


class RankFailure(NamedTuple):
    """What went wrong on a rank. code: the system's number of the error, if it was the system's."""

    rank: int
    message: str
    code: int | None = None


class RanksError(Exception):
    """A step failed on some rank; raised on every rank alike."""

    def __init__(self, failures: Sequence[RankFailure]) -> None:
        self.failures = tuple(failures)
        super().__init__("; ".join(f"rank {failure.rank}: {failure.message}" for failure in failures))


@dataclass(frozen=True)
class Ranks:
    """The ranks that write or read a checkpoint together. Every method is called by all of them in the same order.

    group: a process group whose backend handles CPU tensors; None for the default one, or for none at all.
    """

    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group) if dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group) if dist.is_initialized() else 0

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in order."""
        if self.size == 1:
            return [json.loads(json.dumps(value))]
        payload = self._as_long_as_all(_to_bytes(value))
        received = [torch.empty_like(payload) for _ in range(self.size)]
        dist.all_gather(received, payload, group=self.group)
        return [_from_bytes(data) for data in received]

    def to_first(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in order, on rank 0; nothing on the others. For values that are large."""
        if self.size == 1:
            return [json.loads(json.dumps(value))]
        payload = self._as_long_as_all(_to_bytes(value))
        received = [torch.empty_like(payload) for _ in range(self.size if self.rank == 0 else 0)]
        dist.gather(payload, received or None, group=self.group, group_dst=0)
        return [_from_bytes(data) for data in received]

    def from_first(self, value: Any) -> Any:
        """The JSON value of rank 0; that of the others is not looked at."""
        if self.size == 1:
            return json.loads(json.dumps(value))
        payload = _to_bytes(value) if self.rank == 0 else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([payload.numel()])
        dist.broadcast(length, group=self.group, group_src=0)
        if self.rank != 0:
            payload = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(payload, group=self.group, group_src=0)
        return _from_bytes(payload)

    def part_from_first(self, values: Sequence[Any]) -> Any:
        """The JSON value that rank 0 has for this rank. values: one for each rank; looked at on rank 0 only."""
        if self.size == 1:
            return json.loads(json.dumps(values[0]))
        parts = [_to_bytes(value) for value in values] if self.rank == 0 else []
        longest = self.from_first(max((part.numel() for part in parts), default=0))
        payload = torch.empty(longest, dtype=torch.uint8)
        padded = [_padded(part, longest) for part in parts]
        dist.scatter(payload, padded or None, group=self.group, group_src=0)
        return _from_bytes(payload)

    def is_same(self, text: str) -> bool:
        """Whether the text is the same on all ranks, found by one reduction of 16 bytes, however long it is."""
        if self.size == 1:
            return True
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])  # which an int64 holds
        extremes = torch.tensor([number, -number])
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.group)
        return int(extremes[0]) == -int(extremes[1])

    def together(self, work: Callable[[], Value]) -> list[Value]:
        """Do the work on every rank and give the JSON values of all.

        An OSError or ValueError on any rank raises RanksError on all: none goes on alone, none waits for ever.
        """
        outcomes = self.gather(_outcome_of(work))
        _raise_any(_failures_in(outcomes))
        return [said for _, said in outcomes]

    def together_to_first(self, work: Callable[[], Value]) -> list[Value]:
        """As `together`, but the values reach rank 0 alone, as with `to_first`."""
        outcomes = self.to_first(_outcome_of(work))
        _raise_any([RankFailure(*failure) for failure in self.from_first(_failures_in(outcomes))])
        return [said for _, said in outcomes]

    def _as_long_as_all(self, payload: Tensor) -> Tensor:
        """The bytes, padded to as many as the rank with the most has."""
        longest = torch.tensor([payload.numel()])
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=self.group)
        return _padded(payload, int(longest))


def _outcome_of(work: Callable[[], Any]) -> list[Any]:
    """Whether the work was done, and what it gave or what went wrong; as JSON."""
    try:
        return [True, work()]
    except (OSError, ValueError) as error:
        return [False, str(error), getattr(error, "errno", None)]


def _failures_in(outcomes: Sequence[Any]) -> list[RankFailure]:
    return [RankFailure(rank, *said) for rank, (done, *said) in enumerate(outcomes) if not done]


def _raise_any(failures: Sequence[RankFailure]) -> None:
    if failures:
        raise RanksError(failures)


def _to_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value, separators=(",", ":")).encode()), dtype=torch.uint8)


def _from_bytes(data: Tensor) -> Any:
    return json.loads(data.numpy().tobytes())


def _padded(payload: Tensor, length: int) -> Tensor:
    # With blanks, which JSON may end with.
    return torch.cat([payload, payload.new_full((length - payload.numel(),), ord(" "))])
