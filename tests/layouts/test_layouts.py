"""Every layout gives the same run: losses, norms and final weights of one rank, step by step."""

from pathlib import Path

import pytest

from tests.layouts.runs import run_on, steps_of, weights_of, write_data

STEPS = ["--train-iters", "20"]
DP, TP, PP, CP = "--", "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"
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
    "dp2-tp2": (4, [TP, "2"]),
    "pp2-dp2": (4, [PP, "2"]),
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
}
QUICK = {"dp2", "tp2-sp", "pp2-interleaved", "cp2", "zero1", "zero3", "pp2-tp2-dp2"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Path]:
    """The run directory of each model trained on one rank."""
    runs = {}
    for name, words in MODELS.items():
        runs[name] = tmp_path_factory.mktemp(name) / "run"
        assert run_on(1, [*STEPS, *words], runs[name], data) == 0
    return runs


def assert_same_run(save: Path, reference: Path) -> None:
    """Losses and norms agree within 1e-5 at every step, weights within what that many steps of such rounding give."""
    steps, wanted = steps_of(save), steps_of(reference)
    assert len(steps) == len(wanted) == 20
    for step, want in zip(steps, wanted, strict=True):
        assert step["losses"]["lm loss"] == pytest.approx(want["losses"]["lm loss"], rel=1e-5)
        assert step["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
        assert step["params_norm"] == pytest.approx(want["params_norm"], rel=1e-5)
    weights, wanted_weights = weights_of(save), weights_of(reference)
    assert weights.keys() == wanted_weights.keys()
    for name, weight in weights.items():
        if name.startswith("weight."):
            assert (weight - wanted_weights[name]).abs().max() < 1e-3, name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_run_is_the_same_on_every_layout(
    model: str, layout: str, data: Path, one_rank: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--slow") and (layout not in QUICK or model == "no-dropout"):
        pytest.skip("run with --slow")
    world_size, words = LAYOUTS[layout]
    assert run_on(world_size, [*STEPS, *MODELS[model], *words], tmp_path / "run", data) == 0
    assert_same_run(tmp_path / "run", one_rank[model])
