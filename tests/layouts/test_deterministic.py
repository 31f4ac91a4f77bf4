"""--deterministic: the same bits for any number of replicas, and for every run."""

import pytest

from megalith.parallel.step import nested_order
from tests.layouts.runs import Runs, largest_difference, steps_of
from tests.layouts.test_layouts import MODELS

WORDS = ["--train-iters", "14", "--deterministic"]


def assert_same_bits(runs: Runs, world_size: int, words: list[str], reference: list[str]) -> None:
    run, wanted = runs(world_size, *words), runs(1, *reference)
    assert largest_difference(run, wanted) == 0.0
    for step, want in zip(steps_of(run), steps_of(wanted), strict=True):
        for name in ("losses", "grad_norm", "params_norm"):
            assert step[name] == want[name]


@pytest.mark.parametrize("world_size", [2, 4])
def test_data_parallel_sizes_1_2_and_4_give_the_same_bits(world_size: int, runs: Runs) -> None:
    assert_same_bits(runs, world_size, WORDS, WORDS)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_so_they_do_with_microbatches_that_cannot_be_halved_to_one(world_size: int, runs: Runs) -> None:
    words = [*WORDS, "--global-batch-size", "12"]
    assert_same_bits(runs, world_size, words, words)


@pytest.mark.slow
@pytest.mark.parametrize("further", [[], ["--sequence-parallel"], MODELS["qwen"]], ids=["plain", "sequence", "qwen"])
def test_so_they_do_within_tensor_parallelism(further: list[str], runs: Runs) -> None:
    words = [*WORDS, "--tensor-model-parallel-size", "2", *further]
    assert largest_difference(runs(4, *words), runs(2, *words)) == 0.0


def test_the_order_of_one_rank_nests_that_of_its_replicas() -> None:
    for replicas in (2, 4):
        for count in (8, 12, 20):
            # Dealt out one by one: what a replica adds first is what one rank adds first.
            for replica in range(replicas):
                dealt = [[n * replicas + replica for n in together] for together in nested_order(count // replicas)]
                assert all(together in nested_order(count) for together in dealt)
