"""Every layout gives the same run: losses, norms and final weights of one rank, step by step."""

import pytest

from tests.layouts.runs import Runs, assert_same_run, largest_difference, steps_of

STEPS = ["--train-iters", "14"]
TP, PP, CP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"
INTERLEAVED = [PP, "2", "--num-layers-per-virtual-pipeline-stage", "1"]

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "dp2": (2, []),
    "tp2": (2, [TP, "2"]),
    "tp2-sp": (2, [TP, "2", "--sequence-parallel"]),
    "pp2": (2, [PP, "2"]),
    "pp2-gpipe": (2, [PP, "2", "--pipeline-schedule", "gpipe"]),
    "pp2-interleaved": (2, INTERLEAVED),
    "pp2-zero-bubble": (2, [*INTERLEAVED, "--pipeline-schedule", "zero-bubble"]),
    "cp2": (2, [CP, "2"]),
    "cp2-all-to-all": (2, [CP, "2", "--context-exchange", "all-to-all"]),
    "zero1": (2, ["--data-parallel-sharding", "optimizer"]),
    "zero2": (2, ["--data-parallel-sharding", "gradients"]),
    "zero3": (2, ["--data-parallel-sharding", "parameters"]),
    "hybrid": (4, ["--data-parallel-sharding", "parameters", "--data-parallel-shard-size", "2"]),
    "hybrid-pp2": (8, [PP, "2", "--data-parallel-sharding", "gradients", "--data-parallel-shard-size", "2"]),
    "hybrid-cp2": (4, [CP, "2", "--data-parallel-sharding", "parameters", "--data-parallel-shard-size", "2"]),
    "dp2-tp2": (4, [TP, "2"]),
    "pp2-dp2": (4, [PP, "2"]),
    "pp2-zero3": (4, [PP, "2", "--data-parallel-sharding", "parameters"]),
    "zero-bubble-zero2": (
        4,
        [*INTERLEAVED, "--pipeline-schedule", "zero-bubble", "--data-parallel-sharding", "gradients"],
    ),
    "pp2-tp2": (4, [PP, "2", TP, "2"]),
    "tp2-cp2": (4, [TP, "2", "--sequence-parallel", CP, "2"]),
    "zero3-tp2": (4, [TP, "2", "--data-parallel-sharding", "parameters"]),
    "pp2-tp2-dp2": (8, [PP, "2", TP, "2", "--sequence-parallel"]),
    "pp2-tp2-zero2": (8, [PP, "2", TP, "2", "--data-parallel-sharding", "gradients"]),
}
MODELS = {
    "dropout": [],
    "no-dropout": ["--hidden-dropout", "0", "--attention-dropout", "0"],
    "untied": ["--untie-embeddings-and-output-weights"],
    "llama": """
        --normalization RMSNorm --disable-bias-linear --swiglu --untie-embeddings-and-output-weights
        --position-embedding-type rope --group-query-attention --num-query-groups 2
        --reset-position-ids --reset-attention-mask
    """.split(),
    "qwen": """
        --normalization RMSNorm --disable-bias-linear --add-qkv-bias --qk-layernorm --swiglu --kv-channels 12
        --position-embedding-type rope --group-query-attention --num-query-groups 2
    """.split(),
}
QUICK = {
    "dropout": {"dp2", "tp2-sp", "pp2", "cp2", "zero1", "pp2-tp2-dp2"},
    "untied": {"pp2-interleaved"},
    "no-dropout": set[str](),
    "llama": {"pp2-zero-bubble", "cp2"},
    "qwen": {"tp2", "dp2-tp2", "zero3"},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_run_is_the_same_on_every_layout(
    model: str, layout: str, runs: Runs, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--slow") and layout not in QUICK[model]:
        pytest.skip("run with --slow")
    world_size, words = LAYOUTS[layout]
    reference = runs(1, *STEPS, *MODELS[model])
    assert_same_run(runs(world_size, *STEPS, *MODELS[model], *words), reference)
    assert len(steps_of(reference)) == 14


# Two layouts that add the same numbers in the same order, with the model for which they do; "one" is one rank.
SAME_SUMS = [
    ("pp2", "pp2-zero-bubble", "dropout"),
    ("one", "pp2-interleaved", "untied"),
    ("pp2", "pp2-gpipe", "dropout"),
    ("pp2", "pp2-interleaved", "dropout"),
    ("one", "pp2", "untied"),
    ("dp2", "pp2-dp2", "untied"),
    ("zero2", "zero3", "dropout"),
]


@pytest.mark.parametrize(("layout", "other", "model"), SAME_SUMS)
def test_layouts_with_the_same_sums_give_the_same_bits(
    layout: str, other: str, model: str, runs: Runs, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--slow") and (layout, other, model) not in SAME_SUMS[:1]:
        pytest.skip("run with --slow")
    laid = {"one": (1, list[str]()), **LAYOUTS}
    first, second = (runs(laid[name][0], *STEPS, *MODELS[model], *laid[name][1]) for name in (layout, other))
    assert largest_difference(first, second) == 0.0


def test_a_pipeline_adds_losses_up_as_one_rank_does(runs: Runs) -> None:
    """Of many microbatches, which torch's sum adds up in another order."""
    words = ["--train-iters", "6", "--global-batch-size", "32", *MODELS["untied"]]
    one, pipeline = (steps_of(runs(world_size, *words, *stages)) for world_size, stages in ((1, []), (2, [PP, "2"])))
    assert [step["losses"] for step in one] == [step["losses"] for step in pipeline]
