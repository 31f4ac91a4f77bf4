"""JSON between ranks: how they agree on what is to be done, outside of what devices send each other.

Values travel as bytes of JSON; nothing is pickled. One rank without a process group speaks to itself.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from megalith.host_tree import EVERYONE, Tree

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
    """The ranks that do something together. Every method is called by all of them in the same order.

    tree: through whose groups they speak; None for the one that all ranks have joined, or for a rank alone.
    """

    tree: Tree | None = None

    @property
    def size(self) -> int:
        return self._tree.size

    @property
    def rank(self) -> int:
        return self._tree.rank

    @property
    def _tree(self) -> Tree:
        return self.tree or EVERYONE.tree()

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in order."""
        return [json.loads(part) for part in self._tree.gather(_to_bytes(value))]

    def to_first(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in order, on rank 0; nothing on the others. For values that are large."""
        return [json.loads(part) for part in self._tree.to_first(_to_bytes(value))]

    def from_first(self, value: Any) -> Any:
        """The JSON value of rank 0; that of the others is not looked at."""
        return json.loads(self._tree.from_first(_to_bytes(value) if self.rank == 0 else b""))

    def part_from_first(self, values: Sequence[Any]) -> Any:
        """The JSON value that rank 0 has for this rank. values: one for each rank; looked at on rank 0 only."""
        return json.loads(self._tree.part_from_first([_to_bytes(value) for value in values] if self.rank == 0 else []))

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number over all ranks: what one rank knows, all know."""
        return [int(number) for number in self._tree.largest(torch.tensor(numbers, dtype=torch.int64))]

    def wait_for_all(self) -> None:
        """Return when every rank has called this."""
        self.largest([0])

    def is_same(self, text: str) -> bool:
        """Whether the text is the same on all ranks, found by one reduction of 16 bytes, however long it is."""
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])  # which an int64 holds
        largest, least = self.largest([number, -number])
        return largest == -least

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


def _to_bytes(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
