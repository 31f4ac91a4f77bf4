"""One callable runs a step's microbatches forward and backward; the train loop never asks how they are laid out.

A loss is a sum over a count that is global to the step: the weights of all tokens of all microbatches and replicas add
up to 1. So microbatches and ranks add up to the exact mean, whatever their masks.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from megalith.parallel.collectives import Group, all_reduce

Batch = dict[str, Tensor]
# The weighted sum of each loss of a microbatch, by the name under which it is logged.
Losses = Callable[[Batch], dict[str, Tensor]]
# Starts and stops a named timer.
Timers = Callable[[str], AbstractContextManager[object]]


def global_counts(microbatches: Sequence[Batch], entries: Sequence[str], group: Group) -> dict[str, Tensor]:
    """The sum of each named entry (a loss mask) over all microbatches and replicas, fp32 scalars, at least 1."""
    local = torch.stack([sum((batch[entry].sum() for batch in microbatches), torch.zeros(())) for entry in entries])
    total = all_reduce(local.float(), group).clamp(min=1.0)
    return dict(zip(entries, total.unbind(), strict=True))


def weighted(batch: Batch, counts: Mapping[str, Tensor], scale: float) -> Batch:
    """The batch with each mask turned into the weights of its loss: mask x scale / global count."""
    return {**batch, **{entry: batch[entry] * (scale / count) for entry, count in counts.items()}}


def forward_backward(
    microbatches: Sequence[Batch],
    losses: Losses,
    *,
    masks: Sequence[str],
    scale: float,
    group: Group,
    timers: Timers,
    backward: bool = True,
) -> dict[str, Tensor]:
    """Run all microbatches of a step; gradients of the mean losses times scale add up in the parameters.

    masks names the entries of a batch that weight its losses. Returns the mean of each loss over the whole step, the
    same on every rank of the group.
    """
    counts = global_counts(microbatches, masks, group)
    sums: dict[str, Tensor] = {}
    for batch in microbatches:
        with timers("forward-compute"):
            parts = losses(weighted(batch, counts, scale))
        if backward:
            with timers("backward-compute"):
                torch.stack(list(parts.values())).sum().backward()
        for name, part in parts.items():
            sums[name] = sums.get(name, torch.zeros_like(part)) + part.detach()
    total = all_reduce(torch.stack(list(sums.values())), group) / scale
    return dict(zip(sums, total.unbind(), strict=True))
