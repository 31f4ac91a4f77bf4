"""What was trained on several ranks is evaluated and continued by one process, from the same checkpoint."""

import json
from pathlib import Path

import pytest

from megalith.trained import measure, open_trained
from tests.layouts.runs import Runs, events_of

TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"


@pytest.mark.parametrize(
    ("world_size", "words"),
    [(2, [PP, "2"]), (2, ["--data-parallel-sharding", "parameters"]), (4, [TP, "2", PP, "2", "--sequence-parallel"])],
    ids=["pp2", "zero3", "pp2-tp2-sp"],
)
def test_one_process_evaluates_what_many_ranks_trained(
    world_size: int, words: list[str], runs: Runs, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--slow") and world_size > 2:
        pytest.skip("run with --slow")
    steps = ["--train-iters", "5"]
    trained, reference = runs(world_size, *steps, *words), runs(1, *steps)
    assert open_trained(str(trained), step=None, device="cpu").step == 5
    found = measure(str(trained), split="train", files=(), step=None, device="cpu")
    wanted = measure(str(reference), split="train", files=(), step=None, device="cpu")
    assert found["tokens"] == wanted["tokens"] > 100
    # Five steps of fp32 sums in another order.
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


def sample_of(save: Path) -> list[str]:
    """The lines of the sample that a run showed at its end."""
    records = [json.loads(line) for line in (save / "log.jsonl").read_text().splitlines()]
    return [record["text"] for record in records if record["event"] == "line" and record["text"].startswith("  | ")]


@pytest.mark.parametrize(
    ("world_size", "words"),
    [
        (2, [PP, "2"]),
        (2, [PP, "2", "--num-layers-per-virtual-pipeline-stage", "1"]),
        (2, ["--data-parallel-sharding", "parameters"]),
        (2, ["--context-parallel-size", "2"]),
        (4, [TP, "2", PP, "2", "--sequence-parallel"]),
    ],
    ids=["pp2", "pp2-interleaved", "zero3", "cp2", "pp2-tp2-sp"],
)
def test_every_layout_shows_the_sample_that_one_rank_shows(
    world_size: int, words: list[str], runs: Runs, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--slow") and world_size == 2 and words[0] != PP:
        pytest.skip("run with --slow")
    steps = ["--train-iters", "5", "--sample-prompt", "ab"]
    sample = sample_of(runs(world_size, *steps, *words))
    assert sample and sample == sample_of(runs(1, *steps))


def test_a_sample_follows_what_was_learnt_from_sequences_of_an_odd_length(runs: Runs) -> None:
    # The model has a place more, which no sequence reaches.
    steps = ["--seq-length", "15", "--train-iters", "5", "--sample-prompt", "ab"]
    sample = sample_of(runs(2, *steps, PP, "2"))
    assert sample and sample == sample_of(runs(1, *steps))


def test_a_prompt_that_fills_a_sequence_does_not_fail_a_run_that_is_done(runs: Runs) -> None:
    for world_size, words in ((1, []), (2, [PP, "2"])):
        save = runs(world_size, "--train-iters", "5", "--sample-prompt", "a" * 16, *words)
        lines = [event["text"] for event in events_of(save, "line")]
        assert "no sample: --sample-prompt has 16 tokens, which leave none of the 16 of a sequence" in lines
