"""Learning rates equal Megatron-LM's, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest

from megalith.optim.schedule import Schedule, learning_rate


def schedule_of(case: dict[str, Any]) -> Schedule:
    return Schedule(case["max_lr"], case["min_lr"], case["warmup_steps"], case["decay_steps"], case["decay_style"])


def test_rates_are_those_of_the_reference(golden: Path) -> None:
    cases = json.loads((golden / "lr_schedules.json").read_text())["cases"]
    assert len(cases) == 6
    for case in cases:
        schedule = schedule_of(case)
        assert len(case["values"]) >= 20
        for _, num_samples, rate in case["values"]:
            assert learning_rate(num_samples, schedule) == rate, (case["name"], num_samples)


def test_what_the_reference_refuses_is_refused(golden: Path) -> None:
    errors = json.loads((golden / "lr_schedules.json").read_text())["errors"]
    assert len(errors) == 5
    for settings, _ in errors:
        with pytest.raises(ValueError, match=r"must be"):
            schedule_of(settings)
