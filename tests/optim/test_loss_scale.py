"""Loss scales: which run has one, and that a resume goes on as if nothing had happened."""

import json
import random
from typing import Any

import pytest

from megalith.optim.loss_scale import ConstantLossScale, DynamicLossScale, make_loss_scale
from megalith.optim.settings import OptimizerConfig

FIRST = DynamicLossScale(scale=65536.0, min_scale=1.0, window=5, hysteresis=2, clean_steps=0, tolerance=2)


def test_only_16_bit_training_has_a_scale() -> None:
    assert make_loss_scale(OptimizerConfig(loss_scale=8.0)) is None
    assert make_loss_scale(OptimizerConfig(bf16=True)) is None
    assert make_loss_scale(OptimizerConfig(bf16=True, loss_scale=8.0)) == ConstantLossScale(8.0)
    assert make_loss_scale(OptimizerConfig(fp16=True, loss_scale=8.0)) == ConstantLossScale(8.0)
    dynamic = make_loss_scale(OptimizerConfig(fp16=True))
    assert isinstance(dynamic, DynamicLossScale) and dynamic.scale == 2**32


def test_a_constant_scale_stays() -> None:
    scale = ConstantLossScale(8.0)
    assert scale.updated(True).updated(False).resumed(json.loads(json.dumps(scale.to_json()))) == scale


def test_the_runs_first_17_overflows_leave_65536() -> None:
    state = make_loss_scale(OptimizerConfig(fp16=True))
    assert state is not None
    scales = []
    for _ in range(17):
        state = state.updated(True)
        scales.append(state.scale)
    assert scales == [2.0 ** (32 - n) for n in range(17)]


def test_a_resume_at_any_step_continues_the_trajectory() -> None:
    draws = random.Random(4)
    pattern = [draws.random() < 0.2 for _ in range(60)]
    states = [FIRST]
    for found_inf in pattern:
        states.append(states[-1].updated(found_inf))
    for step, state in enumerate(states):
        resumed = FIRST.resumed(json.loads(json.dumps(state.to_json())))
        for found_inf, expected in zip(pattern[step:], states[step + 1 :], strict=True):
            resumed = resumed.updated(found_inf)
            assert resumed == expected
    assert len({state.scale for state in states}) > 2 and len({state.tolerance for state in states}) > 2


@pytest.mark.parametrize(
    "saved",
    [
        {},
        {"scale": 0, "clean_steps": 0, "tolerance": 0},
        {"scale": float("nan"), "clean_steps": 0, "tolerance": 0},
        {"scale": float("inf"), "clean_steps": 0, "tolerance": 0},
        {"scale": True, "clean_steps": 0, "tolerance": 0},
        {"scale": 1.0, "clean_steps": -1, "tolerance": 0},
        {"scale": 1.0, "clean_steps": 0, "tolerance": "2"},
    ],
)
def test_a_damaged_state_is_refused(saved: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        FIRST.resumed(saved)
