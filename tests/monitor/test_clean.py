"""What people read: short lines, numbers with units, nothing that is only bookkeeping."""

from dataclasses import replace

import pytest

from megalith.monitor import clean, events, reference
from megalith.monitor.clean import clean_lines, duration
from tests.monitor.reports import interval_done


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (12.4, "12 s"),
        (59.6, "1:00"),
        (185, "3:05"),
        (3723, "1:02:03"),
        (90000, "1 d 1:00:00"),
    ],
)
def test_durations_are_read_at_a_glance(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_a_run_says_how_it_is_laid_out_and_what_a_step_is() -> None:
    started = events.RunStarted({}, 1, 1, 1, 1, "float32", 1, 8)
    assert clean_lines(started) == ["run: 1 process, float32, 8 sequences per step in 1 microbatch"]
    laid_out = events.RunStarted({}, 16, 4, 2, 2, "bfloat16", 3, 1536, (16, 8, 1000), ("a remark",))
    assert clean_lines(laid_out) == [
        "a remark",
        "run: 16 processes (data 4 x tensor 2 x pipeline 2), bfloat16, 1,536 sequences per step, from 16 on",
    ]


def test_a_model_says_what_a_rank_holds_if_there_are_several() -> None:
    ranks = (events.RankParameters(0, 0, 1000), events.RankParameters(0, 1, 2000))
    assert clean_lines(events.ModelBuilt("GPT", 3000, ranks[:1])) == ["model: GPT, 3,000 parameters"]
    assert clean_lines(events.ModelBuilt("GPT", 3000, ranks)) == [
        "model: GPT, 3,000 parameters, 1,000 to 2,000 on a rank"
    ]
    equal = (ranks[0], ranks[0])
    assert clean_lines(events.ModelBuilt("GPT", 2000, equal))[0].endswith(", 1,000 on each rank")


def test_the_data_says_documents_samples_and_how_often_they_come_round() -> None:
    split = events.CorpusSplit((events.CorpusPart("train", 0, 8120), events.CorpusPart("test", 8120, 9000)))
    assert clean_lines(split) == ["documents: train 8,120, test 880"]
    loaded = events.MapsLoaded("train", "", "", "", 0.1, num_samples=64004, num_epochs=13508)
    assert clean_lines(loaded) == ["train: 64,004 samples, 13,508 epochs over the data"]


def test_a_speed_that_is_not_known_is_not_shown() -> None:
    (line,) = clean_lines(replace(interval_done(), tflops_per_device=None, mfu=None, grad_norm=None, num_skipped=0))
    assert line == "step 10/100 | lm loss 2.5000 | learning rate 0.01 | 131,072 tokens/s | left 1:30"
    (line,) = clean_lines(replace(interval_done(), tflops_per_device=0.00123, mfu=None))
    assert "0.0012 TFLOP/s" in line and "MFU" not in line


def test_checkpoints_say_where_and_how_long() -> None:
    assert clean_lines(events.CheckpointSaved(1000, "runs/a", 12.0)) == [
        "checkpoint: step 1,000 saved in runs/a (12 s)"
    ]
    assert clean_lines(events.CheckpointLoaded("runs/a", 1000, 0.5)) == [
        "checkpoint: step 1,000 loaded from runs/a (0.5 s)"
    ]
    assert clean_lines(events.CheckpointMissing("runs/a")) == [
        "warning: no checkpoint at runs/a: starting from new weights"
    ]


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("done", "done at step 7 after 1:30"),
        ("exit-interval", "stopped by --exit-interval at step 7 after 1:30"),
        ("exit-duration", "stopped by --exit-duration-in-mins at step 7 after 1:30"),
        ("SIGTERM", "stopped by SIGTERM at step 7 after 1:30"),
    ],
)
def test_the_end_says_why(reason: str, said: str) -> None:
    assert clean_lines(events.RunEnded(7, reason, 1.5, {})) == [said]


def test_every_kind_of_event_is_known_and_none_is_left_out_by_accident() -> None:
    kinds = set(events.Event.__args__)
    assert set(reference.LINES) <= kinds and set(clean.LINES) <= kinds
    assert kinds - set(reference.LINES) == {events.StepDone}
    assert kinds - set(clean.LINES) == {
        events.StepDone,
        events.ScalarsOpened,
        events.RanksStarted,
        events.Initialized,
        events.PlaceReached,
        events.ScheduleBuilt,
        events.TargetsSet,
        events.CorpusOpened,
        events.MapsBuilt,
        events.BlendBuilt,
        events.DatasetsBuilt,
        events.TimersReported,
        events.MemoryReported,
        events.CheckpointStarted,
        events.LoadStarted,
    }


def test_a_perplexity_is_told_of_the_loss_of_tokens_alone() -> None:
    event = events.Evaluated(10, 640, "validation", False, {"lm loss": 3.0, "top1_acc": 14.0}, seconds=1.5)
    assert clean.evaluated(event) == [
        "validation at step 10: lm loss 3.0000, perplexity 20.09; top1_acc 14.0000 (1.5 s)"
    ]


def test_the_evaluation_at_the_end_is_told_from_one_between_steps() -> None:
    events_of_a_step = [
        events.Evaluated(60, 480, "validation", final, {"lm loss": 3.0}, 1.5) for final in (False, True)
    ]
    between, at_the_end = (clean.evaluated(event) for event in events_of_a_step)
    assert between == ["validation at step 60: lm loss 3.0000, perplexity 20.09 (1.5 s)"]
    assert at_the_end == ["validation at the end of training, step 60: lm loss 3.0000, perplexity 20.09 (1.5 s)"]
