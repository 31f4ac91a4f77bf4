"""16-bit runs agree between layouts as well as 16-bit sums can, and an overflow on one rank is one on all."""

import math
from pathlib import Path

import pytest
import torch

from megalith.optim.local import local_part
from megalith.parallel.apply import Laid
from tests.layouts.runs import Runs, assert_same_steps, run_on, steps_of

TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
STEPS = ["--train-iters", "10"]
FP16 = ["--fp16", "--initial-loss-scale", "1024"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "dp2": (2, []),
    "tp2": (2, [TP, "2"]),
    "pp2": (2, [PP, "2"]),
    "zero3": (2, ["--data-parallel-sharding", "parameters"]),
    "pp2-tp2": (4, [PP, "2", TP, "2", "--sequence-parallel"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_16_bit_run_is_nearly_the_same_on_every_layout(
    precision: str, layout: str, runs: Runs, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--slow") and (precision, layout) != ("fp16", "dp2"):
        pytest.skip("run with --slow")
    words = [*STEPS, *(["--bf16"] if precision == "bf16" else FP16)]
    world_size, laid = LAYOUTS[layout]
    # Activations have 8 bits (bf16) or 11 (fp16) and are summed in another order; losses are means over many of them.
    loss, norm = (1e-3, 2e-2) if precision == "bf16" else (1e-4, 5e-3)
    assert_same_steps(runs(world_size, *words, *laid), runs(1, *words), loss=loss, norm=norm)


def spoil_third_step(rank: int) -> None:
    """Let the last rank, or the only one, find an infinite gradient in the third step, after all sums are taken."""
    finish, steps = Laid.finish_gradients, iter(range(1, 100))

    def spoiled(laid: Laid) -> None:
        finish(laid)
        if next(steps) == 3 and rank == torch.distributed.get_world_size() - 1:
            gradient = next(p.parameter.grad for p in laid.trained.held.values() if p.parameter.grad is not None)
            assert gradient is not None
            local_part(gradient).view(-1)[0] = math.inf

    # The process was forked for this one run.
    Laid.finish_gradients = spoiled  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_overflow_on_one_rank_skips_the_step_on_all(
    layout: str, runs: Runs, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--slow") and layout not in {"dp2", "pp2"}:
        pytest.skip("run with --slow")
    world_size, laid = LAYOUTS[layout]
    # Few steps, for in fp16 the rounding of an early Adam grows tenfold in as many; a wrong weight shows in the fourth.
    words = ["--train-iters", "6", *FP16, "--hysteresis", "1"]
    assert run_on(1, words, tmp_path / "one", runs.data, before=spoil_third_step) == 0
    assert run_on(world_size, [*words, *laid], tmp_path / "many", runs.data, before=spoil_third_step) == 0
    one, many = steps_of(tmp_path / "one"), steps_of(tmp_path / "many")
    assert [step["skipped"] for step in many] == [False, False, True] + [False] * 3
    assert [step["loss_scale"] for step in many] == [1024.0] * 2 + [512.0] * 4
    for step, want in zip(many, one, strict=True):
        # A rank that had not skipped would have other weights from here on.
        assert step["losses"]["lm loss"] == pytest.approx(want["losses"]["lm loss"], rel=1e-4)
        assert step["params_norm"] == pytest.approx(want["params_norm"], rel=1e-5)
    assert many[2]["params_norm"] == many[1]["params_norm"]
