"""Megalith's command, of which no rank reads while a file is cut short: python -m tests.cut_file FILE RANKS COMMAND ...

Each rank stops before its fifth batch until all have. A file that is cut between a look at its size and the reading of
its pages would be a SIGBUS, which no program can prevent.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH = 5
SECONDS = 90.0


def stop_and_cut(file: Path, rank: int, ranks: int) -> None:
    """From now on the fifth batch is read once all ranks stand before theirs and the file is empty."""
    from megalith.data.causal import CausalDataset

    batch = CausalDataset.batch
    calls: list[Any] = []

    def await_cut(dataset: CausalDataset, *given: Any) -> Any:
        calls.append(given)
        if len(calls) == BATCH:
            file.with_name(f"there-{rank}").touch()
            wait_for(lambda: all(file.with_name(f"there-{other}").exists() for other in range(ranks)))
            if rank == 0:
                os.truncate(file, 0)
            wait_for(lambda: file.stat().st_size == 0)
        return batch(dataset, *given)

    setattr(CausalDataset, "batch", await_cut)  # noqa: B010 - mypy forbids to assign a method


def wait_for(happened: Callable[[], bool]) -> None:
    until = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.01)


if __name__ == "__main__":
    file, ranks, *words = sys.argv[1:]
    if ranks != "1" and "RANK" not in os.environ:
        from megalith.launch import launch

        command = [sys.executable, "-m", "tests.cut_file", *sys.argv[1:]]
        sys.exit(launch(command, int(ranks), stop_grace=60.0, max_restarts=0))
    from megalith.cli import main

    stop_and_cut(Path(file), int(os.environ.get("RANK", "0")), int(ranks))
    sys.exit(main(words))
