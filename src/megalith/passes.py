"""The forward and backward passes of a step: from microbatches to losses, and gradients that are whole."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megalith.job import Job
from megalith.layers.random import dropout_rows
from megalith.parallel.context import cut_tokens
from megalith.parallel.step import Batch, Timers, mean_losses


def with_rows(batch: Batch, seed: int, num_places: int) -> Batch:
    """The batch with the dropout words of its places in the stream."""
    return {**batch, "rows": dropout_rows(seed, batch["samples"], num_places)}


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device; copies from page-locked memory run beside the computation."""
    return {name: entry.to(device, non_blocking=True) for name, entry in batch.items()}


def run_microbatches(
    job: Job, microbatches: Sequence[Batch], *, scale: float, backward: bool, timers: Timers
) -> dict[str, Tensor]:
    """The mean losses of a step's microbatches over all ranks; with backward, their gradients add up on each."""
    return mean_losses(
        job.laid.engine,
        [cut_tokens(on_device(batch, job.device), job.groups.context) for batch in microbatches],
        names=job.task.losses(job.run),
        masks=job.task.masks(job.run),
        scale=scale,
        group=job.groups.replicas,
        timers=timers,
        backward=backward,
    )


def take_passes(job: Job, microbatches: Sequence[Batch], *, scale: float) -> dict[str, Tensor]:
    """The losses of a step; its gradients are those that the optimizer looks at, in place."""
    job.laid.clear_gradients()
    losses = run_microbatches(job, microbatches, scale=scale, backward=True, timers=job.pace.around(job.timers))
    with job.timers("backward-params-all-reduce"):
        job.laid.finish_gradients()
    return losses
