"""JSON between ranks: the only way in which ranks speak to each other about a checkpoint.

Values travel as bytes of JSON in tensors; nothing is pickled. One rank without a process group speaks to itself.
"""

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
        payload = _to_bytes(value)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([payload.numel()]), group=self.group)
        longest = max(int(length) for length in lengths)
        received = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
        dist.all_gather(received, torch.cat([payload, payload.new_zeros(longest - payload.numel())]), group=self.group)
        return [_from_bytes(data[: int(length)]) for data, length in zip(received, lengths, strict=True)]

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

    def together(self, work: Callable[[], Value]) -> list[Value]:
        """Do the work on every rank and give the JSON values of all.

        An OSError or ValueError on any rank raises RanksError on all: none goes on alone, none waits for ever.
        """
        try:
            outcome: list[Any] = [True, work()]
        except (OSError, ValueError) as error:
            outcome = [False, str(error), getattr(error, "errno", None)]
        outcomes = self.gather(outcome)
        failures = [RankFailure(rank, *said) for rank, (done, *said) in enumerate(outcomes) if not done]
        if failures:
            raise RanksError(failures)
        return [said for _, said in outcomes]


def _to_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value, separators=(",", ":")).encode()), dtype=torch.uint8)


def _from_bytes(data: Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
