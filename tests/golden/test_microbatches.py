"""Batch sizes and numbers of micro-batches are Megatron-LM's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megalith.optim.batch_size import ConstantBatch, RampedBatch, steps_for_samples


@pytest.fixture
def tables(golden: Path) -> dict[str, Any]:
    tables: dict[str, Any] = json.loads((golden / "microbatches.json").read_text())
    return tables


def sentence_of(error: str) -> str:
    """The reference's message, without its exception's name and with the blank that it forgot."""
    return re.escape(error.removeprefix("AssertionError: ").replace("timesdata", "times data"))


def ramp_of(case: dict[str, Any]) -> RampedBatch:
    return RampedBatch(
        case["global_batch"], case["micro"], case["dp"], case["start"], case["increment"], case["ramp_samples"]
    )


def test_constant_batches(tables: dict[str, Any]) -> None:
    for batch, micro, replicas, expected in tables["constant"]:
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=sentence_of(expected)):
                ConstantBatch(batch, micro, replicas)
        else:
            assert ConstantBatch(batch, micro, replicas).num_microbatches(0) == expected


def test_ramped_batches(tables: dict[str, Any]) -> None:
    assert len(tables["rampup"]) == 4
    for case in tables["rampup"]:
        if "raises" in case:
            with pytest.raises(ValueError, match=sentence_of(case["raises"])):
                ramp_of(case)
            continue
        ramp = ramp_of(case)
        assert ramp.samples_per_increment == case["samples_per_increment"]
        for consumed, batch, number, consistent in case["rows"]:
            assert ramp.batch_size(consumed) == batch
            if consistent is True:
                assert ramp.num_microbatches(consumed) == number
            else:
                with pytest.raises(ValueError, match=sentence_of(consistent)):
                    ramp.num_microbatches(consumed)


def test_walks_through_the_ramp(tables: dict[str, Any]) -> None:
    for case in tables["rampup"]:
        if "raises" in case:
            continue
        ramp = ramp_of(case)
        consumed, walked = 0, []
        for _ in range(60):
            # The reference walks on where the batch is not whole; a run of ours would stop there.
            number = ramp.batch_size(consumed) // (case["micro"] * case["dp"])
            walked.append([consumed, ramp.batch_size(consumed), number])
            consumed += case["micro"] * case["dp"] * number
        assert walked == case["walk_first_60_iterations"]


def test_number_of_steps(tables: dict[str, Any]) -> None:
    assert tables["train_iters_for_rampup"]
    for start, increment, ramp_samples, batch, micro, replicas, train_samples, steps in tables[
        "train_iters_for_rampup"
    ]:
        ramp = RampedBatch(batch, micro, replicas, start, increment, ramp_samples)
        assert steps_for_samples(train_samples, ramp) == steps
