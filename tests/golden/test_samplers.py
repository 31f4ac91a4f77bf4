"""Samples are dealt to steps and replicas as Megatron-LM's samplers deal them."""

import json
from pathlib import Path
from typing import Any

import pytest

from megalith.data.order import CyclicOrder, SingleOrder, consumed_at, deal, sample_counts

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "samplers.json").read_text())


def named(case: dict[str, Any]) -> str:
    return f"{case['total']}-from-{case['consumed']}-{case['micro']}x{case['dp']}"


@pytest.mark.parametrize("case", RECORDED["single"], ids=named)
def test_the_single_order_is_identical(case: dict[str, Any]) -> None:
    assert case["drop_last"]
    sizes = {"micro_batch_size": case["micro"], "data_parallel": case["dp"]}
    group = case["micro"] * case["dp"]
    whole = (case["total"] - case["consumed"]) // group * group
    dealt = deal(SingleOrder(case["total"]).global_indices(case["consumed"], whole), **sizes)
    assert [dealt[:, replica].tolist() for replica in range(case["dp"])] == case["ranks"]


@pytest.mark.parametrize("case", RECORDED["cyclic"], ids=named)
def test_the_cyclic_order_is_identical(case: dict[str, Any]) -> None:
    sizes = {"micro_batch_size": case["micro"], "data_parallel": case["dp"]}
    group = case["micro"] * case["dp"]
    epoch = case["total"] // group * group
    first = epoch - case["consumed"] % epoch
    dealt = deal(CyclicOrder(case["total"], **sizes).global_indices(case["consumed"], first + epoch), **sizes)
    passes = dealt[: first // group], dealt[first // group :]
    assert [passes[0][:, replica].tolist() for replica in range(case["dp"])] == case["ranks_one_pass"]
    assert [one[:, 0].tolist() for one in passes] == case["rank0_two_passes"]


def test_the_run_of_the_log_asks_for_its_numbers_of_samples() -> None:
    counts = sample_counts(
        train_iters=1000, train_samples=None, global_batch_size=64, eval_interval=1000, eval_iters=10
    )
    assert (counts.train, counts.valid, counts.test) == (64000, 1280, 640)


def test_an_old_checkpoint_has_consumed_what_its_iteration_says() -> None:
    consumed = consumed_at(250, global_batch_size=64, eval_interval=100, eval_iters=10)
    assert (consumed.train, consumed.valid) == (16000, 1280)
