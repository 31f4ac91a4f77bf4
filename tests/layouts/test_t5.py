"""T5: every layout, pipelines too, gives the run of one rank, and a run goes on under any other, bit for bit under its
own."""

from pathlib import Path

import pytest

from tests.layouts.runs import Runs, assert_goes_on, assert_goes_on_bit_for_bit, assert_same_run, steps_of
from tests.sentences import write_sentences, write_vocabulary

# Two layers in each stack, and a decoder shorter than the encoder.
MODEL = """
    t5 --num-layers 2 --hidden-size 32 --num-attention-heads 4 --encoder-seq-length 24 --decoder-seq-length 12
    --max-position-embeddings 24 --vocab-extra-ids 8 --make-vocab-size-divisible-by 8 --micro-batch-size 2
    --global-batch-size 8 --lr 3e-3 --lr-warmup-iters 2 --weight-decay 0.1 --log-interval 1 --log-params-norm
    --eval-interval 10 --eval-iters 1 --split 80,20,0 --save-interval 10 --log-format json --device cpu --train-iters 14
""".split()
TP, PP, SHARD = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--data-parallel-sharding"
VIRTUAL = "--num-layers-per-virtual-pipeline-stage"

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "dp2": (2, []),
    "tp2": (2, [TP, "2"]),
    "tp2-sp": (2, [TP, "2", "--sequence-parallel"]),
    # Encoder and decoder apart.
    "pp2": (2, [PP, "2"]),
    # Both cut in two, so that what the decoder sees passes a rank that only hands it on.
    "pp4": (4, [PP, "4"]),
    # The first rank holds a layer of each stack.
    "pp2-interleaved": (2, [PP, "2", VIRTUAL, "1"]),
    # The middle stage ends the encoder and begins the decoder.
    "pp3": (3, [PP, "3", "--micro-batch-size", "1"]),
    "zero1": (2, [SHARD, "optimizer"]),
    "zero2": (2, [SHARD, "gradients"]),
    "zero3": (2, [SHARD, "parameters"]),
    "dp2-tp2": (4, [TP, "2"]),
    "pp2-dp2": (4, [PP, "2"]),
    "zero3-tp2": (4, [TP, "2", SHARD, "parameters"]),
    "pp2-zero3": (4, [PP, "2", SHARD, "parameters"]),
    "pp2-tp2-dp2": (8, [PP, "2", TP, "2", "--sequence-parallel"]),
    "recomputed": (1, ["--checkpoint-activations"]),
    "tp2-recomputed": (2, [TP, "2", "--checkpoint-activations", "--distribute-checkpointed-activations"]),
}
# The original T5, as Hugging Face's weights need it.
ORIGINAL = """
    --normalization RMSNorm --disable-bias-linear --activation-function gated-gelu --softmax-scale 1.0
    --position-embedding-type relative --relative-attention-num-buckets 8 --relative-attention-max-distance 20
    --disable-output-bias --untie-embeddings-and-output-weights
""".split()
ORIGINAL_LAYOUTS = ("tp2-sp", "pp2", "zero3", "dp2-tp2", "pp2-tp2-dp2", "recomputed")
QUICK = {"dp2", "pp2-interleaved"}
RESUMED = [("dp2", "pp2"), ("pp2-interleaved", "tp2"), ("zero3", "pp2"), ("pp4", "zero1"), ("dp2-tp2", "one")]


def write_data(folder: Path) -> Path:
    """Sentences with their vocabulary beside them."""
    write_vocabulary(folder)
    return write_sentences(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("t5")
    return Runs(folder, model=[*MODEL, "--vocab-file", str(folder / "vocab.txt")], write=write_data)


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"one"}))
def test_the_run_is_the_same_on_every_layout(layout: str, runs: Runs, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--slow") and layout not in QUICK:
        pytest.skip("run with --slow")
    world_size, words = LAYOUTS[layout]
    reference = runs(1)
    assert_same_run(runs(world_size, *words), reference)
    assert len(steps_of(reference)) == 14


@pytest.mark.parametrize("layout", ORIGINAL_LAYOUTS)
def test_the_original_t5_is_the_same_on_every_layout(layout: str, runs: Runs, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--slow") and layout != "tp2-sp":
        pytest.skip("run with --slow")
    world_size, words = LAYOUTS[layout]
    assert_same_run(runs(world_size, *words, *ORIGINAL), runs(1, *ORIGINAL))


@pytest.mark.parametrize(("saved", "loaded"), RESUMED)
def test_a_run_goes_on_under_another_layout(
    saved: str, loaded: str, runs: Runs, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--slow") and (saved, loaded) not in RESUMED[:2]:
        pytest.skip("run with --slow")
    assert_goes_on(runs, tmp_path / "run", LAYOUTS[saved], LAYOUTS[loaded], runs(1))


@pytest.mark.parametrize("layout", ["one", "pp2"])
def test_a_run_goes_on_bit_for_bit_under_its_own(
    layout: str, runs: Runs, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--slow") and layout != "pp2":
        pytest.skip("run with --slow")
    assert_goes_on_bit_for_bit(runs, tmp_path / "run", LAYOUTS[layout])
