"""What a run is asked for besides its layout works under every layout: recomputation, uneven stages, documents."""

import pytest

from tests.layouts.runs import Runs, assert_same_run, largest_difference, steps_of

TP, PP, CP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"
STEPS = ["--train-iters", "14"]
FULL = ["--checkpoint-activations"]
RECOMPUTATIONS = {
    "full": FULL,
    "selective": ["--recompute-granularity", "selective"],
    "every-2": [*FULL, "--checkpoint-num-layers", "2"],
    "distributed": [*FULL, "--distribute-checkpointed-activations"],
    "distributed-every-2": [*FULL, "--checkpoint-num-layers", "2", "--distribute-checkpointed-activations"],
}


@pytest.mark.parametrize("recomputation", RECOMPUTATIONS)
@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "pp2"])
def test_recomputation_changes_no_bit(
    layout: str, recomputation: str, runs: Runs, request: pytest.FixtureRequest
) -> None:
    quick = layout == "tp2" and recomputation == "distributed-every-2"
    if not request.config.getoption("--slow") and not quick:
        pytest.skip("run with --slow")
    if layout == "tp2-sp" and recomputation.startswith("distributed"):
        pytest.skip("refused: the sequence is cut already")
    laid = {"tp2": [TP, "2"], "tp2-sp": [TP, "2", "--sequence-parallel"], "pp2": [PP, "2"]}[layout]
    words = ["--train-iters", "5", *laid]
    run, wanted = runs(2, *words, *RECOMPUTATIONS[recomputation]), runs(2, *words)
    assert largest_difference(run, wanted) == 0.0
    for step, want in zip(steps_of(run), steps_of(wanted), strict=True):
        assert (step["losses"], step["grad_norm"]) == (want["losses"], want["grad_norm"])


# A document ends in most samples, layers do not divide over stages, gradients are clipped at every step.
AWKWARD = """
    --num-layers 5 --reset-attention-mask --reset-position-ids --eod-mask-loss --clip-grad 0.5 --micro-batch-size 2
""".split()
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "pp2": (2, [PP, "2"]),
    "pp3": (3, [PP, "3"]),
    "pp2-gpipe": (2, [PP, "2", "--pipeline-schedule", "gpipe"]),
    "tp2-sp": (2, [TP, "2", "--sequence-parallel"]),
    "cp2": (2, [CP, "2"]),
    "cp2-all-to-all": (2, [CP, "2", "--context-exchange", "all-to-all"]),
    "pp2-cp2": (4, [PP, "2", CP, "2"]),
    "zero3": (2, ["--data-parallel-sharding", "parameters"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_uneven_stages_documents_and_clipping_give_the_same_run(
    layout: str, runs: Runs, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--slow") and layout not in {"pp2", "cp2"}:
        pytest.skip("run with --slow")
    world_size, words = LAYOUTS[layout]
    reference = runs(1, *STEPS, *AWKWARD)
    assert all(step["grad_norm"] > 0.5 for step in steps_of(reference)), "clipping is at work"
    assert_same_run(runs(world_size, *STEPS, *AWKWARD, *words), reference)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler has warnings of its own
@pytest.mark.parametrize("layout", ["one", "tp2", "zero3"])
def test_compiled_blocks_with_a_memory_budget_give_the_same_run(layout: str, runs: Runs) -> None:
    world_size, words = {"one": (1, []), "tp2": (2, [TP, "2"]), "zero3": LAYOUTS["zero3"]}[layout]
    words = ["--train-iters", "5", *words]
    compiled = runs(world_size, *words, "--compile", "on", "--activation-memory-budget", "0.3")
    assert_same_run(compiled, runs(world_size, *words))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("layout", ["one", "tp2", "cp2"])
def test_compiled_blocks_that_are_computed_again_give_the_same_run(layout: str, runs: Runs) -> None:
    # Without dropout the CPU's blocks are compiled whole; on one rank they are computed again inside.
    world_size, words = {"one": (1, []), "tp2": (2, [TP, "2"]), "cp2": LAYOUTS["cp2"]}[layout]
    words = ["--train-iters", "5", "--hidden-dropout", "0", "--attention-dropout", "0", *words]
    compiled = runs(world_size, *words, "--compile", "on", "--checkpoint-activations")
    assert_same_run(compiled, runs(world_size, *words))


@pytest.mark.parametrize("sharding", ["gradients", pytest.param("parameters", marks=pytest.mark.slow)])
def test_sgd_updates_weights_that_are_shared_out(sharding: str, runs: Runs) -> None:
    words = ["--train-iters", "5", "--optimizer", "sgd"]
    assert_same_run(runs(2, *words, "--data-parallel-sharding", sharding), runs(1, *words))


@pytest.mark.parametrize(
    ("world_size", "words"),
    [
        (2, LAYOUTS["pp2"][1]),
        pytest.param(2, [PP, "2", "--num-layers-per-virtual-pipeline-stage", "1"], marks=pytest.mark.slow),
        pytest.param(4, [PP, "2", "--data-parallel-sharding", "parameters"], marks=pytest.mark.slow),
    ],
    ids=["pp2", "pp2-interleaved", "pp2-zero3"],
)
def test_a_ramp_of_batch_sizes_gives_the_same_run_on_stages(world_size: int, words: list[str], runs: Runs) -> None:
    ramp = "--rampup-batch-size 4 4 24 --global-batch-size 12 --lr-warmup-iters 0 --train-samples 80".split()
    reference = runs(1, *ramp)
    assert [step["global_batch_size"] for step in steps_of(reference)][:7] == [4, 4, 4, 8, 8, 12, 12]
    assert_same_run(runs(world_size, *ramp, *words), reference)
