"""ViT: every layout gives the run of one rank, and a run goes on under any other, bit for bit under its own."""

from pathlib import Path

import pytest

from tests.images import write_images
from tests.layouts.runs import Runs, assert_goes_on, assert_goes_on_bit_for_bit, assert_same_run, steps_of

# Nine patches and the class token.
MODEL = """
    vit --num-layers 4 --hidden-size 32 --num-attention-heads 4 --img-dim 12 --patch-dim 4 --num-classes 3
    --seq-length 9 --max-position-embeddings 10 --micro-batch-size 2 --global-batch-size 8 --lr 3e-3
    --lr-warmup-iters 2 --weight-decay 0.1 --log-interval 1 --log-params-norm --eval-interval 10 --eval-iters 1
    --save-interval 10 --log-format json --device cpu --train-iters 20
""".split()
TP, PP, SHARD = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--data-parallel-sharding"

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "dp2": (2, []),
    "tp2": (2, [TP, "2"]),
    "tp2-sp": (2, [TP, "2", "--sequence-parallel"]),
    "pp2": (2, [PP, "2"]),
    "pp2-interleaved": (2, [PP, "2", "--num-layers-per-virtual-pipeline-stage", "1"]),
    "zero1": (2, [SHARD, "optimizer"]),
    "zero2": (2, [SHARD, "gradients"]),
    "zero3": (2, [SHARD, "parameters"]),
    "dp2-tp2": (4, [TP, "2"]),
    "zero3-tp2": (4, [TP, "2", SHARD, "parameters"]),
    "pp2-tp2-dp2": (8, [PP, "2", TP, "2", "--sequence-parallel"]),
}
QUICK = {"dp2", "tp2", "pp2"}
RESUMED = [("dp2", "pp2"), ("zero3", "tp2"), ("pp2", "zero1"), ("tp2-sp", "dp2"), ("dp2-tp2", "one")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("vit"), model=MODEL, write=write_images)


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"one"}))
def test_the_run_is_the_same_on_every_layout(layout: str, runs: Runs, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--slow") and layout not in QUICK:
        pytest.skip("run with --slow")
    world_size, words = LAYOUTS[layout]
    reference = runs(1)
    assert_same_run(runs(world_size, *words), reference)
    assert len(steps_of(reference)) == 20


@pytest.mark.parametrize(("saved", "loaded"), RESUMED)
def test_a_run_goes_on_under_another_layout(
    saved: str, loaded: str, runs: Runs, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--slow") and (saved, loaded) not in RESUMED[:2]:
        pytest.skip("run with --slow")
    assert_goes_on(runs, tmp_path / "run", LAYOUTS[saved], LAYOUTS[loaded], runs(1))


def test_a_run_goes_on_bit_for_bit_under_its_own(runs: Runs, tmp_path: Path) -> None:
    assert_goes_on_bit_for_bit(runs, tmp_path / "run", (1, []))
