"""One callable runs a step's microbatches forward and backward; the train loop never asks how they are laid out.

A loss is a sum over a count that is global to the step: the weights of all tokens of all microbatches and replicas add
up to 1. So microbatches and ranks add up to the exact mean, whatever their masks.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from megalith.parallel.collectives import Group, all_reduce, fixed_order_sum
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
    """The engine of a model that is not cut into stages: microbatches one after the other.

    entering: the entry of a batch that enters the model.
    """

    def __init__(
        self, model: nn.Module, run_part: RunPart, reduction: Reduction, group: Group, *, entering: str = "tokens"
    ) -> None:
        self._model = model
        self._run_part = run_part
        self._reduction = reduction
        self._group = group
        self._entering = entering

    def run(self, microbatches: Sequence[Batch], *, backward: bool, timers: Timers) -> Tensor:
        sums: Tensor | None = None
        for number, batch in enumerate(microbatches):
            if number == len(microbatches) - 1 and backward:
                self._reduction.before_last_backward()
            with timers("forward-compute"):
                losses = self._run_part(self._model, batch[self._entering], batch)
            if backward:
                with timers("backward-compute"):
                    losses.sum().backward()
            sums = losses.detach() if sums is None else sums + losses.detach()
        assert sums is not None, "a step has a microbatch"
        if backward:
            self._reduction.after_last_backward()
        return all_reduce(sums, self._group)


class OrderedWholeModel:
    """The same, but gradients and losses of microbatches are added in an order that nests: see `nested_order`.

    Over the replicas they are added by halves, so the sum has the same rounding for any number of replicas that is a
    power of two. It costs as many copies of the gradients as the number of microbatches can be halved, and one.
    """

    def __init__(self, model: nn.Module, run_part: RunPart, group: Group, *, entering: str = "tokens") -> None:
        self._model = model
        self._run_part = run_part
        self._group = group
        self._entering = entering

    def run(self, microbatches: Sequence[Batch], *, backward: bool, timers: Timers) -> Tensor:
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        losses: list[tuple[int, list[Tensor]]] = []
        gradients: list[tuple[int, list[Tensor]]] = []
        for together in nested_order(len(microbatches)):
            added: Tensor | None = None
            for number in together:
                batch = microbatches[number]
                with timers("forward-compute"):
                    made = self._run_part(self._model, batch[self._entering], batch)
                added = made.detach() if added is None else added + made.detach()
                if backward:
                    with timers("backward-compute"):
                        made.sum().backward()
            assert added is not None, "each has a microbatch"
            _add_by_halves(losses, [added])
            if backward:
                _add_by_halves(gradients, [_taken(parameter) for parameter in trained])
        if backward:
            for parameter, gradient in zip(trained, gradients[0][1], strict=True):
                parameter.grad = gradient
        return fixed_order_sum(losses[0][1][0], self._group)


def _add_by_halves(sums: list[tuple[int, list[Tensor]]], tensors: list[Tensor]) -> None:
    """Add the next tensors to the sums of 2^level predecessors each, as the carries of a binary counter; in place."""
    sums.append((0, tensors))
    while len(sums) > 1 and sums[-1][0] == sums[-2][0]:
        level, late = sums.pop()
        early = sums.pop()[1]
        sums.append((level + 1, [a.add_(b) for a, b in zip(early, late, strict=True)]))


def _taken(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    parameter.grad = None
    return gradient


def nested_order(count: int) -> list[list[int]]:
    """The numbers below count, in 2^h lists of an odd length (h as large as can be): those that are equal modulo 2^h.

    Each list is added in its order; then, taking neighbouring lists together, again and again, adds n and n + half of
    what is left. Numbers dealt out over 2^k replicas, k <= h, are so added first on the replicas, then over them.
    """
    power = count & -count
    order = [0]
    while len(order) < power:
        order = [2 * place for place in order] + [2 * place + 1 for place in order]
    return [[first + power * turn for turn in range(count // power)] for first in order]


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
