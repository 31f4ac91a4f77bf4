"""The dynamic loss scale follows Megatron-LM's trajectories."""

import json
from pathlib import Path

from megalith.optim.loss_scale import make_loss_scale
from megalith.optim.settings import OptimizerConfig


def test_trajectories_are_those_of_the_reference(golden: Path) -> None:
    cases = json.loads((golden / "loss_scale.json").read_text())["cases"]
    assert len(cases) == 24
    for case in cases:
        state = make_loss_scale(
            OptimizerConfig(
                fp16=True,
                hysteresis=case["hysteresis"],
                loss_scale_window=case["growth_interval"],
                initial_loss_scale=case["initial"],
                min_loss_scale=case["min_scale"],
            )
        )
        assert state is not None
        walked = []
        for found_inf in case["found_inf"]:
            state = state.updated(bool(found_inf))
            saved = state.to_json()
            walked.append([state.scale, saved["clean_steps"], saved["tolerance"]])
        assert walked == case["after_each"], case["pattern"]
