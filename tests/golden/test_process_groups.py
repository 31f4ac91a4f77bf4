"""Ranks and groups are Megatron-LM's, for each of its golden layouts."""

import json
from pathlib import Path

import pytest

from megalith.parallel.mesh import Layout

CASES = json.loads((Path(__file__).parent / "data" / "process_groups.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"world{case['world']}-tp{case['tp']}-pp{case['pp']}")
def test_ranks_and_groups_are_those_of_the_reference(case: dict[str, int | list[dict[str, int | list[int]]]]) -> None:
    ranks = case["ranks"]
    assert isinstance(ranks, list) and ranks
    for want in ranks:
        layout = Layout(int(case["world"]), int(want["rank"]), 0, tensor=int(case["tp"]), pipeline=int(case["pp"]))  # type: ignore[arg-type]
        assert layout.data == case["dp"]
        assert layout.place("tensor") == want["tp_rank"]
        assert layout.place("pipeline") == want["pp_rank"]
        assert layout.place("data") == want["dp_rank"]
        assert layout.ranks_along("tensor") == want["tp_group"]
        pipeline = layout.ranks_along("pipeline")
        assert pipeline == want["pp_group"]
        assert layout.ranks_along("data") == want["dp_group"]
        assert layout.ranks_along("pipeline", "tensor") == want["mp_group"]
        if layout.rank in (pipeline[0], pipeline[-1]):
            assert sorted({pipeline[0], pipeline[-1]}) == want["embedding_group"]
        assert layout.ranks_along("tensor")[0] == want["tp_src_rank"]
        here = pipeline.index(layout.rank)
        assert pipeline[here - 1] == want["pp_prev"]
        assert pipeline[(here + 1) % len(pipeline)] == want["pp_next"]


def test_context_parallel_ranks_lie_between_tensor_and_data() -> None:
    layouts = [Layout(16, rank, 0, tensor=2, pipeline=2, context=2) for rank in range(16)]
    assert layouts[0].ranks_along("context") == [0, 2]
    assert layouts[0].ranks_along("data") == [0, 4]
    assert layouts[5].ranks_along("data", "context") == [1, 3, 5, 7]
    assert layouts[0].ranks_along("pipeline") == [0, 8]
