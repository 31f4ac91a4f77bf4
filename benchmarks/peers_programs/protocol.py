"""How a measured program talks with peers.py: it is told a number of steps on its input, takes them, and answers.

Only the standard library, since every program runs in an environment of its own.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Size:
    """A model and its batch, the same for all programs."""

    num_layers: int
    hidden_size: int
    num_heads: int
    sequence_length: int
    batch_size: int
    vocab_size: int
    seed: int
    mode: str  # what a program offers: eager, compiled
    bf16: bool  # 16-bit products; weights and AdamW stay in fp32


def asked_size() -> Size:
    """What the first word of the command line asks for."""
    return Size(**json.loads(sys.argv[1]))


def peak_bytes() -> int:
    """The high-water mark of resident memory of this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


# Answers have standard output to themselves: whatever a library prints goes to standard error.
_ANSWERS = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)


def answer(**values: object) -> None:
    """One JSON object."""
    _ANSWERS.write(json.dumps(values) + "\n")
    _ANSWERS.flush()


def rounds() -> Iterator[int]:
    """Steps to take, as they are asked for."""
    for line in sys.stdin:
        yield int(line)


def serve(step: Callable[[], float], *, num_parameters: int, threads: int) -> None:
    """Take the first step, then as many as are asked for, until the input ends. A step gives its loss."""
    loss = step()
    answer(loss=loss, num_parameters=num_parameters, threads=threads)
    for count in rounds():
        began, busy = time.perf_counter(), time.process_time()
        for _ in range(count):
            loss = step()
        answer(
            seconds=time.perf_counter() - began,
            cpu_seconds=time.process_time() - busy,
            loss=loss,
            peak=peak_bytes(),
        )
