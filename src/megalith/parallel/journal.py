"""What a rank makes in a pass by itself, and what it receives from others, noted in the order in which it happens.

Passes over the same samples with the same weights give the same bits. Where two differ, the first note that differs
tells whose fault it is: a rank that receives what it did before, and makes something else of it, computes wrongly; one
that receives something else does not.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from megalith.parallel.digest import digest


class Note(NamedTuple):
    """The digest of a tensor."""

    is_own: bool  # made by this rank, rather than received
    what: str
    digest: int


class Journal:
    """Notes digests while it is kept; costs nothing otherwise. Nothing waits for the device until it is read."""

    def __init__(self) -> None:
        self._notes: list[tuple[bool, str, Tensor]] | None = None
        self._with_gradients = True

    @contextmanager
    def kept(self, *, with_gradients: bool) -> Iterator[None]:
        """Note from here on, and forget what was noted before. with_gradients: backward passes, too."""
        self._notes, self._with_gradients = [], with_gradients
        try:
            yield
        finally:
            self._notes = None

    def made(self, tensor: Tensor, what: str) -> None:
        """Note what this rank has computed."""
        self._note(True, tensor, what)

    def received(self, tensor: Tensor, what: str) -> None:
        """Note what other ranks have sent, or taken part in."""
        self._note(False, tensor, what)

    def entering(self, stream: Tensor) -> Tensor:
        """Note a stream from another pipeline stage, and its gradient when that goes back there; gives the stream."""
        if self._notes is None:
            return stream
        self.received(stream, "the stream from another stage")
        # A stage keeps what it receives into for all steps: hooks on that would add up.
        stream = stream.view_as(stream)
        if stream.requires_grad:
            stream.register_hook(lambda gradient: self.made(gradient, "the gradient to another stage"))
        return stream

    def leaving(self, stream: Tensor) -> None:
        """Note a stream to another pipeline stage, and its gradient when that comes back."""
        if self._notes is None:
            return
        self.made(stream, "the stream to another stage")
        if stream.requires_grad:
            stream.register_hook(lambda gradient: self.received(gradient, "the gradient from another stage"))

    def read(self) -> list[Note]:
        """All notes so far; waits for the device."""
        if not self._notes:
            return []
        device = self._notes[-1][2].device
        numbers = torch.stack([number.to(device, non_blocking=True) for _, _, number in self._notes]).tolist()
        return [Note(own, what, number) for (own, what, _), number in zip(self._notes, numbers, strict=True)]

    def _note(self, is_own: bool, tensor: Tensor, what: str) -> None:
        # Inside of a compiled block nothing is noted. The number is that of the backward pass that is going on.
        if torch.compiler.is_compiling() or self._notes is None:
            return
        if self._with_gradients or torch._C._current_graph_task_id() == -1:
            self._notes.append((is_own, what, digest(tensor)))


# The journal of this process.
JOURNAL = Journal()


class Finding(NamedTuple):
    """How two passes of a rank differ."""

    is_own: bool  # the first difference is in something that the rank has made
    names: tuple[str, ...]  # of all that differs, in the order in which it was noted


def compare(notes: Sequence[Note], others: Sequence[Note]) -> Finding | None:
    """How the notes of two passes differ; None if they do not."""
    pairs = [(a, b) for a, b in zip(notes, others, strict=False) if a != b]
    if not pairs:
        return None if len(notes) == len(others) else Finding(True, ("the number of operations",))
    return Finding(pairs[0][0].is_own, tuple(dict.fromkeys(note.what for note, _ in pairs)))
