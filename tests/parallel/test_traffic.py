"""Ranks send each other what the formulas say, no more and no less."""

from pathlib import Path

import pytest

from benchmarks.traffic import LAYOUTS, compare, measure
from tests.layouts.runs import write_data

QUICK = {"tp2-sp", "tp2-sp-llama", "tp2-qwen", "cp2-llama", "zero2"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_collective_moves_what_its_formula_says(
    layout: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--slow") and layout not in QUICK:
        pytest.skip("run with --slow")
    rows = compare(measure(layout, write_data(tmp_path)))
    assert any(collective != "numbers" for collective, *_ in rows)
    for collective, axis, measured, formula, too_much in rows:
        assert not too_much, (collective, axis)
        if collective != "numbers":
            assert measured == formula, (collective, axis)


def test_16_bit_activations_halve_what_is_sent_of_them(tmp_path: Path) -> None:
    data = write_data(tmp_path)
    wide = {row[:2]: row[2] for row in compare(measure("pp2", data))}
    narrow = {row[:2]: row[2] for row in compare(measure("pp2", data, ["--bf16"]))}
    assert narrow["send", "pipeline"] * 2 == wide["send", "pipeline"]
    # Gradients of weights travel in fp32 all the same.
    assert narrow["all-reduce", "pipeline"] == wide["all-reduce", "pipeline"]
