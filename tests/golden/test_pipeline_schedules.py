"""The order of forward and backward passes on every stage, measured, is Megatron-LM's, but for one kind of warm-up."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import tests.early  # noqa: F401 - for its effect
from benchmarks.pipeline_picture import Event, Picture, measure, most_kept, waiting

CASES = json.loads((Path(__file__).parent / "data" / "pipeline_schedules.json").read_text())["cases"]
PIPELINED = [case for case in CASES if case["pp"] > 1]


def golden_order(stage: str, stages: int, rank: int) -> list[tuple[str, int, int]]:
    """(kind, part of the model, microbatch) of each pass in a golden row; exchanges are left out."""
    order = []
    for word in stage.split():
        if not word.startswith("<"):
            microbatch, _, chunk = word[1:].partition(".")
            order.append((word[0], int(chunk or 0) * stages + rank, int(microbatch)))
    return order


def order_of(events: Sequence[Event]) -> list[tuple[str, int, int]]:
    return [(event.kind, event.part, event.microbatch) for event in events]


def measured(case: dict[str, Any]) -> list[list[tuple[str, int, int]]]:
    parts = case["chunks"] or 1
    picture = Picture("golden", "1f1b" if parts == 1 else "interleaved", parts, case["pp"], case["microbatches"])
    return [order_of(events) for events in measure(picture, unit=0.0, backward=not case["forward_only"])]


def golden(case: dict[str, Any]) -> list[list[tuple[str, int, int]]]:
    return [golden_order(row, case["pp"], rank) for rank, row in enumerate(case["ranks"])]


def named(case: dict[str, Any]) -> str:
    return (
        f"pp{case['pp']}-mb{case['microbatches']}-chunks{case['chunks']}-{'eval' if case['forward_only'] else 'train'}"
    )


@pytest.mark.parametrize(
    "case", [case for case in PIPELINED if case["chunks"] is None or case["forward_only"]], ids=named
)
def test_the_order_is_megatron_s(case: dict[str, Any]) -> None:
    assert measured(case) == golden(case)


def test_interleaved_forwards_and_backwards_are_each_in_megatron_s_order() -> None:
    """With as many microbatches as stages Megatron-LM runs all forwards first; torch begins with backwards sooner."""
    (case,) = [case for case in PIPELINED if case["chunks"] and not case["forward_only"]]
    for stage, (found, wanted) in enumerate(zip(measured(case), golden(case), strict=True)):
        for kind in "FB":
            assert [step for step in found if step[0] == kind] == [step for step in wanted if step[0] == kind]
        warm_up = [step[0] for step in found].index("B")
        assert warm_up == min(2 * (case["pp"] - stage - 1) + case["pp"] + 1, 8)


@pytest.mark.parametrize("microbatches", [8, 12])
def test_interleaved_is_megatron_s_rule_with_more_microbatches_than_stages(microbatches: int) -> None:
    stages, parts = 4, 2
    picture = Picture("rule", "interleaved", parts, stages, microbatches)
    items = microbatches * parts

    def forward(item: int) -> tuple[str, int, int]:
        chunk = item % (stages * parts) // stages
        return "F", chunk * stages + rank, item // (stages * parts) * stages + item % stages

    def backward(item: int) -> tuple[str, int, int]:
        _, part, microbatch = forward(item)
        return "B", (parts - 1 - part // stages) * stages + rank, microbatch

    for rank, events in enumerate(measure(picture, unit=0.0)):
        warm_up = min(2 * (stages - rank - 1) + (parts - 1) * stages, items)
        wanted = [forward(item) for item in range(warm_up)]
        for item in range(warm_up, items):
            wanted += [forward(item), backward(item - warm_up)]
        wanted += [backward(item) for item in range(items - warm_up, items)]
        assert order_of(events) == wanted


def test_1f1b_keeps_fewer_activations_than_gpipe() -> None:
    gpipe = measure(Picture("gpipe", "gpipe", 1), unit=0.0)
    one = measure(Picture("1f1b", "1f1b", 1), unit=0.0)
    assert [most_kept(stage) for stage in gpipe] == [8, 8, 8, 8]
    assert [most_kept(stage) for stage in one] == [4, 3, 2, 1]


def test_zero_bubble_runs_every_pass_once_and_fills_waits_with_weight_gradients() -> None:
    events = measure(Picture("zero-bubble", "zero-bubble", 1), unit=0.0)
    for rank, stage in enumerate(events):
        order = order_of(stage)
        for microbatch in range(8):
            kinds = [kind for kind, _, number in order if number == microbatch]
            assert kinds == ["F", "I", "W"], f"stage {rank}"
    assert 0 <= waiting(events) < 1
