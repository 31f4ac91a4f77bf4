"""The factor on the loss that keeps fp16 gradients above the smallest fp16 number.

A state is immutable and one function gives the next, so the state is checkpointed as plain JSON and every rank that is
told the same overflows holds the same scale.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, Self

from megalith.optim.settings import OptimizerConfig

GROWTH = 2.0
BACKOFF = 0.5


class LossScale(Protocol):
    """A loss scale at one step of the run."""

    @property
    def scale(self) -> float: ...

    def updated(self, found_inf: bool) -> Self:
        """The state after a step; found_inf: whether any gradient on any rank was infinite or NaN."""

    def to_json(self) -> dict[str, Any]: ...

    def resumed(self, saved: Mapping[str, Any]) -> Self:
        """These settings with the saved state; raises ValueError if it is none."""


@dataclass(frozen=True)
class ConstantLossScale:
    """The same factor for the whole run. Steps whose gradients overflow are skipped all the same."""

    scale: float

    def updated(self, found_inf: bool) -> Self:
        return self

    def to_json(self) -> dict[str, Any]:
        return {}

    def resumed(self, saved: Mapping[str, Any]) -> Self:
        return self


@dataclass(frozen=True)
class DynamicLossScale:
    """Halves on overflow, doubles after `window` clean steps in a row; without an upper limit.

    The tolerance is refilled by a growth only, neither by a backoff nor by a clean step, and may go below 0: after the
    first tolerated overflow every further one halves the scale until a growth. This is Megatron-LM's rule.
    """

    scale: float
    min_scale: float
    window: float  # clean steps in a row before the scale doubles
    hysteresis: int  # overflows without a halving after a growth, plus one
    clean_steps: int  # in a row, since the last growth or overflow
    tolerance: int  # overflows until the scale is halved

    def updated(self, found_inf: bool) -> Self:
        if found_inf:
            tolerance = self.tolerance - 1
            scale = max(self.scale * BACKOFF, self.min_scale) if tolerance <= 0 else self.scale
            return replace(self, scale=scale, clean_steps=0, tolerance=tolerance)
        if self.clean_steps + 1 >= self.window:
            return replace(self, scale=self.scale * GROWTH, clean_steps=0, tolerance=self.hysteresis)
        return replace(self, clean_steps=self.clean_steps + 1)

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name in ("scale", "clean_steps", "tolerance")}

    def resumed(self, saved: Mapping[str, Any]) -> Self:
        scale, clean_steps, tolerance = (saved.get(name) for name in ("scale", "clean_steps", "tolerance"))
        if not isinstance(scale, float | int) or isinstance(scale, bool) or not 0 < scale < float("inf"):
            raise ValueError(
                f"the checkpoint's loss scale={scale!r} must be a number above 0: start with --no-load-optim"
            )
        if type(clean_steps) is not int or type(tolerance) is not int or clean_steps < 0:
            raise ValueError(
                f"the checkpoint's loss-scale counters clean_steps={clean_steps!r} and tolerance={tolerance!r} must be "
                "whole numbers, the first not negative: start with --no-load-optim"
            )
        return replace(self, scale=float(scale), clean_steps=clean_steps, tolerance=tolerance)


def make_loss_scale(config: OptimizerConfig) -> LossScale | None:
    """The first state of a run; None where gradients are not scaled and not checked: fp32, and bf16 without a scale.

    fp32 training has no scale even if one is set, as in Megatron-LM.
    """
    if not (config.fp16 or config.bf16):
        return None
    if config.loss_scale is not None:
        return ConstantLossScale(float(config.loss_scale))
    if not config.fp16:
        return None
    return DynamicLossScale(
        scale=float(config.initial_loss_scale),
        min_scale=float(config.min_loss_scale),
        window=config.loss_scale_window,
        hysteresis=config.hysteresis,
        clean_steps=0,
        tolerance=config.hysteresis,
    )
