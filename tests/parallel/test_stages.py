"""Layers on pipeline stages: Megatron-LM's even division, and the best uneven one."""

import json
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megalith.parallel.stages import assign_layers, balanced_bounds


def test_even_division_is_the_reference_s(golden: Path) -> None:
    cases = json.loads((golden / "layer_assignment.json").read_text())["cases"]
    assert cases
    for case in cases:
        assigned = assign_layers(case["num_layers"], case["pp"], case["chunks"] or 1)
        numbered = [[[layer + 1 for layer in chunk] for chunk in chunks] for chunks in assigned]
        assert numbered == case["per_rank_chunks"]


@example(6, 3, 0.3, 0.0)  # 2 + 0.3 - 0.3 is less than 2
@given(
    st.integers(2, 9), st.integers(2, 5), st.sampled_from([0.0, 0.3, 1.0, 2.5]), st.sampled_from([0.0, 0.7, 1.5, 4.0])
)
def test_no_division_has_a_faster_slowest_part(layers: int, parts: int, first: float, last: float) -> None:
    if layers < parts:
        return

    def slowest(bounds: list[int]) -> float:
        costs = [float(b - a) for a, b in pairwise(bounds)]
        costs[0] += first
        costs[-1] += last
        return max(costs)

    bounds = balanced_bounds(layers, parts, first_cost=first, last_cost=last)
    assert bounds[0] == 0 and bounds[-1] == layers and all(a < b for a, b in pairwise(bounds))
    best = min(slowest([0, *cut, layers]) for cut in combinations(range(1, layers), parts - 1))
    assert slowest(bounds) == pytest.approx(best)


def test_fewer_layers_than_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer than the 8 parts of 4 pipeline stages x 2 chunks"):
        assign_layers(7, 4, 2)
