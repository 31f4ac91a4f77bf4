"""Whether a step's numbers are finite: found before the weights are touched, and the same on every rank.

One reduction tells all ranks what any of them found, so that they skip the same steps; one transfer brings it, the
losses and the gradient norm to the host.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megalith.optim.loss_scale import DynamicLossScale, LossScale

GRAD_NORM = "grad norm"


@dataclass(frozen=True)
class Measured:
    """What all ranks know of a step before its update."""

    overflow: bool  # a gradient, or the norm of all, is infinite or NaN
    not_finite: tuple[str, ...]  # the losses, and "grad norm", that are infinite or NaN
    values: Mapping[str, float]  # of the other losses, and of the gradient norm, by name

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


@torch.no_grad()
def measure(
    losses: Mapping[str, Tensor], overflow: Tensor, grad_norm: Tensor | None, *, reduce: Callable[[Tensor], Tensor]
) -> Measured:
    """What the ranks found together; waits for the device.

    overflow: 1.0 if a gradient that lies here, or the norm of all, is not finite. reduce: the maximum over all ranks,
    of a vector.
    """
    named = dict(losses) if grad_norm is None else {**losses, GRAD_NORM: grad_norm}
    values = torch.stack([value.detach().to(overflow.device, torch.float64) for value in named.values()])
    bad = (~values.isfinite()).double()
    # A maximum with NaN is what the backend makes of it: only finite numbers are handed to it.
    found = reduce(torch.cat([overflow.double().reshape(1), bad, values.nan_to_num(0.0, 0.0, 0.0)])).tolist()
    flags, values_found = found[1 : 1 + len(named)], found[1 + len(named) :]
    not_finite = tuple(name for name, flag in zip(named, flags, strict=True) if flag)
    finite = {name: value for name, value in zip(named, values_found, strict=True) if name not in not_finite}
    return Measured(bool(found[0]), not_finite, finite)


@dataclass
class BadSteps:
    """The bad steps of a run: how many in a row, which are passed over, and how often it went back; part of its state.

    A row begins with a bad step and ends with a good one that the run has not taken before. Steps that are passed over,
    and those whose overflow only lowers the loss scale, neither go on with a row nor end it.
    """

    in_a_row: int = 0
    first: int | None = None  # of the row
    passed_over: list[tuple[int, int]] = field(default_factory=list)  # first and last, in order, apart
    rewinds: int = 0  # since the last good step beyond all that are passed over

    def note(self, step: int, *, bad: bool) -> None:
        """Count a step that was computed; in place."""
        if bad:
            self.in_a_row += 1
            self.first = step if self.first is None else self.first
            return
        self.in_a_row, self.first = 0, None
        if not self.passed_over or step > self.passed_over[-1][1]:
            self.rewinds = 0

    def passes_over(self, step: int) -> bool:
        """Whether a step is to be passed over: its samples are not drawn, and nothing is computed."""
        return any(first <= step <= last for first, last in self.passed_over)

    def turns_back_below(self) -> int:
        """To rewind, go back to a checkpoint of fewer steps than this.

        At first one from before the row will do. If the run comes back to where it was and fails again, then what it
        had learnt before the stretch that it passed over is to blame, and that must go too.
        """
        assert self.first is not None, "there is a row"
        return self.passed_over[-1][0] - 1 if self.rewinds else self.first

    def rewound(self, step: int, checkpoint: int) -> "BadSteps":
        """What is to hold once the run has gone back from a step to a checkpoint: what is passed over from now on."""
        assert self.first is not None, "there is a row"
        first = checkpoint + 1 if self.rewinds else self.first
        return BadSteps(passed_over=joined_up([*self.passed_over, (first, step)]), rewinds=self.rewinds + 1)

    def to_json(self) -> dict[str, Any]:
        passed_over = [list(stretch) for stretch in self.passed_over]
        return {"in_a_row": self.in_a_row, "first": self.first, "passed_over": passed_over, "rewinds": self.rewinds}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "BadSteps":
        """The state that `to_json` gave; {} is that of a run without bad steps. Raises ValueError if it is none."""
        try:
            first, passed_over = state.get("first"), [(int(a), int(b)) for a, b in state.get("passed_over", [])]
            numbers = [int(state.get("in_a_row", 0)), int(state.get("rewinds", 0)), 0 if first is None else int(first)]
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the checkpoint's bad steps are {state!r}: {error}") from error
        if min(numbers) < 0 or any(not 0 < begin <= end for begin, end in passed_over):
            raise ValueError(f"the checkpoint's bad steps are {state!r}: they must be counts, and stretches of steps")
        return cls(numbers[0], None if first is None else numbers[2], joined_up(passed_over), numbers[1])


def joined_up(stretches: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same steps in as few stretches as can be, in order; each is its first and last step."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(stretches):
        if joined and begin <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined
