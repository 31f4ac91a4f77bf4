"""Ranks of multi-process tests: forked from the test's own process, which has imported torch, so they start at once.

    def on_rank(rank: int) -> float: ...
    losses = run_ranks(on_rank, 2)

What runs on the ranks may use everything in scope where it is defined: a fork copies it all.
"""

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ended:
    """How a rank ended."""

    status: int | None  # of the process, negative for a signal; None if it was still running and was killed
    value: Any  # what the function returned
    error: str  # the traceback of what it raised; empty if it raised nothing


def run_ranks(function: Callable[[int], Value], world_size: int, *, timeout: float = 60.0) -> list[Value]:
    """Call function(rank) in that many processes that form a gloo group; give what they return, in order.

    When one raises or dies, all are killed and an AssertionError shows its traceback. timeout: seconds for all.
    """
    ends = watch_ranks(function, world_size, timeout=timeout, kill_at_first_failure=True)
    failures = [f"rank {rank}: {_said(end)}" for rank, end in enumerate(ends) if end.status != 0 or end.error]
    assert not failures, "\n".join(failures)
    return [end.value for end in ends]


def watch_ranks(
    function: Callable[[int], Any], world_size: int, *, timeout: float = 60.0, kill_at_first_failure: bool = False
) -> list[Ended]:
    """As `run_ranks`, but for tests in which ranks are meant to fail: tell how each ended."""
    context = multiprocessing.get_context("fork")
    ends: list[Ended | None] = [None] * world_size
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # From Python 3.12 on a fork warns of threads; those of torch are idle, as there is one per operation.
        warnings.simplefilter("ignore", DeprecationWarning)
        connections: list[Connection[Any, Any]] = []
        processes: list[ForkProcess] = []
        sys.stdout.flush()
        for rank in range(world_size):
            connection, own_end = context.Pipe()
            arguments = (function, rank, world_size, Path(folder) / "store", own_end, timeout)
            process = context.Process(target=_be_rank, args=arguments, daemon=True)
            process.start()
            own_end.close()
            connections.append(connection)
            processes.append(process)
        deadline = time.monotonic() + timeout
        while None in ends and (left := deadline - time.monotonic()) > 0:
            # What a rank has to say may be longer than a pipe holds, so it is read before the rank has ended.
            for ready in wait([connections[rank] for rank in range(world_size) if ends[rank] is None], left):
                rank = next(number for number, connection in enumerate(connections) if connection is ready)
                ends[rank] = _end_of(processes[rank], connections[rank])
            if kill_at_first_failure and any(end is not None and (end.status or end.error) for end in ends):
                break
        for process in processes:
            process.kill()
            process.join()
        for connection in connections:
            connection.close()
    return [end or Ended(None, None, "") for end in ends]


def _said(end: Ended) -> str:
    if end.error:
        return f"raised\n{end.error}"
    return "was killed, for another failed or time was up" if end.status is None else f"died with status {end.status}"


def _end_of(process: ForkProcess, connection: "Connection[Any, Any]") -> Ended:
    try:
        value, error = connection.recv()
    except EOFError:
        process.join()
        return Ended(process.exitcode, None, "")
    return Ended(1 if error else 0, value, error)


def _be_rank(
    function: Callable[[int], Any],
    rank: int,
    world_size: int,
    store: Path,
    connection: "Connection[Any, Any]",
    timeout: float,
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        dist.init_process_group(
            "gloo",
            store=FileStore(str(store), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        connection.send((function(rank), ""))
        # Others may still be in their last collective, which would fail if this process went: the parent ends it.
        time.sleep(timeout)
    except BaseException:  # whatever it is, the parent shows it
        connection.send((None, traceback.format_exc()))
    sys.stdout.flush()
    # Without the clean-up of the test process that this is a copy of.
    os._exit(1)
