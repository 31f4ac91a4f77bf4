"""Memory of a GPT's training step: predicted from sizes, and counted tensor by tensor in a real step on this machine.

    python -m benchmarks.memory

Sizes are those of the small model of benchmarks/peers.py unless said. Resident memory is the most that a process of
`megalith bench` held over ten steps: the interpreter and PyTorch take some 230 MiB of it before anything is built.
Each number is of a process of its own, so that none sees another's.
"""

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import torch

from megalith import __version__

BASE = """
    --num-layers 6 --hidden-size 384 --num-attention-heads 6 --seq-length 256 --max-position-embeddings 256
    --vocab-size 50304 --micro-batch-size 4 --global-batch-size 8 --hidden-dropout 0 --attention-dropout 0 --device cpu
""".split()
ROWS = {
    "plain": "",
    "with dropout": "--hidden-dropout 0.1 --attention-dropout 0.1",
    "one microbatch": "--global-batch-size 4",
    "recompute selective": "--recompute-granularity selective",
    "recompute full": "--checkpoint-activations",
    "recompute full, 3 layers at a time": "--checkpoint-activations --checkpoint-num-layers 3",
    "Adam's moments in bf16": "--optimizer-state-dtype bf16",
    "Adam's moments in int8": "--optimizer-state-dtype int8",
    "full and int8": "--checkpoint-activations --optimizer-state-dtype int8",
    "sequence 1024, microbatch 1": "--seq-length 1024 --max-position-embeddings 1024 --micro-batch-size 1",
}
MEASURE = """
import json, sys
from tests.plan.test_memory import measured_and_predicted
print(json.dumps(measured_and_predicted(json.loads(sys.argv[1]))))
"""
MIB = 2**20


def said_by(*words: str) -> Any:
    """What a program of this Python prints as JSON in its last line."""
    said = subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True).stdout
    return json.loads(said.splitlines()[-1])


def main() -> None:
    assert __doc__ is not None
    argparse.ArgumentParser(prog="memory.py", description=__doc__.splitlines()[0]).parse_args()
    print(f"megalith {__version__}, torch {torch.__version__}, {os.cpu_count()} cores")
    print(f"{'':<38}{'predicted':>12}{'counted':>12}{'ratio':>8}{'resident':>12}  MiB")
    for name, words in ROWS.items():
        model = [*BASE, *words.split()]
        counted, predicted = said_by("-c", MEASURE, json.dumps(model))
        bench = said_by("-m", "megalith", "bench", *model, *"--warmup 2 --steps 5 --json".split())
        resident = bench["peak_memory_bytes"]
        sizes = f"{predicted / MIB:12,.1f}{counted / MIB:12,.1f}{predicted / counted:8.3f}{resident / MIB:12,.0f}"
        print(f"{name:<38}{sizes}", flush=True)


if __name__ == "__main__":
    main()
