"""The steps between two log lines, summed up.

A loss is averaged over the steps that were taken; skipped ones are counted. Values that lie on a GPU are read when the
interval ends, so that no step waits for the one before it. The state goes into the checkpoint: a run that resumes
between two lines prints the same mean as one that was never stopped.
"""

import math
from typing import Any, SupportsFloat

from megalith.monitor.events import IntervalDone, StepDone
from megalith.monitor.flops import throughput

MOST_PENDING = 256  # values left unread on the device at a time


class Interval:
    """Takes each step as it is done, and gives what the log line says.

    start: the clock's seconds when training begins; last_step: of the run; peak_flops: per second and device, if known.
    """

    def __init__(self, start: float, *, last_step: int, num_devices: int, peak_flops: float | None) -> None:
        self.last_step = last_step
        self.num_devices = num_devices
        self.peak_flops = peak_flops
        self.steps_here = 0  # that this process has added since its last close, those gone back over too
        self._clear(start)

    def _clear(self, start: float) -> None:
        self._start = start
        self._sums: dict[str, float] = {}
        self._pending: dict[str, list[SupportsFloat]] = {}
        self._taken = 0
        self._skipped = 0
        self._nan = 0
        self._num_tokens = 0
        self._step_seconds = 0.0
        self._model_flops: float | None = 0.0
        self._causal_flops: float | None = 0.0

    def add(self, step: StepDone) -> None:
        """Count one step. A skipped step's losses are read at once, to see whether they are finite."""
        if step.skipped:
            self._skipped += 1
            self._nan += any(not math.isfinite(float(loss)) for loss in step.losses.values())
        else:
            self._taken += 1
            for name, loss in step.losses.items():
                self._pending.setdefault(name, []).append(loss)
                if len(self._pending[name]) >= MOST_PENDING:
                    self._read()
        self.steps_here += 1
        self._num_tokens += step.num_tokens
        self._step_seconds += step.seconds
        self._model_flops = _sum(self._model_flops, step.model_flops)
        self._causal_flops = _sum(self._causal_flops, step.causal_flops)

    def _read(self) -> None:
        """Add the pending values to the sums, in the order of the steps: a sum is the same however often it is read."""
        for name, values in self._pending.items():
            for value in values:
                self._sums[name] = self._sums.get(name, 0.0) + float(value)
            values.clear()

    def close(self, step: StepDone, now: float) -> IntervalDone:
        """What happened since the last close, whose last step is step (already added); a new interval begins now."""
        self._read()
        seconds = now - self._start
        speed = throughput(
            self._num_tokens,
            self._step_seconds,
            model_flops=self._model_flops,
            num_devices=self.num_devices,
            peak_flops=self.peak_flops,
        )
        causal = throughput(
            self._num_tokens,
            self._step_seconds,
            model_flops=self._causal_flops,
            num_devices=self.num_devices,
            peak_flops=None,
        )
        done = IntervalDone(
            step=step.step,
            last_step=self.last_step,
            consumed_samples=step.consumed_samples,
            num_steps=self._taken + self._skipped,
            num_skipped=self._skipped,
            num_nan=self._nan,
            seconds=seconds,
            step_seconds=self._step_seconds,
            losses={name: total / self._taken for name, total in self._sums.items()},
            learning_rate=step.learning_rate,
            global_batch_size=step.global_batch_size,
            loss_scale=step.loss_scale,
            grad_norm=number(step.grad_norm),
            num_zeros=number(step.num_zeros),
            params_norm=number(step.params_norm),
            num_tokens=self._num_tokens,
            tokens_per_second=speed.tokens_per_second,
            tflops_per_device=speed.tflops_per_device,
            mfu=speed.mfu,
            causal_tflops_per_device=causal.tflops_per_device,
            peak_memory_bytes=None if step.memory is None else step.memory.max_allocated,
        )
        self.steps_here = 0
        self._clear(now)
        return done

    def state(self, now: float) -> dict[str, Any]:
        """What a checkpoint keeps: JSON values from which an equal interval goes on."""
        self._read()
        return {
            "sums": dict(self._sums),
            "taken": self._taken,
            "skipped": self._skipped,
            "nan": self._nan,
            "num_tokens": self._num_tokens,
            "step_seconds": self._step_seconds,
            "model_flops": self._model_flops,
            "causal_flops": self._causal_flops,
            "seconds": now - self._start,
        }

    def restore(self, state: dict[str, Any], now: float) -> None:
        """Go on from a state; the time between it and now is not counted."""
        self._clear(now - float(state["seconds"]))
        self._sums = {str(name): float(total) for name, total in state["sums"].items()}
        self._taken = int(state["taken"])
        self._skipped = int(state["skipped"])
        self._nan = int(state["nan"])
        self._num_tokens = int(state["num_tokens"])
        self._step_seconds = float(state["step_seconds"])
        flops, causal = state["model_flops"], state.get("causal_flops")
        self._model_flops = None if flops is None else float(flops)
        self._causal_flops = None if causal is None else float(causal)


def _sum(total: float | None, more: float | None) -> float | None:
    """Unknown once a part is."""
    return None if total is None or more is None else total + more


def number(value: SupportsFloat | None) -> float | None:
    return None if value is None else float(value)
