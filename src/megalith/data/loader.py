"""Batches for one replica, a step at a time, made ready in the background while the step before is computed.

What a step reads follows from the number of consumed samples, so there is nothing to save and nothing to restore, and
the steps may be asked for in any order; the background only guesses that the next one follows.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megalith.data.order import Order, deal

Batch: TypeAlias = dict[str, Tensor]


class BatchSource(Protocol):
    """What batches are read from: a data set and how its samples become a batch."""

    def __len__(self) -> int: ...

    def read(self, indices: NDArray[np.int64], samples: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """A batch of the samples with these indices, B first; samples are their positions in the run.

        An index of -1, which only OnceOrder has, is a place that no sample takes: what stands there has no weight.
        """


class Loader:
    """Reads a replica's part of every step.

    replica: this rank's place among data_parallel replicas. pinned: put batches into page-locked memory, from which a
    CUDA device can copy while it computes. prefetch: steps made ready in advance, in one background thread; 0 for none.
    Use it in a `with` block, or close it.
    """

    def __init__(
        self,
        source: BatchSource,
        order: Order,
        *,
        micro_batch_size: int,
        replica: int,
        data_parallel: int,
        pinned: bool = False,
        prefetch: int = 1,
    ) -> None:
        if not 0 <= replica < data_parallel or micro_batch_size < 1 or prefetch < 0:
            raise ValueError(
                f"replica={replica} must be 0 to data_parallel={data_parallel} less 1, micro_batch_size="
                f"{micro_batch_size} 1 or more, prefetch={prefetch} 0 or more"
            )
        self.source = source
        self.order = order
        self.micro_batch_size = micro_batch_size
        self.replica = replica
        self.data_parallel = data_parallel
        self.pinned = pinned
        self.prefetch = prefetch
        self._background: ThreadPoolExecutor | None = None
        self._ready: dict[tuple[int, int], Future[list[Batch]]] = {}
        self._closed = False

    def step_batch(self, consumed_samples: int, num_microbatches: int) -> list[Batch]:
        """This replica's microbatches of the step before which the run had drawn consumed_samples.

        An error in reading is raised here, by the call that asks for the batch, whichever thread met it.
        """
        if self._closed:
            raise ValueError("this loader is closed")
        if not self.prefetch:
            return self._read(consumed_samples, num_microbatches)
        step_size = num_microbatches * self.micro_batch_size * self.data_parallel
        asked = (consumed_samples, num_microbatches)
        following = [(consumed_samples + ahead * step_size, num_microbatches) for ahead in range(1, self.prefetch + 1)]
        self._forget(self._ready.keys() - {asked, *following})
        future = self._ready.pop(asked, None) or self._start(asked)
        # Asked for before this one is waited for, so that the thread need not pause; it works in this order.
        for step in following:
            # Beyond the end of the data this fails; nobody will know unless that step is asked for.
            if step not in self._ready:
                self._ready[step] = self._start(step)
        return future.result()

    def close(self) -> None:
        """Stop the background thread after what it is reading; the loader cannot be used any more."""
        self._closed = True
        self._forget(set(self._ready))
        if self._background is not None:
            self._background.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, step: tuple[int, int]) -> Future[list[Batch]]:
        if self._background is None:
            # One thread, made at the first use: whoever forks before then forks a process without threads. A new thread
            # would allocate its page-locked memory through device 0.
            device = torch.cuda.current_device() if self.pinned else None
            self._background = ThreadPoolExecutor(
                1, thread_name_prefix="megalith-loader", initializer=_use_device, initargs=(device,)
            )
        return self._background.submit(self._read, *step)

    def _forget(self, steps: Iterable[tuple[int, int]]) -> None:
        for step in steps:
            self._ready.pop(step).cancel()

    def _read(self, consumed_samples: int, num_microbatches: int) -> list[Batch]:
        count = num_microbatches * self.micro_batch_size * self.data_parallel
        sizes = {"micro_batch_size": self.micro_batch_size, "data_parallel": self.data_parallel}
        indices = deal(self.order.global_indices(consumed_samples, count), **sizes)[:, self.replica]
        samples = deal(np.arange(consumed_samples, consumed_samples + count), **sizes)[:, self.replica]
        # All microbatches at once: the cost of a call is shared, and they become views of the same arrays.
        whole = self.source.read(indices.reshape(-1), samples.reshape(-1))
        tensors = {name: self._as_tensor(array) for name, array in whole.items()}
        pieces = {name: tensor.split(self.micro_batch_size) for name, tensor in tensors.items()}
        return [{name: parts[number] for name, parts in pieces.items()} for number in range(num_microbatches)]

    def _as_tensor(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.pinned else tensor


def _use_device(device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)
