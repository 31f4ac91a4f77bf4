"""Saving while the training goes on: the step waits for a copy in host memory at most, a thread writes it.

The copy is made by the thread too, so a step need not even wait for that if it says when it is about to change the
weights (`before_update`). There is one copy, overwritten by each checkpoint: memory is bounded by what a rank writes.
"""

import time
import weakref
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalith.checkpoint.directory import CheckpointError, folder_of
from megalith.checkpoint.index import plain_json
from megalith.checkpoint.pieces import Piece, announce
from megalith.checkpoint.retention import delete_old
from megalith.checkpoint.store import Contents, write
from megalith.checkpoint.writers import Plan, plan
from megalith.files import DISK, NO_ROOM, Disk, Location
from megalith.host_tree import LONGEST_WAIT, make_tree
from megalith.ranks import Ranks, RanksError

ALIGNMENT = 64  # bytes; of each tensor in host memory


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was written in the background."""

    step: int
    path: Path
    seconds: float  # from the start of the save to its end
    num_bytes: int  # of the whole checkpoint's tensors
    deleted: tuple[int, ...]  # steps of the old checkpoints that went
    warning: str  # why old ones did not go; empty if all is well


class HostCopy:
    """What a rank writes, in one piece of host memory, which is pinned if it comes from a CUDA device."""

    def __init__(self, planned: Plan, tensors: Mapping[str, Piece]) -> None:
        self.plan = planned
        self.tensors: dict[str, Tensor] = {}
        self._announced = announce(tensors)
        self._stream: torch.cuda.Stream | None = None

    def sources(self, tensors: Mapping[str, Piece]) -> dict[str, Tensor]:
        """Those that are to be copied. Raises ValueError if the pieces are not those that the plan was made for."""
        if announce(tensors) != self._announced:
            raise ValueError("the pieces differ from those of the first save: make a new saver for another layout")
        return {name: tensors[name].elements for name in self.plan.own}

    def copy(self, sources: Mapping[str, Tensor], ready: torch.cuda.Event | None) -> None:
        """Copy the tensors; in the thread. Returns when they may change again. ready: they are not computed before."""
        if ready is not None:
            self._copy_from_cuda(sources, ready)
            return
        self.tensors = self.tensors or in_one_buffer(sources)[1]
        for name, tensor in sources.items():
            copy_alone(self.tensors[name], tensor)

    def _pin(self, buffer: Tensor) -> None:
        """Lock the buffer into memory, so that a copy needs no detour; where that is refused, it takes longer."""
        # Not by torch, which rounds pinned memory up to a power of two.
        cudart = torch.cuda.cudart()
        if not int(cudart.cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)):
            weakref.finalize(self, cudart.cudaHostUnregister, buffer.data_ptr())

    def _copy_from_cuda(self, sources: Mapping[str, Tensor], ready: torch.cuda.Event) -> None:
        device = next(tensor.device for tensor in sources.values() if tensor.is_cuda)
        # On a stream of its own, for the default one would let the copies wait for the training's kernels.
        with torch.cuda.device(device):
            if not self.tensors:
                buffer, self.tensors = in_one_buffer(sources)
                self._pin(buffer)
            self._stream = self._stream or torch.cuda.Stream()
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(ready)
                for name, tensor in sources.items():
                    self.tensors[name].copy_(tensor, non_blocking=True)
            self._stream.synchronize()


def in_one_buffer(tensors: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Bytes of host memory, and in them one tensor like each of these, one behind the other."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    ends = list(accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values()))
    buffer = torch.empty(ends[-1] if ends else 0, dtype=torch.uint8)
    inside = {}
    for (name, tensor), start in zip(tensors.items(), [0, *ends], strict=False):
        inside[name] = buffer[start : start + sizes[name]].view(tensor.dtype).view(tensor.shape)
    return buffer, inside


def copy_alone(target: Tensor, source: Tensor) -> None:
    """Copy between tensors in host memory by this thread alone.

    torch would start a pool of threads for this thread beside the training's. With more threads than cores the OpenMP
    library lets all of them sleep instead of spin at every product: training ran at 0.7 of its speed from then on.
    """
    if source.is_contiguous():
        np.copyto(target.view(-1).view(torch.uint8).numpy(), source.view(-1).view(torch.uint8).numpy())
    else:
        for part, from_part in zip(target, source, strict=True):
            copy_alone(part, from_part)


def computed(tensors: Mapping[str, Tensor]) -> torch.cuda.Event | None:
    """The event at which what was asked for so far is computed; None if no tensor is on a CUDA device."""
    device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
    return None if device is None else torch.cuda.current_stream(device).record_event()


class AsyncSaver:
    """Writes checkpoints of a run one after the other in a thread; used by all ranks alike.

    It makes process groups of its own: what it says to other ranks must not mix with the training's collectives.
    keep_last, keep_every: as in `delete_old`; keep_last=None keeps all.
    """

    def __init__(
        self, run_dir: Location, *, keep_last: int | None = None, keep_every: int | None = None, disk: Disk = DISK
    ) -> None:
        self._run_dir, self._keep_last, self._keep_every, self._disk = run_dir, keep_last, keep_every, disk
        self._ranks = Ranks(make_tree(timeout=LONGEST_WAIT))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # A thread needs memory for its stack, which may be short when the first checkpoint is due.
        self._thread.submit(lambda: None)
        self._host: HostCopy | None = None
        self._copied: Future[None] | None = None
        self._writing: Future[Saved] | None = None
        self._saved: list[Saved] = []

    def room(self, tensors: Mapping[str, Piece]) -> tuple[int, int | None]:
        """Bytes that a checkpoint of these pieces needs, and how many are free; None if the disk does not say.

        Called by all ranks alike, before the first save or between two; raises ValueError as `save` does.
        """
        need = self._planned(tensors).plan.num_bytes
        free: int | None = None
        if self._ranks.rank == 0:
            with suppress(OSError):
                free = self._disk.free_bytes(folder_of(self._run_dir))
        return need, self._ranks.from_first(free)

    def _planned(self, tensors: Mapping[str, Piece]) -> HostCopy:
        if self._host is None:
            self._host = HostCopy(plan(self._ranks, tensors), tensors)
        return self._host

    @property
    def is_copying(self) -> bool:
        """Whether `before_update` has something to wait for."""
        return self._copied is not None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Piece],
        state: Mapping[str, Any],
        *,
        notes: Mapping[str, Any] | None = None,
        overlap: bool = False,
    ) -> float:
        """Begin a checkpoint, after the one before is written; give the seconds that this took.

        tensors, state, notes: as in `store.save`, the pieces the same at every save. When this returns, the tensors are
        copied. With overlap they are not yet: then `before_update` must be called before any of them changes.

        Raises CheckpointError if the checkpoint before could not be written (this one is not begun: call again). Raises
        ValueError if the pieces or the state cannot be stored.
        """
        started = time.monotonic()
        self._finish()
        host = self._planned(tensors)
        contents = Contents(step, host.plan, plain_json("state", state), plain_json("notes", notes or {}))
        sources = host.sources(tensors)
        self._copied = self._thread.submit(host.copy, sources, computed(sources))
        self._writing = self._thread.submit(self._write, contents, host, self._copied, started)
        if not overlap:
            self.before_update()
        return time.monotonic() - started

    def before_update(self) -> float:
        """Return when no tensor is being copied any more, so that they may change; give the seconds that this took."""
        if self._copied is None:
            return 0.0
        started = time.monotonic()
        copied, self._copied = self._copied, None
        copied.result()
        return time.monotonic() - started

    def poll(self) -> list[Saved]:
        """The checkpoints that have been written since the last question; does not wait.

        Raises CheckpointError if one could not be written. Ranks may learn of either in different steps, so they must
        agree before one of them stops.
        """
        if self._writing is not None and self._writing.done():
            self._finish()
        saved, self._saved = self._saved, []
        return saved

    def wait(self) -> list[Saved]:
        """As `poll`, after the checkpoint that is being written, if any, is done."""
        self._finish()
        return self.poll()

    def _finish(self) -> None:
        """Wait for the checkpoint that is being written, if any; CheckpointError if it could not be."""
        if self._writing is not None:
            writing, self._writing, self._copied = self._writing, None, None
            self._saved.append(writing.result())

    def delete_old(self) -> list[int]:
        """Delete what keep_last leaves out, and give its steps; as `retention.delete_old`, between two saves."""
        if self._keep_last is None:
            return []
        return delete_old(
            self._ranks, self._run_dir, keep_last=self._keep_last, keep_every=self._keep_every, disk=self._disk
        )

    def _made_room(self) -> list[int]:
        """The steps of the old checkpoints that went; none if the newest does not verify or a deletion fails."""
        with suppress(CheckpointError):
            return self.delete_old()
        return []

    def close(self) -> None:
        """Wait for what is being written, without asking how it went, and end the thread."""
        self._thread.shutdown(wait=True)

    def _write(self, contents: Contents, host: HostCopy, copied: Future[None], started: float) -> Saved:
        def own() -> Mapping[str, Tensor]:
            # If the copy failed, nothing may be written.
            copied.result()
            return host.tensors

        deleted: list[int] = []
        warning = ""
        try:
            path = write(self._ranks, self._run_dir, contents, own, disk=self._disk)
        except CheckpointError as failed:
            if not _lacked_room(failed) or not (deleted := self._made_room()):
                raise
            path = write(self._ranks, self._run_dir, contents, own, disk=self._disk)
        try:
            deleted += self.delete_old()
        except CheckpointError as failed:
            warning = str(failed)
        seconds = time.monotonic() - started
        return Saved(contents.step, path, seconds, contents.num_bytes, tuple(deleted), warning)


def _lacked_room(failed: CheckpointError) -> bool:
    """Whether a save failed for want of room on some rank, the same on all."""
    cause = failed.__cause__
    return isinstance(cause, RanksError) and any(failure.code in NO_ROOM for failure in cause.failures)
