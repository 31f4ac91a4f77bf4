"""The forward and backward passes of a step: from microbatches to losses, and gradients that are whole."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megalith.job import Job
from megalith.layers.random import dropout_rows
from megalith.parallel.context import cut_tokens
from megalith.parallel.step import Batch, Timers, mean_losses


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device; copies from page-locked memory run beside the computation."""
    return {name: entry.to(device, non_blocking=True) for name, entry in batch.items()}


def run_microbatches(
    job: Job, microbatches: Sequence[Batch], *, scale: float, backward: bool, timers: Timers
) -> dict[str, Tensor]:
    """The mean losses of a step's microbatches over all ranks; with backward, their gradients add up on each.

    Dropout, if the run has any, falls with backward only.
    """
    batches = [on_device(batch, job.device) for batch in microbatches]
    if backward and (job.run.model.hidden_dropout > 0 or job.run.model.attention_dropout > 0):
        seed, num_places = job.run.train.seed, job.task.num_places(job.run)
        # On the device, which gives the same words, so that it need not wait for them.
        batches = [{**batch, "rows": dropout_rows(seed, batch["samples"], num_places)} for batch in batches]
    return mean_losses(
        job.laid.engine,
        [cut_tokens(batch, job.groups.context) for batch in batches],
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
