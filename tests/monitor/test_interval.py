"""An interval averages what was trained and counts what was skipped, and survives a restart."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import SupportsFloat

import pytest

from megalith.monitor.events import IntervalDone, StepDone
from megalith.monitor.interval import MOST_PENDING, Interval
from megalith.monitor.memory import MemoryUse
from tests.layouts.runs import events_of, run_on, write_data


class Deferred:
    """A number that counts how often it is read, as one on a GPU would wait for the device."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.reads = 0

    def __float__(self) -> float:
        self.reads += 1
        return self.value


def step(number: int, loss: SupportsFloat, *, skipped: bool = False, norm: float | None = 1.0) -> StepDone:
    return StepDone(
        step=number,
        consumed_samples=64 * number,
        num_tokens=1000,
        seconds=0.5,
        losses={"lm loss": loss},
        learning_rate=0.1 * number,
        global_batch_size=64,
        loss_scale=2.0**number,
        skipped=skipped,
        grad_norm=norm,
        model_flops=3e12,
    )


def interval(start: float = 0.0) -> Interval:
    return Interval(start, last_step=100, num_devices=2, peak_flops=6e12)


def test_the_loss_is_the_mean_over_the_steps_that_were_taken() -> None:
    summed = interval()
    for number, loss in enumerate((2.0, 100.0, 4.0), start=1):
        last = step(number, loss, skipped=number == 2)
        summed.add(last)
    done = summed.close(last, 6.0)
    assert done.losses == {"lm loss": 3.0}
    assert (done.num_steps, done.num_skipped, done.num_nan) == (3, 1, 0)
    assert done.seconds == 6.0 and done.step_seconds == 1.5
    assert (done.step, done.last_step, done.consumed_samples) == (3, 100, 192)
    assert done.learning_rate == pytest.approx(0.3) and done.loss_scale == 8.0


def test_an_interval_of_skipped_steps_has_no_loss_and_the_norm_of_the_last_step() -> None:
    summed = interval()
    last = step(1, 5.0, skipped=True, norm=None)
    summed.add(last)
    done = summed.close(last, 1.0)
    assert done.losses == {} and done.grad_norm is None


@pytest.mark.parametrize(("loss", "nans"), [(math.nan, 1), (math.inf, 1), (-math.inf, 1), (3.0, 0)])
def test_a_nan_step_is_a_skipped_one_whose_loss_is_not_finite(loss: float, nans: int) -> None:
    summed = interval()
    last = step(1, loss, skipped=True)
    summed.add(last)
    assert summed.close(last, 1.0).num_nan == nans


def test_a_nan_in_a_step_that_was_taken_makes_the_mean_nan_and_is_not_counted() -> None:
    summed = interval()
    summed.add(step(1, 1.0))
    summed.add(last := step(2, math.nan))
    done = summed.close(last, 1.0)
    assert math.isnan(done.losses["lm loss"]) and done.num_nan == 0


def test_the_next_interval_begins_where_the_last_ended() -> None:
    summed = interval()
    summed.add(last := step(1, 8.0))
    summed.close(last, 10.0)
    summed.add(last := step(2, 2.0))
    done = summed.close(last, 13.0)
    assert done.seconds == 3.0 and done.losses == {"lm loss": 2.0} and done.num_tokens == 1000


def test_losses_are_read_once_and_only_when_the_interval_ends() -> None:
    summed = interval()
    losses = [Deferred(float(number)) for number in range(10)]
    for number, loss in enumerate(losses):
        summed.add(step(number, loss))
    assert all(loss.reads == 0 for loss in losses)
    assert summed.close(step(10, 0.0), 1.0).losses == {"lm loss": 4.5}
    assert all(loss.reads == 1 for loss in losses)


def test_a_long_interval_holds_a_bounded_number_of_unread_losses() -> None:
    summed = interval()
    losses = [Deferred(1.0) for _ in range(2 * MOST_PENDING + 5)]
    for number, loss in enumerate(losses):
        summed.add(step(number, loss))
    assert sum(loss.reads == 0 for loss in losses) == 5


def test_the_speed_counts_the_steps_and_not_what_lies_between_them() -> None:
    summed = interval()
    for number in (1, 2):
        summed.add(last := step(number, 1.0))
    done = summed.close(last, 100.0)
    assert done.tokens_per_second == 2000.0
    assert done.tflops_per_device == 3.0  # 2 steps x 3e12 in 1 s on 2 devices
    assert done.mfu == 0.5


def run(losses: list[float], *, restart_after: int | None) -> IntervalDone:
    """Steps of half a second; a restart goes through JSON and to another clock."""
    summed, clock = interval(), 0.0
    for number, loss in enumerate(losses, start=1):
        clock += 0.5
        summed.add(last := step(number, loss, skipped=number % 4 == 0))
        if number == restart_after:
            state = json.loads(json.dumps(summed.state(clock)))
            clock = 5000.0
            summed = interval(clock)
            summed.restore(state, clock)
    return summed.close(last, clock)


@pytest.mark.parametrize("restart_after", [1, 4, 9])
def test_a_restart_between_two_lines_changes_nothing_in_the_next(restart_after: int) -> None:
    losses = [math.exp(-number / 7) * 11.3 for number in range(10)]
    assert run(losses, restart_after=restart_after) == run(losses, restart_after=None)


def test_the_steps_that_were_timed_are_those_since_the_last_line_and_the_restart() -> None:
    """Timers do not go into a checkpoint, so their sums are not over all steps of a line."""
    summed = interval()
    for number in (1, 2, 3):
        summed.add(step(number, 1.0))
    resumed = interval()
    resumed.restore(json.loads(json.dumps(summed.state(1.0))), 1.0)
    resumed.add(last := step(4, 1.0))
    assert (summed.steps_here, resumed.steps_here) == (3, 1)
    assert resumed.close(last, 2.0).num_steps == 4 and resumed.steps_here == 0


def test_operations_that_are_not_counted_leave_the_speed_in_tokens() -> None:
    summed = interval()
    summed.add(step(1, 1.0))
    uncounted = StepDone(2, 128, 1000, 0.5, {}, 0.1, 64, 1.0, skipped=False)
    summed.add(uncounted)
    done = summed.close(uncounted, 1.0)
    assert done.tokens_per_second == 2000.0 and done.tflops_per_device is None and done.mfu is None


def test_the_causal_convention_and_the_peak_of_memory_are_told_beside_the_rest() -> None:
    summed = interval()
    memory = MemoryUse(allocated=1, max_allocated=77, reserved=2, max_reserved=3)
    last = replace(step(1, 2.0), causal_flops=1.5e12, memory=memory)
    summed.add(step(0, 2.0))
    unknown = summed.close(step(0, 2.0), 1.0)
    assert unknown.causal_tflops_per_device is None and unknown.peak_memory_bytes is None
    summed.add(last)
    state = json.loads(json.dumps(summed.state(2.0)))
    resumed = interval()
    resumed.restore(state, 2.0)
    for each in (summed, resumed):
        done = each.close(last, 3.0)
        # 1.5e12 operations in half a second on two devices; Megatron's convention says twice as many.
        assert done.causal_tflops_per_device == pytest.approx(1.5) and done.tflops_per_device == pytest.approx(3.0)
        assert done.peak_memory_bytes == 77


def test_the_timers_of_a_resumed_run_are_divided_by_the_steps_that_it_took(tmp_path: Path) -> None:
    data, words = write_data(tmp_path), ["--train-iters", "4", "--log-interval", "4", "--save-interval", "3"]
    for more in (["--exit-interval", "3"], []):
        assert run_on(1, [*words, *more], tmp_path / "run", data) == 0
    reported = [record for record in events_of(tmp_path / "run", "timers_reported") if record["step"] == 4]
    assert [record["num_steps"] for record in reported] == [1]
