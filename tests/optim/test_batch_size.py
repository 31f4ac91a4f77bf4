"""Batch sizes: what the settings give, what they refuse, and the sentences."""

import pytest

from megalith.optim.batch_size import (
    ConstantBatch,
    RampedBatch,
    consumed_after,
    make_batch_sizes,
    steps_for_samples,
    steps_left,
)
from megalith.optim.settings import OptimizerConfig


def test_a_missing_global_batch_is_one_round() -> None:
    assert make_batch_sizes(OptimizerConfig(micro_batch_size=4), data_parallel=3) == ConstantBatch(12, 4, 3)
    with pytest.raises(ValueError, match="--micro-batch-size"):
        make_batch_sizes(OptimizerConfig(), data_parallel=3)


def test_the_settings_give_a_ramp() -> None:
    config = OptimizerConfig(micro_batch_size=1, global_batch_size=1024, rampup_batch_size=("16", "8", "300000"))
    ramp = make_batch_sizes(config, data_parallel=8)
    assert ramp == RampedBatch(1024, 1, 8, start=16, increment=8, ramp_samples=300000)


@pytest.mark.parametrize(
    "words", [("16", "8"), ("16", "8", "x"), ("0", "8", "100"), ("16", "0", "100"), ("16", "8", "0"), ("64", "8", "9")]
)
def test_an_impossible_ramp_is_refused(words: tuple[str, ...]) -> None:
    config = OptimizerConfig(micro_batch_size=1, global_batch_size=64, rampup_batch_size=words)
    with pytest.raises(ValueError, match="rampup_batch_size="):
        make_batch_sizes(config, data_parallel=1)


def test_a_ramp_must_start_below_the_batch() -> None:
    with pytest.raises(ValueError, match="at or below"):
        RampedBatch(64, 1, 1, start=72, increment=8, ramp_samples=10)


@pytest.mark.parametrize("sizes", [(64, 0, 1), (64, 1, 0), (0, 1, 1), (-8, 4, 1)])
def test_sizes_are_positive(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError):
        ConstantBatch(*sizes)


def test_the_ramp_goes_through_every_size_in_order() -> None:
    ramp = RampedBatch(64, 4, 2, start=16, increment=8, ramp_samples=120)
    sizes = [ramp.batch_size(consumed) for consumed in range(140)]
    assert sizes == sorted(sizes) and sorted(set(sizes)) == [16, 24, 32, 40, 48, 56, 64]
    assert all(size == 64 for size in sizes[120:])
    assert all(ramp.num_microbatches(consumed) * 8 == size for consumed, size in enumerate(sizes))


def test_steps_of_a_constant_batch_leave_out_a_rest() -> None:
    assert steps_for_samples(1000, ConstantBatch(64, 8, 1)) == 15
    with pytest.raises(ValueError, match="too short"):
        steps_for_samples(63, ConstantBatch(64, 8, 1))


@pytest.mark.parametrize("train_samples", [*range(1, 40), 300, 599, 600, 601, 640])
def test_a_run_takes_no_more_samples_than_it_is_given_although_it_ends_inside_of_its_ramp(train_samples: int) -> None:
    ramp = RampedBatch(8, 1, 1, start=1, increment=1, ramp_samples=600)
    steps = steps_for_samples(train_samples, ramp)
    taken = consumed_after(ramp, 0, steps)
    assert taken <= train_samples < taken + ramp.batch_size(taken)
    for done in range(steps + 1):
        assert steps_left(train_samples, ramp, consumed_after(ramp, 0, done)) == steps - done


def test_what_steps_will_have_consumed_is_what_they_take_one_by_one() -> None:
    for batches in (ConstantBatch(8, 2, 2), RampedBatch(16, 2, 2, start=4, increment=4, ramp_samples=30)):
        consumed = 5
        for steps in range(12):
            assert consumed_after(batches, 5, steps) == consumed
            consumed += batches.batch_size(consumed)
