"""How the schedule follows from the settings, and what a checkpoint may change."""

import json
import math
from dataclasses import replace

import pytest

from megalith.optim.schedule import (
    FALLS,
    Schedule,
    learning_rate,
    length_flag,
    make_schedule,
    resumed_schedule,
    schedule_to_json,
)
from megalith.optim.settings import WSD_DECAY_STYLES, OptimizerConfig

CONFIG = OptimizerConfig(lr=1.5e-4, min_lr=1e-5, lr_decay_style="cosine", lr_warmup_fraction=0.01)
SCHEDULE = make_schedule(
    replace(CONFIG, lr_decay_iters=320), global_batch_size=64, train_iters=1000, train_samples=None
)


def test_iterations_count_whole_global_batches() -> None:
    assert Schedule(1.5e-4, 1e-5, 204.8, 20480, "cosine") == SCHEDULE
    whole = make_schedule(
        replace(CONFIG, lr_warmup_fraction=None, lr_warmup_iters=5),
        global_batch_size=64,
        train_iters=10,
        train_samples=None,
    )
    assert (whole.warmup, whole.decay) == (320, 640)


def test_samples_are_counted_as_they_are() -> None:
    schedule = make_schedule(
        replace(CONFIG, lr_warmup_fraction=None, lr_warmup_samples=7, lr_decay_samples=100),
        global_batch_size=64,
        train_iters=None,
        train_samples=1000,
    )
    assert (schedule.warmup, schedule.decay) == (7, 100)
    by_fraction = make_schedule(CONFIG, global_batch_size=64, train_iters=None, train_samples=1000)
    assert (by_fraction.warmup, by_fraction.decay) == (10.0, 1000)


@pytest.mark.parametrize("changes", [{"lr": None}, {"lr": 1e-6}, {"lr_warmup_fraction": 1.0}, {"lr": math.inf}])
def test_impossible_settings_are_refused_with_the_flag(changes: dict[str, float | None]) -> None:
    with pytest.raises(ValueError, match="--"):
        make_schedule(replace(CONFIG, **changes), global_batch_size=64, train_iters=10, train_samples=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--train-iters"):
        make_schedule(CONFIG, global_batch_size=64, train_iters=None, train_samples=None)


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_the_rate_rises_to_the_peak_and_falls_to_the_minimum(style: str) -> None:
    schedule = Schedule(1.0, 0.1, 100, 1000, style)
    rates = [learning_rate(n, schedule) for n in range(0, 1200)]
    assert rates[0] == 0 and rates[100] == 1.0 and rates[1000] == pytest.approx(0.1) and set(rates[1001:]) == {0.1}
    assert rates[:101] == sorted(rates[:101])
    assert rates[100:] == sorted(rates[100:], reverse=True)


def test_a_warm_up_may_begin_above_0() -> None:
    schedule = make_schedule(
        replace(CONFIG, lr=1e-3, lr_warmup_fraction=None, lr_warmup_iters=4, lr_warmup_init=2e-4),
        global_batch_size=10,
        train_iters=100,
        train_samples=None,
    )
    rates = [learning_rate(n, schedule) for n in (0, 10, 20, 30, 40)]
    assert rates == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    plain = replace(schedule, init_lr=0.0)
    assert [learning_rate(n, schedule) for n in range(40, 1001)] == [learning_rate(n, plain) for n in range(40, 1001)]
    saved = json.loads(json.dumps(schedule_to_json(schedule)))
    assert resumed_schedule(schedule, saved)[0] == schedule
    assert "init_lr" not in schedule_to_json(plain)  # as checkpoints of earlier versions
    for wanted, kept in ((schedule, plain), (plain, schedule)):
        with pytest.raises(ValueError, match=r"^initial learning rate of the warmup is .*\(--lr-warmup-init\)"):
            resumed_schedule(wanted, schedule_to_json(kept))
        assert resumed_schedule(wanted, schedule_to_json(kept), override_lr_scheduler=True)[0] == wanted
        assert resumed_schedule(wanted, schedule_to_json(kept), use_checkpoint_lr_scheduler=True)[0] == kept
    for wrong in (-1e-4, 2e-3):
        with pytest.raises(ValueError, match="--lr-warmup-init"):
            replace(schedule, init_lr=wrong)
    with pytest.raises(ValueError, match="init_lr=True"):
        resumed_schedule(schedule, {**saved, "init_lr": True})


def test_wsd_rises_stays_and_falls_at_its_end_alone() -> None:
    assert set(FALLS) == set(WSD_DECAY_STYLES)
    halfway = {"exponential": 2 / 2**0.5 - 1, "linear": 0.5, "cosine": 0.5, "minus_sqrt": 1 - 0.5**0.5}
    for style, share in halfway.items():
        schedule = Schedule(1.0, 0.1, 100, 1000, "WSD", 200, style)
        assert learning_rate(500, replace(schedule, max_lr=1e-2, min_lr=1e-3)) == 1e-2  # to the bit
        rates = [learning_rate(n, schedule) for n in range(0, 1200)]
        assert rates[:101] == [n / 100 for n in range(101)]
        assert set(rates[100:801]) == {1.0} and rates[801] < 1.0
        assert rates[900] == pytest.approx(0.1 + 0.9 * share) and rates[1000] == pytest.approx(0.1)
        assert rates[100:] == sorted(rates[100:], reverse=True) and set(rates[1001:]) == {0.1}


def test_the_inverse_root_falls_from_the_peak_to_the_minimum() -> None:
    schedule = Schedule(1.0, 0.1, 4, 1000, "inverse-square-root")
    rates = [learning_rate(n, schedule) for n in (0, 2, 4, 16, 64, 400, 900, 1001)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0.25, 0.1, 0.1, 0.1])
    assert learning_rate(0, replace(schedule, warmup=0)) == 1.0


def test_the_end_of_wsd_is_counted_as_the_training_is() -> None:
    config = replace(CONFIG, lr_decay_style="WSD", lr_wsd_decay_style="linear")
    by_steps = make_schedule(
        replace(config, lr_wsd_decay_iters=2), global_batch_size=64, train_iters=10, train_samples=None
    )
    assert by_steps == Schedule(1.5e-4, 1e-5, 6.4, 640, "WSD", 128, "linear")
    by_samples = make_schedule(
        replace(config, lr_wsd_decay_samples=100), global_batch_size=64, train_iters=None, train_samples=640
    )
    assert by_samples == replace(by_steps, wsd_decay=100)
    for end in (None, 10):
        with pytest.raises(ValueError, match="--lr-wsd-decay-iters"):
            make_schedule(
                replace(config, lr_wsd_decay_iters=end), global_batch_size=64, train_iters=10, train_samples=None
            )


def test_wsd_goes_on_with_its_own_end_and_branches_off_with_another() -> None:
    stable = Schedule(1.5e-4, 1e-5, 0, 640, "WSD", 64, "linear")
    saved = json.loads(json.dumps(schedule_to_json(stable)))
    schedule, lines = resumed_schedule(stable, saved)
    assert schedule == stable
    assert lines[5:] == [
        " > using checkpoint value 64 for iterations of the WSD decay",
        " > using checkpoint value linear for WSD decay style",
    ]
    branch = replace(stable, decay=320, wsd_decay=128)
    with pytest.raises(ValueError, match=r"iterations of the WSD decay is 2 steps .* and 1 steps .* in the checkpoint"):
        resumed_schedule(branch, saved, step_samples=64)
    assert resumed_schedule(branch, saved, override_lr_scheduler=True)[0] == branch
    # From another style only that is told.
    with pytest.raises(ValueError, match=r"^decay style is WSD") as caught:
        resumed_schedule(stable, schedule_to_json(replace(stable, style="constant")))
    assert "of the WSD" not in str(caught.value)
    with pytest.raises(ValueError, match="wsd_decay=None"):
        resumed_schedule(stable, {name: value for name, value in saved.items() if name != "wsd_decay"})


def test_equal_settings_resume_through_json() -> None:
    saved = json.loads(json.dumps(schedule_to_json(SCHEDULE)))
    schedule, lines = resumed_schedule(SCHEDULE, saved)
    assert schedule == SCHEDULE
    assert lines == [
        " > using checkpoint value 0.00015 for learning rate",
        " > using checkpoint value 1e-05 for minimum learning rate",
        " > using checkpoint value 204.8 for warmup iterations",
        " > using checkpoint value 20480 for total number of iterations",
        " > using checkpoint value cosine for decay style",
    ]


def test_different_settings_are_refused_by_name_or_settled_by_a_switch() -> None:
    wanted = replace(SCHEDULE, max_lr=3e-4, style="linear")
    saved = schedule_to_json(SCHEDULE)
    with pytest.raises(ValueError, match=r"learning rate is 0.0003 .*--lr.* 0.00015 in .*decay style is linear"):
        resumed_schedule(wanted, saved)
    assert resumed_schedule(wanted, saved, use_checkpoint_lr_scheduler=True)[0] == SCHEDULE
    schedule, lines = resumed_schedule(wanted, saved, override_lr_scheduler=True)
    assert schedule == wanted
    assert lines[0] == " > overriding learning rate value to 0.0003" and len(lines) == 5
    longer = replace(SCHEDULE, decay=20490)
    with pytest.raises(
        ValueError, match=r"is 20490 samples on .*--lr-decay-iters.* and 320 steps \(20480 samples\) in"
    ):
        resumed_schedule(longer, saved, length_flag="--lr-decay-iters", step_samples=64)
    with pytest.raises(ValueError, match="only one"):
        resumed_schedule(wanted, saved, override_lr_scheduler=True, use_checkpoint_lr_scheduler=True)


@pytest.mark.parametrize(
    ("changes", "train_iters", "flag"),
    [
        ({}, 10, "--train-iters"),
        ({"lr_decay_iters": 5}, 10, "--lr-decay-iters"),
        ({}, None, "--train-samples"),
        ({"lr_decay_samples": 5}, None, "--lr-decay-samples"),
    ],
)
def test_the_flag_that_gives_the_length_is_known(changes: dict[str, int], train_iters: int | None, flag: str) -> None:
    assert length_flag(replace(CONFIG, **changes), train_iters=train_iters) == flag  # type: ignore[arg-type]


def test_a_rate_may_stay_where_it_is() -> None:
    assert learning_rate(50, Schedule(1e-4, 1e-4, 0, 100, "linear")) == 1e-4


@pytest.mark.parametrize(
    "name, value", [("max_lr", "1e-4"), ("decay", 1.5), ("style", 1), ("warmup", None), ("min_lr", True)]
)
def test_a_damaged_saved_setting_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}="):
        resumed_schedule(SCHEDULE, {**schedule_to_json(SCHEDULE), name: value})
    missing = {key: kept for key, kept in schedule_to_json(SCHEDULE).items() if key != name}
    with pytest.raises(ValueError, match=f"{name}=None"):
        resumed_schedule(SCHEDULE, missing)
