"""`megalith plan`: what it prints, what it refuses, and layouts that are told are layouts that run."""

import json
import os
import subprocess
import sys

import pytest

from megalith.asked import asked_of_plan
from megalith.bench import made_for_measuring
from megalith.candidates import candidates, fits, flags_of
from megalith.check import check
from megalith.config import ConfigError
from megalith.forecast import forecast, main
from megalith.plan.machine import GIB, H100, H200, this_cpu
from megalith.sources import read_command_line

XL = """--num-layers 48 --hidden-size 1600 --num-attention-heads 25 --seq-length 1024 --max-position-embeddings 1024
    --bf16 --global-batch-size 64""".split()
WIDE = """--num-layers 32 --hidden-size 8192 --num-attention-heads 64 --seq-length 2048 --max-position-embeddings 2048
    --bf16 --global-batch-size 128""".split()


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(asked_of_plan(words)) == 0
    return capsys.readouterr().out


def test_a_plan_tells_memory_time_and_traffic(capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(capsys, "--ranks", "8", *XL, "--micro-batch-size", "8", "--compile", "on")
    for word in ("peak memory of a rank", "fits into 79 GiB of NVIDIA H100", "time of a step", "tokens/s", "replicas"):
        assert word in shown
    assert "65,536 tokens in 1 microbatch of a rank" in shown
    figures = json.loads(printed(capsys, "--json", "--ranks", "8", *XL, "--micro-batch-size", "8"))
    assert figures["step_seconds"] == pytest.approx(sum(figures["seconds"].values()))
    assert figures["tokens_per_second"] == pytest.approx(65536 / figures["step_seconds"])
    # Each of eight ranks sends 7/8 of fp32 gradients twice.
    assert figures["sent_bytes"] == {"replicas": pytest.approx(2 * 7 / 8 * 4 * figures["parameters"])}


def test_what_a_forecast_does_not_count_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*XL, "--micro-batch-size", "8", "--compile", "on"]
    assert "not counted" not in printed(capsys, *words)
    shown = printed(capsys, *words, "--activation-memory-budget", "0.9")
    assert "not counted               --activation-memory-budget" in shown


@pytest.mark.parametrize(
    "words",
    [
        "--train-iters 6 --rampup-batch-size 3 2 100",
        "--train-samples 1000 --rampup-batch-size 3 2 100",
        "--train-samples 1000 --rampup-batch-size 2 2",
        "--train-samples 1000 --rampup-batch-size 64 8 100",
        "--train-iters 6 --lr-warmup-iters 6",
        "--train-iters 6 --lr-decay-samples 100",
        "--train-iters 6 --train-samples 100",
        "--train-iters 6 --lr 1e-5 --min-lr 1e-3",
        "--train-iters 6 --save run --save-interval 0",
        "--train-iters 6 --keep-every 2",
    ],
)
def test_what_pretrain_refuses_is_refused_alike(words: str) -> None:
    given = [*XL, "--micro-batch-size", "4", "--lr", "1e-4", *words.split()]
    faults = check(read_command_line([*given, "--mock-data"]), 2)
    assert faults
    for search in ([], ["--search"]):
        with pytest.raises(ConfigError) as refused:
            main(asked_of_plan(["--ranks", "2", *given, *search]))
        # A search chooses the microbatch, by which batches are divided.
        assert set(map(str, refused.value.faults)) <= set(map(str, faults))
        assert search or len(refused.value.faults) == len(faults)


@pytest.mark.parametrize("words", ["--rampup-batch-size 8 8 100", "--lr-decay-samples 100", "--lr-warmup-iters 5"])
def test_a_plan_needs_no_length_rate_or_data(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--save", "run", "--load", "nowhere", "--finetune", "--on-nan", "rewind", "--profile"]):
        printed(capsys, "--ranks", "2", *XL, "--micro-batch-size", "4", *words.split(), *more)


def test_a_job_that_does_not_fit_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert "does NOT fit into 79 GiB" in printed(capsys, *WIDE, "--micro-batch-size", "1")


def test_flags_of_a_found_layout_are_accepted_and_give_its_forecast() -> None:
    run = made_for_measuring(read_command_line(WIDE), steps=1)
    found = list(candidates(run, 32, H100))
    assert len(found) > 100
    axes = {axis for candidate in found for axis in ("tensor", "pipeline", "data") if getattr(candidate.job, axis) > 1}
    assert axes == {"tensor", "pipeline", "data"}
    for candidate in found[:: len(found) // 25]:
        given = made_for_measuring(read_command_line([*WIDE, *flags_of(candidate.run)]), steps=1)
        assert check(given, 32) == []
        figures = forecast(given, 32, H100)
        assert figures["step_seconds"] == pytest.approx(candidate.seconds)
        assert figures["peak_bytes"] == pytest.approx(candidate.peak_bytes)
        assert figures["fits"] == fits(candidate.peak_bytes, H100)


def test_a_search_keeps_what_was_given_and_shows_the_fastest_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--json",
        "--search",
        "--ranks",
        "32",
        *WIDE,
        "--tensor-model-parallel-size",
        "4",
        "--micro-batch-size",
        "2",
    )
    answer = json.loads(printed(capsys, *words))
    assert 0 < answer["fit"] < answer["tried"]
    times = [row["step_seconds"] for row in answer["layouts"]]
    assert times == sorted(times)
    for row in answer["layouts"]:
        assert "--tensor-model-parallel-size 4" in row["flags"] and "--micro-batch-size 2" in row["flags"]
        assert row["peak_bytes"] < 79 * GIB


def test_a_search_without_a_batch_or_without_room_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"--global-batch-size.*is missing"):
        main(asked_of_plan(["--search", "--ranks", "8", *XL[:-2]]))
    with pytest.raises(ValueError, match=r"none of .* layouts fits into 79 GiB.*Use more ranks"):
        main(asked_of_plan(["--search", "--ranks", "2", *WIDE]))
    with pytest.raises(ValueError, match="no layout suits"):
        main(asked_of_plan(["--search", "--ranks", "7", *XL]))


def test_a_machine_with_more_memory_fits_more() -> None:
    run = made_for_measuring(read_command_line([*XL, "--micro-batch-size", "16"]), steps=1)
    small, large = forecast(run, 1, H100), forecast(run, 1, H200)
    assert small["peak_bytes"] == large["peak_bytes"]
    assert large["machine_memory_bytes"] > small["machine_memory_bytes"]
    assert large["step_seconds"] < small["step_seconds"]


def test_ranks_on_this_machine_share_what_was_measured_of_it() -> None:
    import torch

    cpu = this_cpu(2, torch.float32)
    assert cpu.device == "cpu"
    assert 1e9 < cpu.flops < 1e13
    assert 1e8 < cpu.bandwidth < 1e12
    assert cpu.memory_bytes * 2 == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_fault_of_the_layout_ends_with_status_2_and_no_traceback() -> None:
    command = [sys.executable, "-m", "megalith", "plan", "--ranks", "8", *XL, "--micro-batch-size", "8"]
    done = subprocess.run([*command, "--tensor-model-parallel-size", "2"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--num-attention-heads = 25" in done.stderr
    assert "Traceback" not in done.stderr
