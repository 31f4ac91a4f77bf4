"""What is told of a step whose numbers are not finite, and what follows from many such steps."""

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megalith.optim.finite import GRAD_NORM, BadSteps, Measured, joined_up, measure
from megalith.optim.loss_scale import ConstantLossScale, DynamicLossScale

BAD = [math.inf, -math.inf, math.nan]


def alone(found: Tensor) -> Tensor:
    return found


def scale(value: float) -> DynamicLossScale:
    return DynamicLossScale(scale=value, min_scale=1.0, window=1000, hysteresis=2, clean_steps=0, tolerance=2)


def test_finite_numbers_come_back_bit_for_bit() -> None:
    losses = {"lm loss": torch.tensor(10.1), "sop loss": torch.tensor(-0.3)}
    measured = measure(losses, torch.tensor(0.0), torch.tensor(1 / 3, dtype=torch.float64), reduce=alone)
    assert measured.values == {**{name: float(loss) for name, loss in losses.items()}, GRAD_NORM: 1 / 3}
    assert not measured.overflow and measured.not_finite == ()
    assert not measured.is_bad(None)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["lm loss", "sop loss", GRAD_NORM])
def test_what_one_rank_finds_all_are_told(where: str, bad: float) -> None:
    def on_rank(number: int, reduce: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Measured]:
        values = {"lm loss": 1.0, "sop loss": 2.0, GRAD_NORM: 3.0}
        if number == 1:
            values[where] = bad
        handed: list[Tensor] = []

        def note(found: Tensor) -> Tensor:
            handed.append(found)
            return found if reduce is None else reduce(found)

        norm = torch.tensor(values.pop(GRAD_NORM), dtype=torch.float64)
        losses = {name: torch.tensor(value) for name, value in values.items()}
        measured = measure(losses, torch.tensor(0.0), norm, reduce=note)
        return handed[0], measured

    vectors = [on_rank(number)[0] for number in (0, 1)]
    assert all(vector.isfinite().all() for vector in vectors), "a maximum with NaN is anything"
    told = [on_rank(number, lambda found: torch.maximum(vectors[0], vectors[1]))[1] for number in (0, 1)]
    assert told[0] == told[1]
    assert told[0].not_finite == (where,) and where not in told[0].values and len(told[0].values) == 2
    assert told[0].is_bad(None)


@pytest.mark.parametrize(
    ("overflow", "not_finite", "loss_scale", "is_bad"),
    [
        (True, (), None, True),
        (True, (GRAD_NORM,), scale(2.0), False),  # how a loss scale finds its place
        (True, (GRAD_NORM,), scale(1.0), True),  # it cannot fall any more
        (True, (), ConstantLossScale(64.0), True),
        (True, ("lm loss",), scale(2.0**20), True),  # a loss is not scaled
        (False, (GRAD_NORM,), scale(2.0**20), True),
        (False, ("lm loss",), None, True),
        (False, (), scale(2.0), False),
    ],
)
def test_an_overflow_is_bad_unless_the_loss_scale_can_fall(
    overflow: bool, not_finite: tuple[str, ...], loss_scale: DynamicLossScale | ConstantLossScale | None, is_bad: bool
) -> None:
    assert Measured(overflow, not_finite, {}).is_bad(loss_scale) == is_bad


def test_what_is_not_finite_is_said_in_words() -> None:
    assert Measured(True, ("lm loss", "sop loss", GRAD_NORM), {}).told() == "the lm loss and the sop loss"
    assert Measured(True, (GRAD_NORM,), {}).told() == "a gradient"
    assert Measured(False, (GRAD_NORM,), {}).told() == "the gradient norm"


def test_a_good_step_ends_a_row() -> None:
    bad_steps = BadSteps()
    for step, bad in ((1, False), (2, True), (3, True)):
        bad_steps.note(step, bad=bad)
    assert (bad_steps.in_a_row, bad_steps.first) == (2, 2)
    bad_steps.note(4, bad=False)
    assert (bad_steps.in_a_row, bad_steps.first) == (0, None)


def test_stretches_are_joined_where_they_touch() -> None:
    assert joined_up([(5, 6), (1, 2), (3, 3), (8, 9), (9, 12)]) == [(1, 3), (5, 6), (8, 12)]


def test_the_state_comes_back_from_json() -> None:
    bad_steps = BadSteps(2, 7, [(1, 2), (5, 5)], 1)
    assert BadSteps.from_json(json.loads(json.dumps(bad_steps.to_json()))) == bad_steps
    assert BadSteps.from_json({}) == BadSteps()


@pytest.mark.parametrize(
    "state",
    [{"in_a_row": -1}, {"passed_over": [[3, 2]]}, {"passed_over": [[0, 2]]}, {"first": "x"}, {"passed_over": 7}, [1]],
)
def test_another_state_is_refused(state: object) -> None:
    with pytest.raises(ValueError, match="the checkpoint's bad steps are"):
        BadSteps.from_json(state)  # type: ignore[arg-type]


def rewinds_until(breaks_at: int, first_bad: int, last_bad: int, *, every: int, limit: int, steps: int) -> list[int]:
    """The checkpoints that a run goes back to: steps from first_bad to last_bad fail if that of breaks_at was taken."""
    went_back: list[int] = []
    bad_steps, step, taken = BadSteps(), 0, set[int]()
    while step < steps:
        step += 1
        if bad_steps.passes_over(step):
            continue
        bad = first_bad <= step <= last_bad and breaks_at in taken
        bad_steps.note(step, bad=bad)
        if not bad:
            taken.add(step)
        if bad_steps.in_a_row > limit:
            candidates = [saved for saved in range(every, step, every) if saved < bad_steps.turns_back_below()]
            if not candidates or bad_steps.rewinds >= 3:
                return [*went_back, -1]
            bad_steps = bad_steps.rewound(step, candidates[-1])
            step = candidates[-1]
            taken = {number for number in taken if number <= step}
            went_back.append(step)
    return went_back


def test_at_first_only_the_bad_steps_are_passed_over_then_all_that_led_to_them() -> None:
    # The first time back at step 20 the same weights meet the next samples; the second time step 21 is not learnt from.
    assert rewinds_until(21, 23, 30, every=5, limit=1, steps=40) == [20, 20]
    assert rewinds_until(17, 23, 30, every=5, limit=1, steps=40) == [20, 20, 15]
    # Samples that are bad by themselves are passed over at the first try.
    assert rewinds_until(1, 23, 24, every=5, limit=1, steps=40) == [20]


def test_a_run_that_cannot_get_past_a_step_gives_up() -> None:
    assert rewinds_until(1, 23, 10**6, every=5, limit=1, steps=10**4) == [20, 20, 15, -1]
    assert rewinds_until(1, 23, 10**6, every=50, limit=1, steps=10**4) == [-1]  # there is no checkpoint yet


def test_a_stretch_is_passed_over_with_its_ends_and_left_behind_if_it_fails_again() -> None:
    bad_steps = BadSteps(in_a_row=2, first=9, passed_over=[(6, 7)])
    assert [step for step in range(12) if bad_steps.passes_over(step)] == [6, 7]
    assert bad_steps.turns_back_below() == 9
    again = BadSteps(in_a_row=2, first=9, passed_over=[(6, 7)], rewinds=1)
    assert again.turns_back_below() == 5
    assert again.rewound(10, 4) == BadSteps(passed_over=[(5, 10)], rewinds=2)


def test_a_good_step_beyond_all_that_are_passed_over_ends_the_count_of_rewinds() -> None:
    bad_steps = BadSteps(passed_over=[(6, 7)], rewinds=1)
    for step, rewinds in ((5, 1), (8, 0)):
        bad_steps.note(step, bad=False)
        assert bad_steps.rewinds == rewinds
