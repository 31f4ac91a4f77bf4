"""The conditions of Megatron-LM's lines that its one log does not show."""

import math
import time
from dataclasses import replace

import pytest

from megalith.monitor import events, lines
from megalith.monitor.reference import reference_lines

INTERVAL = events.IntervalDone(
    step=7,
    last_step=100,
    consumed_samples=448,
    num_steps=2,
    num_skipped=1,
    num_nan=0,
    seconds=3.0,
    step_seconds=2.0,
    losses={"lm loss": 2.5, "sop loss": 0.5},
    learning_rate=1.5e-4,
    global_batch_size=64,
    loss_scale=1.0,
    grad_norm=1.25,
    num_zeros=12.0,
    params_norm=100.0,
    num_tokens=2048,
    tokens_per_second=1024.0,
    tflops_per_device=0.5,
    mfu=0.25,
)


def test_the_iteration_line_shows_every_optional_field_in_its_place() -> None:
    assert lines.iteration(INTERVAL) == (
        " iteration        7/     100 | consumed samples:          448 | elapsed time per iteration (ms): 1500.0 |"
        " learning rate: 1.500E-04 | global batch size:    64 | lm loss: 2.500000E+00 | sop loss: 5.000000E-01 |"
        " loss scale: 1.0 | grad norm: 1.250 | num zeros: 12.0 | params norm: 100.000 |"
        " number of skipped iterations:   1 | number of nan iterations:   0 |"
    )


@pytest.mark.parametrize("loss", [0.0, -1.0, math.nan])
def test_a_loss_that_is_not_above_zero_is_left_out(loss: float) -> None:
    line = lines.iteration(replace(INTERVAL, losses={"lm loss": loss, "sop loss": 1.0}))
    assert "lm loss" not in line and "sop loss: 1.000000E+00" in line


def test_a_norm_that_was_not_taken_is_left_out() -> None:
    assert "grad norm" not in lines.iteration(replace(INTERVAL, grad_norm=None))
    assert "num zeros" not in lines.iteration(replace(INTERVAL, num_zeros=None))
    assert "params norm" not in lines.iteration(replace(INTERVAL, params_norm=None))


def evaluated(split: str, *, final: bool, loss: float = 3.0) -> events.Evaluated:
    return events.Evaluated(1000, 64000, split, final, {"lm loss": loss}, seconds=1.0)


def test_the_rows_around_an_evaluation_have_one_hyphen_more_than_it_has_characters() -> None:
    above, text, below = reference_lines(evaluated("validation", final=False), 0.0)
    assert text == (" validation loss at iteration 1000 | lm loss value: 3.000000E+00 | lm loss PPL: 2.008554E+01 | ")
    assert above == below == "-" * (len(text) + 1)


@pytest.mark.parametrize(("split", "short"), [("validation", "val"), ("test", "test")])
def test_evaluations_after_training_say_of_which_data(split: str, short: str) -> None:
    text = reference_lines(evaluated(split, final=True), 0.0)[1]
    assert text.startswith(f" validation loss at the end of training for {short} data | lm loss value: ")


def test_the_perplexity_of_a_large_loss_is_bounded_and_of_nan_is_nan() -> None:
    assert lines.perplexity(25.0) == math.exp(20.0)
    assert math.isnan(lines.perplexity(math.nan))
    assert "PPL: NAN" in reference_lines(evaluated("test", final=True, loss=math.nan), 0.0)[1]


def test_checkpoint_lines() -> None:
    assert reference_lines(events.CheckpointStarted(20, "runs/a"), 0.0) == [
        "saving checkpoint at iteration      20 to runs/a"
    ]
    saved = events.CheckpointSaved(20, "runs/a", 0.01234)
    done = "  successfully saved checkpoint at iteration      20 to runs/a"
    assert reference_lines(saved, 0.0) == [done, "time (ms) | save-checkpoint: 12.34"]
    assert reference_lines(replace(saved, while_training=False), 0.0) == [done]
    assert reference_lines(events.LoadStarted("runs/a", 20), 0.0) == [" loading checkpoint from runs/a at iteration 20"]
    assert reference_lines(events.LoadStarted("runs/a", None), 0.0) == [" loading release checkpoint from runs/a"]
    assert reference_lines(events.CheckpointLoaded("runs/a", 20, 0.5, "3.0"), 0.0) == [
        " checkpoint version 3.0",
        "  successfully loaded checkpoint from runs/a at iteration 20",
        "time (ms) | load-checkpoint: 500.00",
    ]
    assert reference_lines(events.CheckpointMissing("runs/a/latest"), 0.0) == [
        "WARNING: could not find the metadata file runs/a/latest ",
        "    will not load any checkpoints and will start from random",
    ]


@pytest.mark.parametrize(
    ("reason", "place"),
    [
        ("exit-interval", "exiting program at iteration 7"),
        ("exit-duration", "exiting program after 1.5 minutes"),
        ("SIGTERM", "exiting program after receiving SIGTERM"),
    ],
)
def test_exit_lines_carry_the_local_time_and_a_trailing_blank(reason: str, place: str) -> None:
    moment = time.mktime((2021, 8, 17, 2, 57, 34, 0, 0, -1))
    ended = events.RunEnded(7, reason, 1.5, {})
    assert reference_lines(ended, moment) == [f"[{place}] datetime: 2021-08-17 02:57:34 "]


def test_a_run_that_came_to_its_end_says_nothing_more() -> None:
    assert reference_lines(events.RunEnded(7, "done", 1.5, {}), 0.0) == []


def test_a_growing_batch_is_announced_instead_of_the_number_of_microbatches() -> None:
    started = events.RunStarted({}, 8, 8, 1, 1, "bfloat16", 2, 1536, (16, 8, 300000), ("a remark",))
    said = reference_lines(started, 0.0)
    assert said[1:3] == ["a remark", "using torch.bfloat16 for parameters ..."]
    assert said[-1] == (
        "will use batch size rampup starting from global batch size 16 to global batch size 1536 "
        "with batch size increments 8 over 300000 samples."
    )


def test_a_warmed_up_corpus_says_so_in_two_places() -> None:
    said = reference_lines(events.CorpusOpened(3, 0.5, warmed_up=True), 0.0)
    assert said[1] == "    warming up index mmap file..."
    assert said[5] == "    warming up data mmap file..."


def test_timers_are_divided_by_the_steps_of_the_interval() -> None:
    said = reference_lines(events.TimersReported({"optimizer": 0.5, "batch-generator": 0.0}, num_steps=4), 0.0)
    assert said == ["time (ms) | optimizer: 125.00 | batch-generator: 0.00"]


def test_the_test_set_counts_its_batches() -> None:
    assert lines.evaluating(3, 10) == "Evaluating iter 3/10"
