"""What lies in a GPU's memory when a step holds most, by the place that took it; a table, then one JSON object.

python -m benchmarks.gpu_memory FLAGS   (those of megalith bench)

Weights, moments and whatever else was there before the step are one number. Needs CUDA, whose allocator keeps the
record.
"""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megalith.bench import made_for_measuring, prepared
from megalith.sources import read_command_line
from megalith.train import take_told_step

ROWS = 30


class Peak(NamedTuple):
    """The most bytes that were held beside those held before, and of which places they are, largest first."""

    bytes_held: int
    places: dict[str, int]


def peak_of(events: Iterable[Mapping[str, Any]]) -> Peak:
    """The peak of a record of the allocator: its "alloc" and "free_requested" events, with address, size and frames.

    What is freed without having been taken in the record lay there before and counts as less than nothing.
    """
    living: dict[int, tuple[int, str]] = {}
    held = most = 0
    at_most: dict[int, tuple[int, str]] = {}
    for event in events:
        address, size = event["addr"], event["size"]
        if event["action"] == "alloc":
            living[address] = (size, place_of(event.get("frames", ())))
            held += size
        elif event["action"] == "free_requested":
            living.pop(address, None)
            held -= size
        if held > most:
            most, at_most = held, dict(living)
    places: dict[str, int] = defaultdict(int)
    for size, place in at_most.values():
        places[place] += size
    return Peak(most, dict(sorted(places.items(), key=lambda item: -item[1])))


def place_of(frames: Iterable[Mapping[str, Any]]) -> str:
    """The innermost of Python's frames that is Megalith's own or compiled; else the innermost one."""
    told = [frame for frame in frames if frame["filename"].endswith(".py")]
    own = [frame for frame in told if "/torch/" not in frame["filename"] and "/triton/" not in frame["filename"]]
    for frame in own or told:
        return f"{Path(frame['filename']).name}:{frame['line']} {frame['name']}"
    return "unknown"


def main() -> None:
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu_memory: no CUDA device here.")
    run = made_for_measuring(read_command_line(sys.argv[1:]), steps=5)
    with prepared(run, started=time.monotonic()) as (job, keeper):
        for _ in range(3):
            take_told_step(job, keeper)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=1_000_000)
        take_told_step(job, keeper)
        torch.cuda.synchronize()
        peak = peak_of(torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()])
        most = torch.cuda.max_memory_allocated()
    gib = 2**30
    print(
        f"before a step {before / gib:.3f} GiB, at its peak {most / gib:.3f}, "
        f"by the record {peak.bytes_held / gib:.3f} more"
    )
    for place, size in list(peak.places.items())[:ROWS]:
        print(f"  {size / 2**20:10.1f} MiB  {place}")
    print(json.dumps({"before_bytes": before, "peak_bytes": most, "places": dict(list(peak.places.items())[:ROWS])}))


if __name__ == "__main__":
    main()
