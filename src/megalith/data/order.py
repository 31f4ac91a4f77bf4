"""In which order a run draws the samples of a data set: a pure function of how many it has drawn.

A position is the place of a sample in the run, counted over all replicas; an index is its place in the data set.
Nothing is remembered between calls but what can be computed again, so a run goes on from the number of consumed samples
alone.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

KEPT_EPOCHS = 2  # permutations remembered: a step may lie across the end of an epoch


@dataclass(frozen=True)
class SampleCounts:
    """How many samples a run may draw from each part of the data."""

    train: int
    valid: int
    test: int


def sample_counts(
    *, train_iters: int, train_samples: int | None, global_batch_size: int, eval_interval: int, eval_iters: int
) -> SampleCounts:
    """What a run of train_iters steps needs; train_samples, if the length of the run was given so (it is exact then).

    One evaluation more than fits into the run, for the one after its end.
    """
    return SampleCounts(
        train=train_samples if train_samples is not None else train_iters * global_batch_size,
        valid=(train_iters // eval_interval + 1) * eval_iters * global_batch_size,
        test=eval_iters * global_batch_size,
    )


def consumed_at(iteration: int, *, global_batch_size: int, eval_interval: int, eval_iters: int) -> SampleCounts:
    """What a run has drawn after so many steps, for checkpoints of Megatron-LM that are too old to say."""
    valid = (iteration // eval_interval) * eval_iters * global_batch_size
    return SampleCounts(train=iteration * global_batch_size, valid=valid, test=0)


class Order(Protocol):
    """Which samples of a data set a run draws."""

    def global_indices(self, consumed: int, count: int) -> NDArray[np.int64]:
        """The indices at positions consumed to consumed + count - 1 of the run."""


class SingleOrder:
    """Each sample once, from the first to the last."""

    def __init__(self, total: int) -> None:
        self.total = total

    def global_indices(self, consumed: int, count: int) -> NDArray[np.int64]:
        """The indices at these positions: the positions themselves. Raises ValueError beyond the last sample."""
        _check(consumed, count)
        if consumed + count > self.total:
            raise ValueError(
                f"the run asks for samples {consumed} to {consumed + count - 1}, but the data set ends after "
                f"{self.total}; ask for fewer steps, or build it for more samples, or set dataloader_type=cyclic"
            )
        return np.arange(consumed, consumed + count)


class RoundOrder:
    """Each sample in its place, beginning anew after the last; for evaluation, which never runs out."""

    def __init__(self, total: int) -> None:
        self.total = total

    def global_indices(self, consumed: int, count: int) -> NDArray[np.int64]:
        """The indices at these positions."""
        return np.arange(consumed, consumed + count) % self.total


class OnceOrder:
    """Each sample once, from the first to the last, and behind it -1: places that no sample takes.

    So an evaluation of whole batches measures every sample once, whatever their number.
    """

    def __init__(self, total: int) -> None:
        self.total = total

    def global_indices(self, consumed: int, count: int) -> NDArray[np.int64]:
        """The indices at these positions."""
        _check(consumed, count)
        positions = np.arange(consumed, consumed + count)
        return np.where(positions < self.total, positions, -1)


class CyclicOrder:
    """All samples in a new random order every epoch, without end; the epoch's number is the seed.

    By itself the order depends on nothing else, so a run goes on with any batch sizes and any number of replicas.
    Megatron-LM's rule gives each replica a fixed share of the data set, shuffled alike, and drops what does not fill a
    micro-batch of all replicas: with its micro_batch_size and data_parallel the order is bit for bit its own (and holds
    only for them; positions must then be multiples of their product). The default is that rule for a batch of one.
    """

    def __init__(self, total: int, *, micro_batch_size: int = 1, data_parallel: int = 1) -> None:
        self.micro_batch_size = micro_batch_size
        self.data_parallel = data_parallel
        self._group = micro_batch_size * data_parallel
        self._share = total // self._group * micro_batch_size  # samples of a replica in an epoch
        if not self._share:
            raise ValueError(
                f"a data set of {total} samples is too small for micro_batch_size={micro_batch_size} x "
                f"data_parallel={data_parallel}; give it more data or a smaller batch"
            )
        self._permutations: dict[int, NDArray[np.int64]] = {}

    def global_indices(self, consumed: int, count: int) -> NDArray[np.int64]:
        """The indices at these positions, whichever epochs they lie in."""
        _check(consumed, count)
        if consumed % self._group or count % self._group:
            raise ValueError(
                f"positions {consumed} to {consumed + count}: this order goes by groups of micro_batch_size="
                f"{self.micro_batch_size} x data_parallel={self.data_parallel} samples; resume with the same sizes, or "
                "use the order that does not depend on them"
            )
        epochs, positions = np.divmod(np.arange(consumed, consumed + count), self._share * self.data_parallel)
        groups, places = np.divmod(positions, self._group)
        replicas, places = np.divmod(places, self.micro_batch_size)
        indices = groups * self.micro_batch_size + places
        for epoch in np.unique(epochs):
            now = epochs == epoch
            indices[now] = self._permutation(int(epoch))[indices[now]]
        return np.asarray(indices + replicas * self._share, np.int64)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        """The order of a replica's share in an epoch."""
        known = self._permutations
        if epoch in known:
            return known[epoch]
        generator = torch.Generator().manual_seed(epoch)
        permutation: NDArray[np.int64] = torch.randperm(self._share, generator=generator).numpy()
        # Replaced and not changed: loaders in several threads may share an order.
        kept = list(known.items())[-(KEPT_EPOCHS - 1) :]
        self._permutations = dict([*kept, (epoch, permutation)])
        return permutation


def _check(consumed: int, count: int) -> None:
    if consumed < 0 or count < 0:
        raise ValueError(f"consumed={consumed} and count={count} must be 0 or more samples")


def deal(values: NDArray[np.int64], *, micro_batch_size: int, data_parallel: int) -> NDArray[np.int64]:
    """A step's samples dealt to the replicas: [microbatch, replica, place], in Megatron-LM's way.

    Each microbatch of all replicas is consecutive, and in it replica r has the r-th stretch of micro_batch_size. Raises
    ValueError if that does not come out even.
    """
    if len(values) % (micro_batch_size * data_parallel):
        raise ValueError(
            f"{len(values)} samples do not make whole microbatches of micro_batch_size={micro_batch_size} x "
            f"data_parallel={data_parallel}"
        )
    return values.reshape(-1, data_parallel, micro_batch_size)
