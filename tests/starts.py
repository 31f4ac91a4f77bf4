"""The ways in which a program may start a training in a process of its own; what these processes do."""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

OVERDUE = 97  # what a start is said to have ended with that had to be killed


def train_here(words: Sequence[str]) -> None:
    """Train in this process, which is a child made for that, and end with its status."""
    from megalith.cli import main  # a child imports it, not the program that starts it

    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    sys.exit(main(words))


def use_threads() -> None:
    """Let torch's threads run, forward and backward, in products and in sums."""
    import torch

    a = torch.randn(400, 400, requires_grad=True)
    torch.autograd.backward((a @ a).relu().sum())
    torch.randn(1 << 21).exp().sum().item()
    assert torch.get_num_threads() > 1


def statuses_of(start: Callable[[int], BaseProcess], count: int, *, limit: float) -> list[int]:
    """Start that many one after the other; the status of each, OVERDUE for one that took more than limit seconds."""
    statuses = []
    for number in range(count):
        process = start(number)
        process.join(limit)
        if process.exitcode is None:
            process.kill()
            process.join()
            statuses.append(OVERDUE)
        else:
            statuses.append(process.exitcode)
    return statuses


def start_by(method: str, words: Sequence[str], folder: Path, count: int, *, limit: float) -> list[int]:
    """Train that many times by a start method of multiprocessing, into folders run0, run1, ...; the statuses."""
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["torch", "megalith.train"])
    if method == "fork":
        import tests.early  # noqa: F401 - for its effect

        use_threads()

    def start(number: int) -> BaseProcess:
        process: BaseProcess = context.Process(
            target=train_here, args=([*words, "--save", str(folder / f"run{number}")],)
        )
        process.start()
        return process

    return statuses_of(start, count, limit=limit)


if __name__ == "__main__":
    # method, count, limit, folder, words
    method, count, limit, folder, *words = sys.argv[1:]
    print(json.dumps(start_by(method, words, Path(folder), int(count), limit=float(limit))))
