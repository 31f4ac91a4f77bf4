"""Events as a short run reports them, for the tests of what becomes of them."""

from collections.abc import Mapping
from typing import SupportsFloat

from megalith.monitor.events import Evaluated, IntervalDone, StepDone, TrainingStarted
from megalith.monitor.memory import MemoryUse

STARTED = TrainingStarted(step=0, last_step=100, consumed_samples=0, num_devices=1, peak_flops=312e12)


def step_done(step: int, loss: SupportsFloat = 2.5, *, losses: Mapping[str, SupportsFloat] | None = None) -> StepDone:
    return StepDone(
        step=step,
        consumed_samples=64 * step,
        num_tokens=65536,
        seconds=0.5,
        losses={"lm loss": loss} if losses is None else losses,
        learning_rate=0.001 * step,
        global_batch_size=64,
        loss_scale=65536.0,
        skipped=False,
        grad_norm=1.25,
        model_flops=78e12,
        memory=MemoryUse(1 << 30, 2 << 30, 3 << 30, 4 << 30, 17),
    )


def interval_done(step: int = 10, *, last_step: int = 100) -> IntervalDone:
    return IntervalDone(
        step=step,
        last_step=last_step,
        consumed_samples=64 * step,
        num_steps=10,
        num_skipped=2,
        num_nan=0,
        seconds=10.0,
        step_seconds=5.0,
        losses={"lm loss": 2.5},
        learning_rate=0.001 * step,
        global_batch_size=64,
        loss_scale=65536.0,
        grad_norm=1.25,
        num_zeros=None,
        params_norm=None,
        num_tokens=655360,
        tokens_per_second=131072.0,
        tflops_per_device=156.0,
        mfu=0.5,
    )


def evaluated(split: str = "validation") -> Evaluated:
    return Evaluated(step=10, consumed_samples=640, split=split, final=False, losses={"lm loss": 3.0}, seconds=1.5)
