"""One callable runs a step's microbatches forward and backward; the train loop never asks how they are laid out.

A loss is a sum over a count that is global to the step: the weights of all tokens of all microbatches and replicas add
up to 1. So microbatches and ranks add up to the exact mean, whatever their masks.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from megalith.parallel.collectives import Group, all_gather, all_reduce, halves_sum
from megalith.parallel.reduce import Reduction

Batch = dict[str, Tensor]
# From a part of the model, what enters it and the batch: what leaves it, or from the last part the vector of losses.
RunPart = Callable[[nn.Module, Tensor, Batch], Tensor]
# Starts and stops a named timer.
Timers = Callable[[str], AbstractContextManager[object]]


class Engine(Protocol):
    """Runs weighted microbatches through the parts of the model that are held here."""

    def run(self, microbatches: Sequence[Batch], *, backward: bool, timers: Timers) -> Tensor:
        """The sum of each loss over the microbatches of all ranks, [losses], on every rank."""


def global_counts(microbatches: Sequence[Batch], masks: Sequence[str], group: Group) -> dict[str, Tensor]:
    """The sum of each mask over all microbatches and replicas: fp32 scalars, at least 1."""
    local = torch.stack([torch.stack([batch[mask].sum() for batch in microbatches]).sum() for mask in masks])
    total = all_reduce(local.float(), group).clamp(min=1.0)
    return dict(zip(masks, total.unbind(), strict=True))


def weighted(batch: Batch, counts: Mapping[str, Tensor], scale: float) -> Batch:
    """The batch with each mask turned into the weights of its loss: mask x scale / global count."""
    return {**batch, **{mask: batch[mask] * (scale / count) for mask, count in counts.items()}}


class WholeModel:
    """The engine of a model that is not cut into stages: microbatches one after the other."""

    def __init__(self, model: nn.Module, run_part: RunPart, reduction: Reduction, group: Group) -> None:
        self._model = model
        self._run_part = run_part
        self._reduction = reduction
        self._group = group

    def run(self, microbatches: Sequence[Batch], *, backward: bool, timers: Timers) -> Tensor:
        sums: Tensor | None = None
        for number, batch in enumerate(microbatches):
            if number == len(microbatches) - 1 and backward:
                self._reduction.before_last_backward()
            with timers("forward-compute"):
                losses = self._run_part(self._model, batch["tokens"], batch)
            if backward:
                with timers("backward-compute"):
                    losses.sum().backward()
            sums = losses.detach() if sums is None else sums + losses.detach()
        assert sums is not None, "a step has a microbatch"
        return all_reduce(sums, self._group)


class OrderedWholeModel:
    """The same, but gradients and losses of microbatches are added by halves: u and u + n/2 first.

    Over the replicas they are added likewise, so for powers of two the sum nests: it has the same rounding for any
    number of replicas. It costs log2(microbatches) copies of the gradients.
    """

    def __init__(self, model: nn.Module, run_part: RunPart, group: Group) -> None:
        self._model = model
        self._run_part = run_part
        self._group = group

    def run(self, microbatches: Sequence[Batch], *, backward: bool, timers: Timers) -> Tensor:
        losses: dict[int, Tensor] = {}
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        partial: list[tuple[int, list[Tensor]]] = []  # sums of 2^level gradients each
        for number in bit_reversed(len(microbatches)):
            batch = microbatches[number]
            with timers("forward-compute"):
                made = self._run_part(self._model, batch["tokens"], batch)
            losses[number] = made.detach()
            if backward:
                with timers("backward-compute"):
                    made.sum().backward()
                partial.append((0, [_taken(parameter) for parameter in trained]))
                while len(partial) > 1 and partial[-1][0] == partial[-2][0]:
                    level, late = partial.pop()
                    early = partial.pop()[1]
                    partial.append((level + 1, [a.add_(b) for a, b in zip(early, late, strict=True)]))
        for _, gradients in partial:
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        local = halves_sum([losses[number] for number in range(len(microbatches))])
        return halves_sum(list(all_gather(local[None], 0, self._group)))


def _taken(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    parameter.grad = None
    return gradient


def bit_reversed(count: int) -> list[int]:
    """0 to count - 1, such that taking neighbours together, again and again, pairs n with n + half of what is left.

    For a power of two; any other count is left in its order.
    """
    if count & (count - 1):
        return list(range(count))
    order = [0]
    while len(order) < count:
        order = [2 * place for place in order] + [2 * place + 1 for place in order]
    return order


def mean_losses(
    engine: Engine,
    microbatches: Sequence[Batch],
    *,
    names: Sequence[str],
    masks: Sequence[str],
    scale: float,
    group: Group,
    timers: Timers,
    backward: bool,
) -> dict[str, Tensor]:
    """The mean of each loss over a whole step, the same on every rank; with backward, gradients of their sum x scale.

    masks: the entries of a batch that weight its losses. group: the ranks with microbatches of their own.
    """
    counts = global_counts(microbatches, masks, group)
    sums = engine.run([weighted(batch, counts, scale) for batch in microbatches], backward=backward, timers=timers)
    return dict(zip(names, (sums / scale).unbind(), strict=True))
