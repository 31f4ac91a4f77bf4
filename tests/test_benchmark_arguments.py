"""What a user got wrong in the words of a benchmark is a sentence, said before anything is made or measured."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("benchmarks/peers.py --rounds 0", "--rounds, --starts and --steps: must be at least 1"),
        ("benchmarks/peers.py --starts 0", "--rounds, --starts and --steps: must be at least 1"),
        ("benchmarks/checkpoint.py --saves 0", "--saves, --interval: at least 1"),
        ("benchmarks/checkpoint.py --width 33", "--width: must be at least 64"),
        ("benchmarks/checkpoint.py --device nope", "--device: invalid choice: 'nope'"),
        ("benchmarks/checkpoint.py --folder /nonexistent", "--folder = /nonexistent: is no directory"),
        ("benchmarks/data.py --directory /nonexistent", "--directory = /nonexistent: is no directory"),
        ("benchmarks/tokenization.py --rounds 0", "--rounds = 0: must be at least 1"),
        ("benchmarks/peers.py --json /nonexistent/x", "--json = /nonexistent/x: there is no directory /nonexistent"),
        ("-m benchmarks.scale --json /nonexistent/x", "--json = /nonexistent/x: there is no directory /nonexistent"),
        ("-m benchmarks.scale --steps 0", "--steps = 0: must be at least 1"),
        ("-m benchmarks.busy_machine --rounds 0", "--rounds: must be at least 1"),
        ("-m benchmarks.host_ranks --ranks 0", "--ranks: must be at least 1"),
        ("-m benchmarks.traffic --layouts cube", "--layouts: cube is none of"),
        ("-m benchmarks.memory --rows 3", "unrecognized arguments: --rows 3"),
    ],
)
def test_a_mistake_is_one_sentence(words: str, said: str) -> None:
    done = subprocess.run([sys.executable, *words.split()], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_one_sentence() -> None:
    words = [sys.executable, "benchmarks/checkpoint.py", "--device", "cuda"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--device cuda: torch finds no GPU here" in done.stderr
    assert "Traceback" not in done.stderr
