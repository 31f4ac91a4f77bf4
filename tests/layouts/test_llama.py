"""A GPT with Llama's or Qwen's options: recomputed it is the same run, and it goes on under another layout and bit for
bit.
"""

from pathlib import Path

import pytest

from tests.layouts.runs import Runs, assert_goes_on, assert_goes_on_bit_for_bit, assert_same_run
from tests.layouts.test_layouts import LAYOUTS, MODELS, STEPS, TP

KINDS = ("llama", "qwen")
SAME: dict[str, tuple[int, list[str]]] = {
    "recomputed": (1, ["--checkpoint-activations"]),
    "recomputed-selective": (1, ["--recompute-granularity", "selective"]),
    "tp2-recomputed": (2, [TP, "2", "--checkpoint-activations", "--distribute-checkpointed-activations"]),
}
RESUMED = [("tp2-sp", "zero3"), ("pp2", "cp2"), ("zero1", "pp2-tp2")]
QUICK: tuple[object, ...] = (("llama", *RESUMED[0]), ("qwen", *RESUMED[2]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("words", SAME)
def test_the_run_is_the_same_computed_otherwise(words: str, kind: str, runs: Runs) -> None:
    world_size, further = SAME[words]
    plain = [*STEPS, *MODELS[kind]]
    assert_same_run(runs(world_size, *plain, *further), runs(1, *plain))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler has warnings of its own
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["one", "tp2", "tp2-sp"])
def test_compiled_blocks_give_the_same_run(layout: str, kind: str, runs: Runs) -> None:
    world_size, words = {"one": (1, list[str]()), **LAYOUTS}[layout]
    words = [*MODELS[kind], "--train-iters", "5", "--hidden-dropout", "0", "--attention-dropout", "0", *words]
    assert_same_run(runs(world_size, *words, "--compile", "on"), runs(world_size, *words))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("saved", "loaded"), RESUMED)
def test_it_goes_on_under_another_layout(
    saved: str, loaded: str, kind: str, runs: Runs, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--slow") and (kind, saved, loaded) not in QUICK:
        pytest.skip("run with --slow")
    plain = [*STEPS, *MODELS[kind]]
    layouts = [(ranks, [*plain, *words]) for ranks, words in (LAYOUTS[saved], LAYOUTS[loaded])]
    assert_goes_on(runs, tmp_path / "run", layouts[0], layouts[1], runs(1, *plain))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["zero3", "pp2"])
def test_it_goes_on_bit_for_bit_under_its_own(layout: str, kind: str, runs: Runs, tmp_path: Path) -> None:
    world_size, words = LAYOUTS[layout]
    assert_goes_on_bit_for_bit(runs, tmp_path / "run", (world_size, [*STEPS, *MODELS[kind], *words]))
