"""Numbers that go wrong in a run: what is not finite, spikes, bits that flip, a slow rank; on every layout alike."""

import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megalith.checkpoint.directory import list_checkpoints
from megalith.checkpoint.pieces import Piece
from megalith.checkpoint.store import load_latest
from megalith.optim.local import local_part
from megalith.parallel.apply import Laid
from megalith.parallel.seen import SeenLosses
from megalith.parallel.step import Batch, RunPart
from tests.layouts.runs import MODEL, events_of, largest_difference, run_on, steps_of, weights_of

TP, PP, SHARD = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--data-parallel-sharding"
SMALL = [*MODEL, *"--num-layers 2 --hidden-size 16 --num-attention-heads 2 --eval-iters 0".split()]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "dp2": (2, []),
    "tp2": (2, [TP, "2", "--sequence-parallel"]),
    "pp2": (2, [PP, "2"]),
    "cp2": (2, ["--context-parallel-size", "2"]),
    "zero1": (2, [SHARD, "optimizer"]),
    "zero2": (2, [SHARD, "gradients"]),
    "zero3": (2, [SHARD, "parameters"]),
    "dp2-tp2": (4, [TP, "2"]),
    "pp2-dp2": (4, [PP, "2"]),
    "hybrid": (4, [SHARD, "parameters", "--data-parallel-shard-size", "2"]),
}


def spoil_losses(rank: int, *, samples: Iterable[int], factor: float) -> None:
    """Multiply the losses of every microbatch that has one of these samples; on whichever rank computes them."""
    spoiled, make = set(samples), SeenLosses.__init__

    def of_spoiled(seen: SeenLosses, run_part: RunPart) -> None:
        def run(part: nn.Module, entering: Tensor, batch: Batch) -> Tensor:
            leaving = run_part(part, entering, batch)
            return leaving * factor if leaving.dim() == 1 and spoiled & set(batch["samples"].tolist()) else leaving

        make(seen, run)

    SeenLosses.__init__ = of_spoiled  # type: ignore[method-assign, assignment]


def not_a_number(*samples: int) -> Callable[[int], None]:
    return partial(spoil_losses, samples=samples, factor=math.nan)


def at_step(step: int, ranks: Iterable[int], change: Callable[[Laid], None]) -> Callable[[int], None]:
    """Let some ranks change something at a step, once the gradients of the whole step are summed."""

    def before(rank: int) -> None:
        finish, steps = Laid.finish_gradients, iter(range(1, 1000))

        def disturbed(laid: Laid) -> None:
            finish(laid)
            if next(steps) == step and rank in ranks:
                change(laid)

        Laid.finish_gradients = disturbed  # type: ignore[method-assign, assignment]

    return before


def make_gradient_infinite(laid: Laid) -> None:
    gradient = next(p.parameter.grad for p in laid.trained.held.values() if p.parameter.grad is not None)
    assert gradient is not None
    local_part(gradient).view(-1)[0] = -math.inf


def flip_a_bit(laid: Laid, *, name: str = "layers.1.feedforward.up.weight") -> None:
    """A low bit of one weight: no loss tells of it, and the rounding of the next update does not heal it."""
    parameter = next(dict(part.named_parameters())[name] for part in laid.parts.values())
    local_part(parameter.data).view(-1)[3:4].view(torch.int32).bitwise_xor_(1 << 8)


def tensors_at(save: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a step's checkpoint."""
    tensors: dict[str, Tensor] = {}

    def everything(index: Any) -> dict[str, Piece]:
        tensors.update({name: torch.empty(stored.shape) for name, stored in index.tensors.items()})
        return {name: Piece(tensor, tuple(tensor.shape), (0,) * tensor.dim()) for name, tensor in tensors.items()}

    assert load_latest(save, everything, step=step) is not None
    return tensors


def saved_steps(save: Path) -> list[int]:
    return [found.step for found in list_checkpoints(save)]


def skip_unless(quick: bool, request: pytest.FixtureRequest) -> None:
    if not quick and not request.config.getoption("--slow"):
        pytest.skip("run with --slow")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loss_that_is_not_finite_skips_the_step_on_all_ranks(
    layout: str, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    skip_unless(layout in {"dp2", "pp2"}, request)
    world_size, laid = LAYOUTS[layout]
    # Sample 19 is of the third step, 16 to 23; it is saved because the run stops there.
    words = ["--train-iters", "6", "--save-interval", "2", "--exit-interval", "3", *laid]
    assert run_on(world_size, words, tmp_path / "run", data, model=SMALL, before=not_a_number(19)) == 0
    (left_out,) = events_of(tmp_path / "run", "step_left_out")
    assert (left_out["step"], left_out["samples"], left_out["in_a_row"]) == (3, [19], 1)
    assert left_out["found"] == "the lm loss is not finite" and "samples 19;" in left_out["text"]
    steps = steps_of(tmp_path / "run")
    assert [step["skipped"] for step in steps] == [False, False, True]
    assert steps[2]["losses"] == {"lm loss": "NaN"} and steps[2]["grad_norm"] is None
    assert steps[2]["learning_rate"] == steps[1]["learning_rate"]
    before, after = tensors_at(tmp_path / "run", 2), tensors_at(tmp_path / "run", 3)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(
    layout: str, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    skip_unless(layout == "zero1", request)
    world_size, laid = LAYOUTS[layout]
    words = ["--train-iters", "4", "--save-interval", "2", "--exit-interval", "3", *laid]
    before = at_step(3, [world_size - 1], make_gradient_infinite)
    assert run_on(world_size, words, tmp_path / "run", data, model=SMALL, before=before) == 0
    (left_out,) = events_of(tmp_path / "run", "step_left_out")
    # Which microbatch it came from cannot be told from the sum.
    assert (left_out["found"], left_out["samples"]) == ("a gradient is not finite", list(range(16, 24)))
    assert "samples 16-23;" in left_out["text"]
    first, second = tensors_at(tmp_path / "run", 2), tensors_at(tmp_path / "run", 3)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_overflows_on_the_way_of_the_loss_scale_are_no_bad_steps(data: Path, tmp_path: Path) -> None:
    words = ["--train-iters", "12", "--fp16", "--initial-loss-scale", str(2.0**21), "--max-bad-steps", "0"]
    words += ["--hysteresis", "1", "--log-interval", "12"]
    # A loss that is not a number is one, whatever the loss scale; with 0 of them allowed the run stops.
    assert run_on(1, words, tmp_path / "run", data, model=SMALL, before=not_a_number(88)) == 80
    steps = steps_of(tmp_path / "run")
    skipped = sum(step["skipped"] for step in steps)
    assert len(steps) == 12 and 3 <= skipped < 12
    assert [event["step"] for event in events_of(tmp_path / "run", "step_left_out")] == [12]
    (interval,) = events_of(tmp_path / "run", "interval_done")
    assert (interval["num_skipped"], interval["num_nan"]) == (skipped, 1)


def test_more_bad_steps_in_a_row_than_allowed_stop_the_run(data: Path, tmp_path: Path) -> None:
    bad = not_a_number(5, *range(24, 100))
    words = ["--train-iters", "20", "--save-interval", "3", "--max-bad-steps", "2"]
    assert run_on(1, words, tmp_path / "run", data, model=SMALL, before=bad) == 80
    assert [event["in_a_row"] for event in events_of(tmp_path / "run", "step_left_out")] == [1, 1, 2, 3]
    (ended,) = events_of(tmp_path / "run", "run_ended")
    assert (ended["reason"], ended["step"]) == ("too many bad steps", 6)
    assert saved_steps(tmp_path / "run") == [3, 6]
    first, second = tensors_at(tmp_path / "run", 3), tensors_at(tmp_path / "run", 6)
    assert all(torch.equal(first[name], second[name]) for name in first)
    # The same command goes on: the row is not over.
    assert run_on(1, words, tmp_path / "run", data, model=SMALL, before=bad) == 80
    assert steps_of(tmp_path / "run")[-1]["step"] == 7
    assert run_on(1, words, tmp_path / "run", data, model=SMALL) == 0


def test_weights_that_are_not_finite_are_never_saved(data: Path, tmp_path: Path) -> None:
    def spoil_a_weight(laid: Laid) -> None:
        local_part(next(iter(laid.trained.held.values())).parameter.data).view(-1)[0] = math.nan

    words = ["--train-iters", "20", "--save-interval", "2", "--keep-last", "1", "--max-bad-steps", "3"]
    before = at_step(5, [0], spoil_a_weight)
    assert run_on(1, words, tmp_path / "run", data, model=SMALL, before=before) == 80
    assert saved_steps(tmp_path / "run") == [4]
    assert run_on(1, words, tmp_path / "run", data, model=SMALL) == 0
    assert saved_steps(tmp_path / "run") == [20]


def test_stop_stops_at_the_first_bad_step(data: Path, tmp_path: Path) -> None:
    words = ["--train-iters", "20", "--save-interval", "3", "--on-nan", "stop"]
    assert run_on(1, words, tmp_path / "run", data, model=SMALL, before=not_a_number(24)) == 80
    assert steps_of(tmp_path / "run")[-1]["step"] == 4


@pytest.mark.parametrize("layout", ["one", "dp2", "pp2", "zero1", "zero3"])
def test_a_rewind_passes_over_the_bad_steps_and_ends_where_skipping_ends(
    layout: str, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    skip_unless(layout in {"one", "zero1"}, request)
    world_size, laid = LAYOUTS[layout]
    # Bad are steps 6 and 7, samples 40 to 55.
    run = partial(run_on, world_size, data=data, model=SMALL, before=not_a_number(*range(40, 56)))
    words = ["--train-iters", "10", "--save-interval", "4", *laid]
    assert run(words, save=tmp_path / "skipped") == 0
    words += ["--on-nan", "rewind", "--max-bad-steps", "1"]
    assert run([*words, "--exit-interval", "8"], save=tmp_path / "run") == 0
    (rewound,) = events_of(tmp_path / "run", "rewound")
    assert [rewound[name] for name in ("step", "left", "first", "last")] == [4, 7, 6, 7]
    assert [step["step"] for step in steps_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8]
    again = steps_of(tmp_path / "run")[7:]
    assert [step["skipped"] for step in again] == [False, True, True, False]
    assert again[1]["losses"] == {} and again[1]["num_tokens"] == 0
    assert again[0]["losses"] == steps_of(tmp_path / "run")[4]["losses"]
    # The restart knows of it, and the end is that of a run that left the same samples out.
    assert run(words, save=tmp_path / "run") == 0
    assert largest_difference(tmp_path / "run", tmp_path / "skipped") == 0.0
    (first, *_, last) = events_of(tmp_path / "run", "run_ended")
    # The ledger that is kept is that of another rank than the one that speaks.
    assert first["spent"]["redone"] > 0 and last["spent"]["redone"] > 0.5 * first["spent"]["redone"]


def test_a_resume_before_the_steps_that_are_passed_over_passes_over_them(data: Path, tmp_path: Path) -> None:
    words = ["--train-iters", "9", "--save-interval", "1", "--on-nan", "rewind", "--max-bad-steps", "1"]
    # It goes back to step 5 and is stopped within what it passes over, the second time it comes by.
    bad = not_a_number(*range(40, 56))
    assert run_on(1, [*words, "--save-interval", "2"], tmp_path / "whole", data, model=SMALL, before=bad) == 0
    for step in (8,):
        path = next(found.path for found in list_checkpoints(tmp_path / "whole") if found.step == step)
        assert '"passed_over":[[6,7]]' in (path / "index.json").read_text()
    # Steps 6 to 9 again, without anything bad in them: the checkpoint of step 6 remembers.
    save = tmp_path / "whole"
    for found in list_checkpoints(save):
        if found.step > 6:
            found.path.rename(tmp_path / found.path.name)
    before = weights_of(tmp_path / "whole")
    assert saved_steps(save)[-1] == 6 and before
    assert run_on(1, words, save, data, model=SMALL) == 0
    again = [step for step in steps_of(save) if step["step"] == 7][-1]
    assert again["skipped"] and again["losses"] == {}


def test_a_rewind_cannot_go_on_for_ever(data: Path, tmp_path: Path) -> None:
    words = ["--train-iters", "40", "--save-interval", "3", "--on-nan", "rewind", "--max-bad-steps", "1"]
    bad = not_a_number(*range(64, 400))
    assert run_on(1, words, tmp_path / "run", data, model=SMALL, before=bad) == 80
    rewound = [(event["step"], event["first"], event["left"]) for event in events_of(tmp_path / "run", "rewound")]
    # First the bad steps alone, then all since the checkpoint, then all since an earlier one.
    assert rewound == [(6, 9, 10), (6, 7, 12), (3, 4, 14)]
    assert "went back 3 times and came no further than step 16" in events_of(tmp_path / "run", "warned")[-1]["text"]
    # What lay ahead of where it went back to is gone, and what is left can be read.
    assert saved_steps(tmp_path / "run")[0] == 3
    assert all(tensor.isfinite().all() for tensor in weights_of(tmp_path / "run").values())


SPIKES = ["--spike-threshold", "50", "--spike-window", "6", "--max-bad-steps", "1"]


@pytest.mark.parametrize("layout", ["one", "dp2", "pp2"])
def test_a_spike_is_told_with_score_and_samples_and_skipped(
    layout: str, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    skip_unless(layout == "dp2", request)
    world_size, laid = LAYOUTS[layout]
    spike = partial(spoil_losses, samples=range(64, 72), factor=1000.0)  # step 9
    run = partial(run_on, world_size, data=data, model=SMALL, before=spike)
    words = ["--train-iters", "10", "--save-interval", "5", "--on-spike", "skip", *SPIKES, *laid]
    assert run(words, save=tmp_path / "run") == 0
    found = events_of(tmp_path / "run", "spike_found")
    assert {(event["step"], event["name"]) for event in found} == {(9, "lm loss"), (9, "grad norm")}
    assert all(event["samples"] == list(range(64, 72)) and event["score"] > 50 for event in found)
    assert [step["step"] for step in steps_of(tmp_path / "run") if step["skipped"]] == [9]
    # A run that is stopped before, and goes on, finds the same scores bit for bit.
    assert run([*words, "--exit-interval", "7"], save=tmp_path / "again") == 0
    assert run(words, save=tmp_path / "again") == 0
    again = events_of(tmp_path / "again", "spike_found")
    assert [event["score"] for event in again] == [event["score"] for event in found]
    assert largest_difference(tmp_path / "run", tmp_path / "again") == 0.0


@pytest.mark.parametrize(("policy", "status", "skipped", "last"), [("warn", 0, [], 10), ("stop", 80, [9], 9)])
def test_a_spike_warns_or_stops_as_told(
    policy: str, status: int, skipped: list[int], last: int, data: Path, tmp_path: Path
) -> None:
    spike = partial(spoil_losses, samples=range(64, 72), factor=1000.0)
    words = ["--train-iters", "10", "--on-spike", policy, *SPIKES]
    assert run_on(1, words, tmp_path / "run", data, model=SMALL, before=spike) == status
    assert events_of(tmp_path / "run", "spike_found")[0]["step"] == 9
    steps = steps_of(tmp_path / "run")
    assert [step["step"] for step in steps if step["skipped"]] == skipped and steps[-1]["step"] == last
    assert saved_steps(tmp_path / "run") == [last]


@pytest.mark.parametrize("layout", [*LAYOUTS, "int8", "pp2-tied"])
def test_replicas_stay_bit_for_bit_alike(
    layout: str, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    skip_unless(layout == "zero1", request)
    more = {"int8": (2, ["--optimizer-state-dtype", "int8"]), "pp2-tied": (2, [PP, "2", "--clip-grad", "0.1"])}
    world_size, laid = {**LAYOUTS, **more}[layout]
    words = ["--train-iters", "6", "--check-replicas", "3", *laid]
    assert run_on(world_size, words, tmp_path / "run", data, model=SMALL) == 0
    compared = events_of(tmp_path / "run", "replicas_compared")
    assert [(event["step"], event["differing"], event["text"]) for event in compared] == [(3, [], ""), (6, [], "")]


FLIPPED: dict[str, tuple[int, list[str], list[int], list[int]]] = {
    # ranks, words, those that flip a bit, those that are named
    "dp3": (3, ["--global-batch-size", "9"], [1], [1]),
    "dp2": (2, [], [1], [0, 1]),
    "pp2-dp3": (6, ["--global-batch-size", "9", PP, "2"], [4], [4]),
    "hybrid": (4, [SHARD, "parameters", "--data-parallel-shard-size", "2"], [3], [1, 3]),
}


@pytest.mark.parametrize("layout", FLIPPED)
def test_a_flipped_bit_is_found_and_its_rank_named(
    layout: str, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    skip_unless(layout in {"dp2", "dp3"}, request)
    world_size, laid, guilty, named = FLIPPED[layout]
    words = ["--train-iters", "9", "--save-interval", "2", "--check-replicas", "4", *laid]
    before = at_step(3, guilty, flip_a_bit)
    assert run_on(world_size, words, tmp_path / "run", data, model=SMALL, before=before) == 81
    (compared,) = events_of(tmp_path / "run", "replicas_compared")
    assert (compared["step"], compared["differing"]) == (4, named)
    assert "weight.layers.1.feedforward.up.weight" in compared["text"]
    # What the ranks held when they were found to differ is not saved.
    assert saved_steps(tmp_path / "run") == [2]


@pytest.mark.parametrize(("world_size", "named"), [(2, [0, 1]), (4, [3])])
def test_a_flipped_bit_of_the_tied_table_is_found_between_the_ends_of_a_pipeline(
    world_size: int, named: list[int], data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The last rank's copy is held beside those of the first stage; with a replica three of four are the most."""
    skip_unless(world_size == 2, request)
    before = at_step(3, [world_size - 1], partial(flip_a_bit, name="word_embedding.weight"))
    words = ["--train-iters", "4", "--check-replicas", "4", PP, "2"]
    assert run_on(world_size, words, tmp_path / "run", data, model=SMALL, before=before) == 81
    (compared,) = events_of(tmp_path / "run", "replicas_compared")
    assert compared["differing"] == named
    assert "weight.word_embedding.weight" in compared["text"]


def test_copies_over_tensor_ranks_are_compared_and_a_warning_goes_on(data: Path, tmp_path: Path) -> None:
    flip = partial(flip_a_bit, name="layers.0.attention_norm.weight")
    words = ["--train-iters", "4", "--check-replicas", "4", "--on-replica-fault", "warn", TP, "2"]
    assert run_on(2, words, tmp_path / "run", data, model=SMALL, before=at_step(3, [1], flip)) == 0
    (compared,) = events_of(tmp_path / "run", "replicas_compared")
    assert compared["differing"] == [0, 1] and "weight.layers.0.attention_norm.weight" in compared["text"]
    assert saved_steps(tmp_path / "run") == [4]


def test_what_the_optimizer_keeps_is_compared_too(data: Path, tmp_path: Path) -> None:
    def change(laid: Laid) -> None:
        gradient = next(p.parameter.grad for p in laid.trained.held.values() if p.parameter.grad is not None)
        assert gradient is not None
        local_part(gradient).view(-1)[0] += 1.0

    words = ["--train-iters", "3", "--check-replicas", "3", "--on-replica-fault", "warn"]
    assert run_on(2, words, tmp_path / "run", data, model=SMALL, before=at_step(3, [1], change)) == 0
    (compared,) = events_of(tmp_path / "run", "replicas_compared")
    assert compared["differing"] == [0, 1] and "exp_avg_sq." in compared["text"]


def test_a_slow_rank_is_named_with_its_ratio(data: Path, tmp_path: Path) -> None:
    def before(rank: int) -> None:
        run = SeenLosses.__call__

        def slowly(seen: SeenLosses, part: nn.Module, entering: Tensor, batch: Batch) -> Tensor:
            time.sleep(0.05 * (rank == 1))
            return run(seen, part, entering, batch)

        SeenLosses.__call__ = slowly  # type: ignore[method-assign, assignment]

    words = ["--train-iters", "10", "--log-interval", "5"]
    assert run_on(2, words, tmp_path / "run", data, model=SMALL, before=before) == 0
    slow = events_of(tmp_path / "run", "rank_is_slow")
    assert [(event["step"], event["rank"]) for event in slow] == [(10, 1)]
    assert slow[0]["ratio"] > 1.5


@pytest.mark.parametrize("layout", ["one", "pp2", "zero3"])
def test_evaluation_changes_no_bit_of_the_training(
    layout: str, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    skip_unless(layout == "one", request)
    world_size, laid = LAYOUTS[layout]
    for name, iterations in (("with", "3"), ("without", "0")):
        words = ["--train-iters", "8", "--eval-interval", "2", "--eval-iters", iterations, *laid]
        assert run_on(world_size, words, tmp_path / name, data, model=SMALL) == 0
    assert len(events_of(tmp_path / "with", "evaluated")) >= 4
    assert not events_of(tmp_path / "without", "evaluated")
    assert largest_difference(tmp_path / "with", tmp_path / "without") == 0.0
    with_, without = (steps_of(tmp_path / name) for name in ("with", "without"))
    assert [step["losses"] for step in with_] == [step["losses"] for step in without]


@pytest.mark.parametrize("kept_in", ["bf16", "int8"])
def test_moments_in_few_bits_survive_a_restart(
    kept_in: str, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    skip_unless(kept_in == "bf16", request)
    words = ["--train-iters", "6", "--optimizer-state-dtype", kept_in]
    assert run_on(1, words, tmp_path / "whole", data, model=SMALL) == 0
    assert run_on(1, [*words, "--exit-interval", "3"], tmp_path / "run", data, model=SMALL) == 0
    assert run_on(1, words, tmp_path / "run", data, model=SMALL) == 0
    assert largest_difference(tmp_path / "run", tmp_path / "whole") == 0.0
