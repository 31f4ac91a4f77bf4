"""ICT: every layout gives the run of one rank with the same microbatch over all replicas, and goes on under any other.

What is compared in the loss are the samples of a microbatch over all replicas, so a second replica is shown with half
the microbatch on each.
"""

from pathlib import Path

import numpy as np
import pytest

from megalith.data.indexed import IndexedWriter
from tests.layouts.runs import Runs, assert_goes_on_bit_for_bit, assert_same_steps, events_of, steps_of, weights_of

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(58))]
TITLES = "titles_document"

MODEL = """
    ict --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16
    --biencoder-projection-dim 8 --retriever-score-scaling --retriever-report-topk-accuracies 1 3
    --global-batch-size 8 --lr 3e-3 --lr-warmup-iters 2 --weight-decay 0.1 --make-vocab-size-divisible-by 8
    --log-interval 1 --log-params-norm --eval-interval 10 --eval-iters 1 --save-interval 10 --log-format json
    --device cpu --train-iters 20 --split 80,10,10
""".split()
TP, SHARD = "--tensor-model-parallel-size", "--data-parallel-sharding"
SHARED = "--biencoder-shared-query-context-model"


def write_texts(folder: Path) -> Path:
    """Documents of sentences about one thing each, with titles, and the vocabulary beside them."""
    random = np.random.RandomState(5)
    prefix = folder / "texts_sentence"
    with IndexedWriter(prefix, np.uint16) as texts, IndexedWriter(folder / TITLES, np.uint16) as titles:
        for _ in range(60):
            topic = random.randint(5, 60)
            words = np.append(np.full(3, topic), random.randint(5, 63, 3))
            texts.add_document([random.choice(words, random.randint(2, 7)) for _ in range(random.randint(1, 9))])
            titles.add_document([[topic]])
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in VOCABULARY))
    return prefix


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("ict")
    files = ["--titles-data-path", str(folder / TITLES), "--vocab-file", str(folder / "vocab.txt")]
    return Runs(folder, model=[*MODEL, *files], write=write_texts)


# What is added to all passages alike changes no choice among them: the gradients of these biases are rounding alone,
# which Adam makes steps of.
UNDETERMINED = ("context.projection.bias", "context.encoder.final_norm.bias")


def assert_same_run(save: Path, reference: Path) -> None:
    """Steps agree, and so do weights within what as many steps of rounding give."""
    assert_same_steps(save, reference)
    weights, wanted = weights_of(save), weights_of(reference)
    assert weights.keys() == wanted.keys()
    for name in weights:
        if name.startswith("weight.") and not name.endswith(UNDETERMINED):
            assert (weights[name] - wanted[name]).abs().max() < 1e-4, name


def micro(size: int) -> list[str]:
    return ["--micro-batch-size", str(size)]


# Name -> ranks, microbatch of a replica, flags. The microbatch over all replicas is always 4.
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, micro(4)),
    "dp2": (2, micro(2)),
    "dp4": (4, micro(1)),
    "tp2": (2, [*micro(4), TP, "2"]),
    "tp2-sp": (2, [*micro(4), TP, "2", "--sequence-parallel"]),
    "dp2-tp2": (4, [*micro(2), TP, "2"]),
    "zero1": (2, [*micro(2), SHARD, "optimizer"]),
    "zero2": (2, [*micro(2), SHARD, "gradients"]),
    "zero3": (2, [*micro(2), SHARD, "parameters"]),
    "zero3-tp2": (4, [*micro(2), TP, "2", SHARD, "parameters"]),
    "recomputed": (2, [*micro(2), "--recompute-granularity", "full"]),
    "deterministic": (2, [*micro(2), "--deterministic"]),
}
QUICK = {"dp2", "tp2-sp"}
SHARED_TOO = {"dp2", "tp2", "zero3"}


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"one"}))
def test_the_run_is_the_same_on_every_layout(layout: str, runs: Runs, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--slow") and layout not in QUICK:
        pytest.skip("run with --slow")
    world_size, words = LAYOUTS[layout]
    reference = runs(1, *micro(4))
    assert_same_run(runs(world_size, *words), reference)
    assert len(steps_of(reference)) == 20


@pytest.mark.parametrize("layout", sorted(SHARED_TOO))
def test_one_tower_for_both_is_the_same_on_every_layout(
    layout: str, runs: Runs, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--slow") and layout != "zero3":
        pytest.skip("run with --slow")
    world_size, words = LAYOUTS[layout]
    # With one tower and a larger rate the gradients explode, and rounding with them.
    words = [*words, SHARED, "--lr", "3e-4"]
    assert_same_run(runs(world_size, *words), runs(1, *micro(4), SHARED, "--lr", "3e-4"))


def test_another_microbatch_over_all_replicas_has_other_negatives(runs: Runs) -> None:
    """The number of replicas alone does change the loss: with it the passages to choose from."""
    fewer, more = runs(1, *micro(4)), runs(1, *micro(8))
    assert steps_of(more)[0]["losses"]["loss"] > steps_of(fewer)[0]["losses"]["loss"] + 0.3


@pytest.mark.parametrize(("saved", "loaded"), [("dp2", "tp2-sp"), ("zero3", "one"), ("tp2", "dp2")])
def test_a_run_goes_on_under_another_layout(
    saved: str, loaded: str, runs: Runs, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--slow") and saved != "dp2":
        pytest.skip("run with --slow")
    undisturbed = runs(1, *micro(4))
    world_size, words = LAYOUTS[saved]
    save = runs.copied(runs(world_size, *words, "--exit-interval", "10"), tmp_path / "run")
    world_size, words = LAYOUTS[loaded]
    assert runs.go_on(world_size, words, save) == 0
    assert_same_run(save, undisturbed)


def test_a_run_goes_on_bit_for_bit_under_its_own(runs: Runs, tmp_path: Path) -> None:
    assert_goes_on_bit_for_bit(runs, tmp_path / "run", (1, micro(4)))


def test_accuracies_are_logged_in_percent(runs: Runs) -> None:
    save = runs(1, *micro(4))
    for record in [*steps_of(save), *events_of(save, "evaluated")]:
        first, third = record["losses"]["top1_acc"], record["losses"]["top3_acc"]
        # Of eight questions in two microbatches.
        assert first <= third <= 100 and first % 12.5 == third % 12.5 == 0
