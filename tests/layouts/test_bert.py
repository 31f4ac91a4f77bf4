"""BERT: every layout gives the run of one rank, and a run goes on under any other, bit for bit under its own."""

from pathlib import Path

import pytest

from tests.layouts.runs import (
    Runs,
    assert_goes_on,
    assert_goes_on_bit_for_bit,
    assert_same_run,
    events_of,
    steps_of,
    weights_of,
)
from tests.sentences import write_sentences, write_vocabulary

MODEL = """
    bert --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 24 --max-position-embeddings 24
    --micro-batch-size 2 --global-batch-size 8 --lr 3e-3 --lr-warmup-iters 2 --weight-decay 0.1 --log-interval 1
    --log-params-norm --make-vocab-size-divisible-by 8 --split 80,20,0 --eval-interval 10 --eval-iters 1
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
    "pp2-tp2-sp": (4, [PP, "2", TP, "2", "--sequence-parallel"]),
    "zero3-tp2": (4, [TP, "2", SHARD, "parameters"]),
    "pp2-tp2-dp2": (8, [PP, "2", TP, "2", "--sequence-parallel"]),
}
QUICK = {"tp2", "pp2-tp2-sp", "zero3"}
OTHERS = {"no-binary-head": ["--bert-no-binary-head"], "norm-after": ["--norm-after-residual"]}
RESUMED = [("dp2", "pp2"), ("zero3", "tp2"), ("pp2", "zero1"), ("tp2-sp", "dp2"), ("dp2-tp2", "one")]


def write_data(folder: Path) -> Path:
    write_vocabulary(folder)
    return write_sentences(folder)


class BertRuns(Runs):
    """Trainings on sentences, whose vocabulary lies beside them."""

    def go_on(self, world_size: int, words: list[str] | tuple[str, ...], save: Path) -> int:  # type: ignore[override]
        return super().go_on(world_size, ["--vocab-file", str(self.data.parent / "vocab.txt"), *words], save)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return BertRuns(tmp_path_factory.mktemp("bert"), model=MODEL, write=write_data)


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"one"}))
def test_the_run_is_the_same_on_every_layout(layout: str, runs: Runs, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--slow") and layout not in QUICK:
        pytest.skip("run with --slow")
    world_size, words = LAYOUTS[layout]
    reference = runs(1)
    assert_same_run(runs(world_size, *words), reference)
    assert len(steps_of(reference)) == 20
    assert set(steps_of(reference)[0]["losses"]) == {"lm loss", "sop loss"}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("layout", ["tp2-sp", "pp2-tp2-dp2"])
def test_the_other_forms_of_the_model_are_the_same_too(
    layout: str, other: str, runs: Runs, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--slow"):
        pytest.skip("run with --slow")
    world_size, words = LAYOUTS[layout]
    reference = runs(1, *OTHERS[other])
    assert_same_run(runs(world_size, *words, *OTHERS[other]), reference)
    names = weights_of(reference).keys()
    if other == "no-binary-head":
        assert set(steps_of(reference)[0]["losses"]) == {"lm loss"}
        assert not any("pooler" in name or "binary_head" in name or "token_type" in name for name in names)
    else:
        assert not any("final_norm" in name for name in names) and any("embedding_norm" in name for name in names)


@pytest.mark.parametrize(("saved", "loaded"), RESUMED)
def test_a_run_goes_on_under_another_layout(
    saved: str, loaded: str, runs: Runs, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--slow") and (saved, loaded) not in RESUMED[:1]:
        pytest.skip("run with --slow")
    assert_goes_on(runs, tmp_path / "run", LAYOUTS[saved], LAYOUTS[loaded], runs(1))


def test_a_run_goes_on_bit_for_bit_under_its_own(runs: Runs, tmp_path: Path) -> None:
    assert_goes_on_bit_for_bit(runs, tmp_path / "run", (1, []))


def test_the_run_learns(runs: Runs) -> None:
    losses = [step["losses"] for step in steps_of(runs(1))]
    assert losses[-1]["lm loss"] < losses[0]["lm loss"] - 0.1
    assert len(events_of(runs(1), "evaluated")) == 3
