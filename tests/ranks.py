"""Real ranks for tests: processes forked from this warm one (importing torch costs seconds), joined over gloo.

The parent must never have started a pool of threads (tests/conftest.py), or a forked child hangs in its first product.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]


def run_ranks(function: Callable[[int, int], Any], world_size: int, *, timeout: float = 60.0) -> list[Any]:
    """What function(rank, world_size) returns on each of world_size processes that share a gloo group.

    The first failure ends all; then, or after timeout seconds, AssertionError with the ranks' tracebacks. What is
    returned travels through a pipe: plain values and tensors on the CPU.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            context.Process(target=_run_rank, args=(function, rank, world_size, Path(folder) / "store", send))
            for rank, (_, send) in enumerate(pipes)
        ]
        for process in ranks:
            process.start()
        for _, send in pipes:
            send.close()
        results: dict[int, Any] = {}
        faults: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) < world_size and not faults:
            for rank, (receive, _) in enumerate(pipes):
                if rank not in results and receive.poll(0.005):
                    _take(receive, rank, results, faults)
            if time.monotonic() > deadline:
                faults[-1] = f"ranks {sorted(set(range(world_size)) - set(results))} gave no result in {timeout} s"
        for process in ranks:
            if faults:
                process.kill()
            process.join()
    assert not faults, "\n".join(f"rank {rank}: {text}" for rank, text in sorted(faults.items()))
    return [results[rank] for rank in range(world_size)]


def _take(receive: Connection, rank: int, results: dict[int, Any], faults: dict[int, str]) -> None:
    try:
        fine, value = pickle.loads(receive.recv_bytes())
    except EOFError:
        faults[rank] = "ended without a word"
        return
    if fine:
        results[rank] = value
    else:
        faults[rank] = value


def _run_rank(function: Callable[[int, int], Any], rank: int, world_size: int, store: Path, send: Connection) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", store=FileStore(str(store), world_size), rank=rank, world_size=world_size)
        # Pickled here: a pipe would send a tensor as a file descriptor, which ends with this process.
        send.send_bytes(pickle.dumps((True, function(rank, world_size))))
        # No rank leaves while another may still talk to it.
        dist.barrier()
    except BaseException:
        send.send_bytes(pickle.dumps((False, traceback.format_exc())))
    os._exit(0)
