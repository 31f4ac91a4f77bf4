"""`megalith bench` measures the step that pretrain takes, without data."""

import itertools
import json
import math
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tests.early  # noqa: F401 - for its effect
from megalith.bench import made_for_measuring, measure, table, without_effect
from megalith.check import check
from megalith.cli import OUT_OF_MEMORY, main
from megalith.data.mock import MockRows
from megalith.data.tokenizer import load_tokenizer
from megalith.monitor.memory import memory_use
from megalith.passes import run_microbatches
from megalith.planned import vocabulary_of
from megalith.sources import read_command_line
from tests.layouts.runs import configured
from tests.ranks import run_ranks

MODEL = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --micro-batch-size 2 --vocab-size 60
    --make-vocab-size-divisible-by 8 --device cpu
""".split()

TOLD = "--mock-data --lr 1e-3 --train-iters 9".split()
SMALL = [word for word in MODEL if word not in ("--vocab-size", "60")]


def test_one_json_object_is_printed() -> None:
    words = ["bench", *MODEL, "--steps", "5", "--warmup", "1", "--json"]
    done = subprocess.run([sys.executable, "-m", "megalith", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tokens_per_second"] == pytest.approx(2 * 16 / found["step_seconds"])
    low, high = found["step_seconds_quartiles"]
    assert found["step_seconds_lowest"] <= low <= found["step_seconds"] <= high <= found["step_seconds_highest"]
    assert found["timed_steps"] == 5
    # 72 B s l h^2 (1 + s/(6h) + V/(12 l h)) with the vocabulary padded to 64.
    model = 72 * 2 * 16 * 2 * 32**2 * (1 + 16 / (6 * 32) + 64 / (12 * 2 * 32))
    assert found["model_tflops"] * 1e12 * found["step_seconds"] == pytest.approx(model)
    assert found["model_tflops_causal"] < found["model_tflops"]
    assert found["mfu"] == pytest.approx(found["model_tflops"] / found["matmul_tflops"])
    assert found["peak_memory_bytes"] > 50 * 2**20
    assert {"data", "forward", "backward", "optimizer"} <= found["split_seconds"].keys()
    assert min(found["split_seconds"].values()) >= 0.0  # no part is counted twice, and `other` is what they leave
    assert found["first_loss"] == pytest.approx(math.log(60), rel=0.1)


def test_numbers_that_json_lacks_are_texts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *MODEL, *"--fp16 --loss-scale 1e38 --steps 2 --warmup 1 --json".split()]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["first_loss"] == found["last_loss"] == "Infinity"


def test_quartiles_of_two_steps_lie_between_them() -> None:
    figures = measure(made_for_measuring(read_command_line(MODEL), steps=6), warmup=1, steps=2, started=0.0)
    low, high = figures["step_seconds_quartiles"]
    assert figures["step_seconds_lowest"] <= low <= high <= figures["step_seconds_highest"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--micro-batch-siz", "3"], "did you mean --micro-batch-size?"),
        (["--steps", "0"], "--steps = 0"),
        (["--steps", "many"], "invalid int value"),
        (["retriever", *MODEL], "megalith: retriever: bench makes data up for gpt, bert, t5, ict, vit only"),
        ([], "--num-layers: is required"),
    ],
)
def test_a_mistake_is_one_sentence(words: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megalith", "bench", *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and said.lower() in done.stderr.lower() and "Traceback" not in done.stderr


def measure_on(rank: int, *, world_size: int, words: list[str]) -> dict[str, float]:
    """The last loss, and what a step has of tokens and of operations, whatever time it took."""
    run = made_for_measuring(
        configured(rank, world_size, [*words, "--mock-data", "--lr", "1e-3", "--train-iters", "9"]), steps=9
    )
    assert not check(run, world_size)
    found = measure(run, warmup=1, steps=3, started=0.0)
    rates = ("tokens_per_second", "model_tflops", "model_tflops_causal")
    return {"loss": found["last_loss"], **{name: found[name] * found["step_seconds"] for name in rates}}


@pytest.mark.parametrize("layout", [[], ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]])
def test_every_layout_measures_the_same_run(layout: list[str]) -> None:
    words = [*MODEL, "--max-position-embeddings", "16", "--global-batch-size", "4"]
    alone = run_ranks(partial(measure_on, world_size=1, words=words), 1, timeout=100)[0]
    # Tokens are those of all ranks, operations those of one.
    each = {**alone, **{name: alone[name] / 2 for name in ("model_tflops", "model_tflops_causal")}}
    for found in run_ranks(partial(measure_on, world_size=2, words=[*words, *layout]), 2, timeout=100):
        assert found == pytest.approx(each, rel=1e-5)


def test_a_preset_needs_no_files_when_it_is_measured() -> None:
    run = made_for_measuring(read_command_line(["--preset", "quickstart"]), steps=7)
    assert check(run, 1) == []
    assert run.checkpoint.save is None and run.train.train_iters == 7


def test_an_ict_is_measured_without_the_titles_that_its_training_reads() -> None:
    words = ["--max-position-embeddings", "16", "--data-path", "texts", "--titles-data-path", "titles"]
    run = made_for_measuring(read_command_line(["ict", *MODEL, *words]), steps=5)
    assert check(run, 1) == []


def test_what_a_run_file_says_of_its_start_and_end_does_not_keep_it_from_being_measured() -> None:
    words = "--max-position-embeddings 16 --finetune --on-nan rewind --exit-before-training --save run --load other"
    run = made_for_measuring(read_command_line([*MODEL, *words.split()]), steps=5)
    assert check(run, 1) == []
    assert math.isfinite(measure(run, warmup=1, steps=1, started=0.0)["last_loss"])


@pytest.mark.parametrize(("words", "skipped"), [("", 0), ("--loss-scale 1e38", 2)])
def test_steps_that_update_nothing_are_not_measured_or_told(words: str, skipped: int) -> None:
    """A dynamic scale begins so high that a usual model skips its first 17 steps."""
    given = read_command_line([*MODEL, "--fp16", *words.split()])
    figures = measure(made_for_measuring(given, steps=6), warmup=1, steps=2, started=0.0)
    assert figures["skipped_steps"] == skipped
    assert (f"skipped               {skipped} of 2 steps updated nothing" in table(figures)) == (skipped > 0)


def test_steps_skipped_for_a_spike_are_not_called_overflows() -> None:
    given = read_command_line([*MODEL, *"--on-spike skip --spike-threshold 0.5 --spike-window 4".split()])
    figures = measure(made_for_measuring(given, steps=24), warmup=1, steps=20, started=0.0)
    assert figures["skipped_steps"] > 0
    assert "steps updated nothing: an overflow, a number that is not finite, or a spike" in table(figures)


def test_shares_of_the_split_add_up() -> None:
    figures = measure(made_for_measuring(read_command_line(MODEL), steps=6), warmup=1, steps=2, started=0.0)
    shares = [line for line in table(figures | {"step_seconds": 1e-9}).splitlines() if line.endswith("%")]
    assert len(shares) == len(figures["split_seconds"])
    assert sum(float(line.split()[-2]) for line in shares) == pytest.approx(100, abs=0.5)


def test_a_model_that_cannot_fit_is_refused_before_it_is_built(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*MODEL, "--num-layers", "960", "--hidden-size", "12288"]
    assert main(["bench", *words]) == 2
    assert "weights, gradients and the optimizer of a rank take" in capsys.readouterr().err


def test_what_changes_nothing_is_told(tmp_path: Path) -> None:
    given = "--save run --data-path corpus --max-restarts 3 --eval-iters=5 --lr 1e-3 --join-timeout 9".split()
    asked = read_command_line([*SMALL, *given])
    told = without_effect(given, asked, made_for_measuring(asked, steps=6))
    assert told == ["--data-path", "--max-restarts", "--save", "--eval-iters"]
    given = "--check-replicas 1 --tensorboard-dir board --max-bad-steps 2 --slow-rank-ratio 2 --check-compute 2".split()
    asked = read_command_line([*SMALL, *given])
    told = without_effect(given, asked, made_for_measuring(asked, steps=6))
    assert told == ["--max-bad-steps", "--check-replicas", "--tensorboard-dir"]
    # The table of words is that of the run's own tokenizer.
    load_tokenizer("ByteLevelTokenizer").save(tmp_path / "tokenizer")
    given = ["--save", str(tmp_path), "--corpus", "python"]
    asked = read_command_line([*SMALL, *given])
    assert not without_effect(given, asked, made_for_measuring(asked, steps=6))


def test_a_measurement_says_on_the_error_stream_what_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *MODEL, "--steps", "1", "--warmup", "1", "--json", "--save", "run"]) == 0
    said = capsys.readouterr()
    assert said.err == "note: bench makes tokens up, and reads and writes no run: --save changes nothing.\n"
    assert json.loads(said.out)["timed_steps"] == 1


def test_peak_memory_is_that_of_the_rank_that_has_most() -> None:
    def on_rank(rank: int) -> tuple[dict[str, Any], int]:
        run = made_for_measuring(configured(rank, 2, [*MODEL, "--max-position-embeddings", "16", *TOLD]), steps=6)
        held = np.ones((200 << 20) * rank, np.uint8)  # bytes of which rank 0 knows nothing
        figures = measure(run, warmup=1, steps=1, started=0.0)
        assert held.all()
        own = memory_use(torch.device("cpu"))
        assert own is not None
        return figures, own.max_allocated

    (first, own), (second, most) = run_ranks(on_rank, 2, timeout=100)
    assert most > own + (100 << 20)
    assert first["peak_memory_bytes"] == second["peak_memory_bytes"] > own + (100 << 20)
    assert "MiB, the most of 2 ranks" in table(first)


def test_ranks_that_are_measured_wait_for_each_other_as_long_as_they_are_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "megalith", "bench", *MODEL, "--join-timeout", "1"]
    done = subprocess.run(command, env={**os.environ, **place}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "--join-timeout = 1: rank 1 of 2 did not come within that many seconds" in done.stderr


def test_a_measurement_without_memory_speaks_of_no_checkpoint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhaust(*arguments: object, **settings: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr("megalith.train.take_step", exhaust)
    assert main(["bench", *MODEL]) == OUT_OF_MEMORY
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("megalith: out of memory: ")
    assert second == "megalith: a smaller --micro-batch-size needs less"


def test_nothing_is_measured_of_a_rank_that_computes_wrongly(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = itertools.count()

    def disturbed(*arguments: Any, **settings: Any) -> dict[str, torch.Tensor]:
        number = next(passes)  # no two passes of a step agree
        return {name: loss + number for name, loss in run_microbatches(*arguments, **settings).items()}

    monkeypatch.setattr("megalith.recheck.run_microbatches", disturbed)
    assert main(["bench", *MODEL, "--check-compute", "2"]) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("megalith: --check-compute: stopped at step 2 by a rank that computes wrongly")


def test_made_up_tokens_are_the_same_for_the_same_seed_and_evenly_distributed() -> None:
    rows = MockRows(1000, sequence_length=99, vocab_size=50, seed=3)
    tokens = rows.batch(np.arange(1000))
    assert tokens.shape == (1000, 100)
    assert (rows.batch(np.array([7, 2])) == tokens[[7, 2]]).all()
    counts = np.bincount(tokens.ravel(), minlength=50)
    assert len(counts) == 50
    # 100,000 draws over 50 ids: chi-squared with 49 degrees of freedom, of which 90 is the 99.97th percentile.
    assert ((counts - 2000) ** 2 / 2000).sum() < 90
    other = MockRows(1000, sequence_length=99, vocab_size=50, seed=4)
    assert (other.batch(np.arange(10)) != tokens[:10]).mean() > 0.9


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ("--corpus python --corpus-vocab-size 700", 700),
        ("--tokenizer-type ByteLevelTokenizer", 257),
        ("--tokenizer-type ByteLevelTokenizer --vocab-size 300", 300),
        ("", 50257),
    ],
)
def test_what_is_measured_has_the_vocabulary_of_the_run(words: str, size: int) -> None:
    run = read_command_line([*SMALL, *words.split()])
    assert vocabulary_of(run).size == size
    assert made_for_measuring(run, steps=3).data.vocab_size == size


def test_the_vocabulary_of_a_run_directory_is_its_tokenizers(tmp_path: Path) -> None:
    load_tokenizer("ByteLevelTokenizer").save(tmp_path / "run" / "tokenizer")
    found = vocabulary_of(read_command_line([*SMALL, "--save", str(tmp_path / "run")]))
    assert found == (257, str(tmp_path / "run" / "tokenizer"))


def test_bench_says_that_it_traces_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *SMALL, "--profile"]) == 2
    assert "--profile: bench traces nothing" in capsys.readouterr().err
