"""Whether a step's numbers are finite: found before the weights are touched, and the same on every rank.

One reduction tells all ranks what any of them found, so that they skip the same steps; one transfer brings it, the
losses and the gradient norm to the host.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megalith.optim.loss_scale import DynamicLossScale, LossScale


@dataclass(frozen=True)
class Measured:
    """What all ranks know of a step before its update."""

    overflow: bool  # a gradient is infinite or NaN
    not_finite: tuple[str, ...]  # the losses, and "grad norm", that are infinite or NaN
    values: Mapping[str, float]  # of the losses and the gradient norm, by name; 0 if not finite

    def is_bad(self, loss_scale: LossScale | None) -> bool:
        """Whether something is wrong, rather than a loss scale on its way down.

        loss_scale: that of the step. Where it can be halved, an overflow of finite losses is how it finds its place.
        """
        if any(name != GRAD_NORM for name in self.not_finite):
            return True
        can_fall = isinstance(loss_scale, DynamicLossScale) and loss_scale.scale > loss_scale.min_scale
        return (self.overflow and not can_fall) or (not self.overflow and bool(self.not_finite))

    def told(self) -> str:
        """What is not finite, in words."""
        losses = [f"the {name}" for name in self.not_finite if name != GRAD_NORM]
        if losses:
            return " and ".join(losses)
        return "a gradient" if self.overflow else "the gradient norm"


GRAD_NORM = "grad norm"


@torch.no_grad()
def measure(
    losses: Mapping[str, Tensor], overflow: Tensor, grad_norm: Tensor | None, *, reduce: Callable[[Tensor], Tensor]
) -> Measured:
    """What the ranks found together; waits for the device.

    overflow: 1.0 if a gradient that lies here is not finite. reduce: the maximum over all ranks, of a vector.
    """
    named = dict(losses) if grad_norm is None else {**losses, GRAD_NORM: grad_norm}
    values = torch.stack([value.detach().to(overflow.device, torch.float64) for value in named.values()])
    bad = (~values.isfinite()).double()
    # A maximum with NaN is what the backend makes of it: only finite numbers are handed to it.
    found = reduce(torch.cat([overflow.double().reshape(1), bad, values.nan_to_num(0.0, 0.0, 0.0)])).tolist()
    count = len(named)
    not_finite = tuple(name for name, flag in zip(named, found[1 : 1 + count], strict=True) if flag)
    return Measured(bool(found[0]), not_finite, dict(zip(named, found[1 + count :], strict=True)))


@dataclass
class BadSteps:
    """The bad steps of a run: how many in a row, and which are passed over; part of its state.

    Passed-over steps, and those whose overflow only lowers the loss scale, neither go on with a row nor end it.
    """

    in_a_row: int = 0
    first: int | None = None  # of the row
    passed_over: list[tuple[int, int]] = field(default_factory=list)  # first and last, in order, apart

    def note(self, step: int, *, bad: bool) -> None:
        """Count a step that was computed; in place."""
        if not bad:
            self.in_a_row, self.first = 0, None
        else:
            self.in_a_row += 1
            self.first = step if self.first is None else self.first

    def passes_over(self, step: int) -> bool:
        """Whether a step is to be passed over: its samples are not drawn, and nothing is computed."""
        return any(first <= step <= last for first, last in self.passed_over)

    def passed_before(self, step: int) -> int | None:
        """The first of the passed-over steps that end right before a step; None if that one was computed."""
        return next((first for first, last in self.passed_over if last == step - 1), None)

    def pass_over(self, first: int, last: int) -> None:
        """From now on pass over these steps too; in place."""
        merged: list[tuple[int, int]] = []
        for begin, end in sorted([*self.passed_over, (first, last)]):
            if merged and begin <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((begin, end))
        self.passed_over = merged

    def to_json(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row, "first": self.first, "passed_over": [list(s) for s in self.passed_over]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, in place; {} is that of a run without bad steps. Raises ValueError if it is none."""
        try:
            first = state.get("first")
            self.in_a_row, self.first = int(state.get("in_a_row", 0)), None if first is None else int(first)
            self.passed_over = []
            for begin, end in state.get("passed_over", []):
                self.pass_over(int(begin), int(end))
        except (TypeError, ValueError) as error:
            raise ValueError(f"a checkpoint's bad steps are {state!r}: {error}") from error
        if self.in_a_row < 0 or not all(math.isfinite(b) and b <= e for b, e in self.passed_over):
            raise ValueError(f"a checkpoint's bad steps are {state!r}: they must be stretches of steps")
