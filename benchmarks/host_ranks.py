"""What it costs ranks to speak to each other on the host, as they become many: in one group of gloo's, in our tree.

    python -m benchmarks.host_ranks                  8 to 256 processes, some three minutes on two cores
    python -m benchmarks.host_ranks --ranks 8 64     others

No rank has a model: each is a process of a few megabytes. Start: from when all are there until every rank has made its
groups and said something, the longest of all ranks. The largest of three numbers on all ranks, 64 bytes of each on all,
64 bytes of the first on all: medians of calls in a row, on rank 0. All ranks share this machine's cores, so what they
compute counts as often as there are ranks, which on hosts of their own it does not; sockets are what they are anywhere.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from megalith.host_tree import make_tree
from megalith.ranks import Ranks

LIMIT = timedelta(seconds=300)
CALLS = 11
TEXT = 64  # bytes that a rank has to say
WAYS = {"one group, gloo's calls": False, "tree": True}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256], help="processes")
    options = parser.parse_args()
    if min(options.ranks) < 1:
        parser.error("--ranks: must be at least 1")
    rows = []
    for size in options.ranks:
        for way, is_tree in WAYS.items():
            found = measured(size, is_tree=is_tree)
            rows.append([str(size), way, *found])
    columns = ["ranks", "in", "start, s", "sockets of rank 0, last", "largest, ms", "gather, ms", "from first, ms"]
    for row in [columns, ["---"] * len(columns), *rows]:
        print(f"| {' | '.join(row)} |", flush=True)


def measured(size: int, *, is_tree: bool) -> list[str]:
    """The row of that many processes."""
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(size):
            process = os.fork()
            if process == 0:
                be_rank(rank, size, Path(folder), is_tree=is_tree)
            processes.append(process)
            time.sleep(0.01)  # more at once than the store lets in would try again seconds later
        for process in processes:
            _, status = os.waitpid(process, 0)
            assert status == 0, f"a rank of {size} failed"
        said = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]
    first = said[0]
    calls = [f"{1e3 * first[name]:.1f}" for name in ("largest", "gather", "from_first")]
    return [f"{max(own['start'] for own in said):.2f}", f"{first['sockets']}, {said[-1]['sockets']}", *calls]


def be_rank(rank: int, size: int, folder: Path, *, is_tree: bool) -> None:
    """One process: write what it measured, and end."""
    status = 1
    try:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        port = folder / "port"
        store = meet(rank, size, port)
        came = socket_count()
        began = time.perf_counter()
        calls = join(store, rank, size, is_tree=is_tree)
        calls["largest"]()
        said = {"start": time.perf_counter() - began, "sockets": socket_count() - came, **timed(calls)}
        (folder / f"{rank}.json").write_text(json.dumps(said))
        calls["largest"]()
        time.sleep(1)  # the store goes with rank 0
        status = 0
    finally:
        os._exit(status)


def meet(rank: int, size: int, port: Path) -> Any:
    """A store in which all ranks are."""
    if rank == 0:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=LIMIT)
        port.with_suffix(".new").write_text(str(store.port))
        port.with_suffix(".new").rename(port)
    else:
        while not port.exists():
            time.sleep(0.01)
        number = int(port.read_text())
        store = TCPStore("127.0.0.1", number, is_master=False, wait_for_workers=False, timeout=LIMIT)
    if store.add("came", 1) == size:
        store.set("all", "1")
    store.wait(["all"], LIMIT)
    return store


def join(store: Any, rank: int, size: int, *, is_tree: bool) -> dict[str, Callable[[], Any]]:
    """What is to be timed: gloo's own calls in one group of all, or ours in the tree."""
    # The tree has groups of its own, as where the process group itself is NCCL's.
    backend = "fake" if is_tree else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=LIMIT)
    if is_tree:
        ranks = Ranks(make_tree(timeout=LIMIT))
        return {
            "largest": lambda: ranks.largest([1, 2, 3]),
            "gather": lambda: ranks.gather("x" * TEXT),
            "from_first": lambda: ranks.from_first("x" * TEXT),
        }
    numbers, text = torch.tensor([1, 2, 3]), torch.zeros(TEXT, dtype=torch.uint8)
    of_all = [torch.zeros_like(text) for _ in range(size)]
    return {
        "largest": lambda: dist.all_reduce(numbers, dist.ReduceOp.MAX),
        "gather": lambda: dist.all_gather(of_all, text),
        "from_first": lambda: dist.broadcast(text, 0),
    }


def timed(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The median seconds of each call."""
    found = {}
    for name, call in calls.items():
        seconds = []
        for _ in range(CALLS):
            calls["largest"]()
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
        found[name] = statistics.median(seconds)
    return found


def socket_count() -> int:
    """Sockets that this process has open."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            count += os.readlink(f"/proc/self/fd/{name}").startswith("socket")
    return count


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Registers the backend that stands in for a device's.
    import torch.testing._internal.distributed.fake_pg

    main()
