"""What a GPU computes in a step, kernel by kernel; a table, then one JSON object. Takes the flags of megalith bench.

python -m benchmarks.gpu_profile [--steps N] [--toy] FLAGS
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megalith.bench import made_for_measuring, prepared
from megalith.sources import read_command_line
from megalith.train import take_told_step

ROWS = 40
GAPS = 10
# Kinds of kernels by what their names hold; the first that fits counts.
KINDS = {
    "compiled": ("triton_poi_", "triton_per_", "triton_red_", "triton_for_", "triton_tem_"),
    "own": ("_gelu_backward", "_norm_backward", "_join_heads", "_look_at"),
    # The names of ours were _forward, _backward_keys, _backward_queries and _row_products once.
    "attention": ("attend", "flash", "fmha", "sdpa", "cudnn", "_forward", "_backward", "_row_products"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "addmm"),
    "optimizer": ("adam", "multi_tensor", "lpnorm", "foreach", "_update"),
    "copies": ("memcpy", "memset", "copy"),
}


def kind_of(name: str) -> str:
    """What a kernel is for."""
    lower = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), "other")


def busy_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of these spans (begin, end; seconds) lasted."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def idle_before(kernels: Iterable[tuple[float, float, str]]) -> dict[str, float]:
    """Seconds in which nothing ran, by what came then, most first. kernels: begin, end and name."""
    idle: dict[str, float] = defaultdict(float)
    reached: float | None = None
    for begin, end, name in sorted(kernels):
        if reached is not None and begin > reached:
            idle[name] += begin - reached
        reached = end if reached is None else max(reached, end)
    return dict(sorted(idle.items(), key=lambda item: -item[1]))


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--toy", action="store_true", help="on the CPU: its operations in place of kernels")
    options, rest = parser.parse_known_args()
    run = made_for_measuring(read_command_line(rest), steps=options.steps + 3)
    kind = "CPU" if options.toy else "CUDA"
    activity = ProfilerActivity.CPU if options.toy else ProfilerActivity.CUDA
    with prepared(run, started=time.monotonic()) as (job, keeper):
        for _ in range(3):
            take_told_step(job, keeper)
        _wait(job.device)
        with profile(activities=[activity], acc_events=True) as tracer:
            began = time.perf_counter()
            for _ in range(options.steps):
                take_told_step(job, keeper)
            _wait(job.device)
            wall = (time.perf_counter() - began) / options.steps
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    spans = []
    for event in tracer.events() or ():
        if event.device_type.name == kind:
            seconds[event.name] += event.time_range.elapsed_us() / 1e6 / options.steps
            calls[event.name] += 1
            spans.append((event.time_range.start / 1e6, event.time_range.end / 1e6, event.name))
    busy = busy_seconds((begin, end) for begin, end, _ in spans) / options.steps
    print(f"a step: {wall:.4f} s, of which the device computes {busy:.4f} s")
    by_kind: dict[str, float] = defaultdict(float)
    for name, taken in seconds.items():
        by_kind[kind_of(name)] += taken
    for name, taken in sorted(by_kind.items(), key=lambda item: -item[1]):
        print(f"  {name:<12}{1000 * taken:10.2f} ms")
    costliest = sorted(seconds, key=lambda name: -seconds[name])[:ROWS]
    for name in costliest:
        print(f"  {1000 * seconds[name]:9.2f} ms {calls[name] // options.steps:6} x {name[:140]}")
    idle = {name: taken / options.steps for name, taken in list(idle_before(spans).items())[:GAPS]}
    for name, taken in idle.items():
        print(f"  {1000 * taken:9.2f} ms idle before {name[:140]}")
    kernels: dict[str, Any] = {name: [seconds[name], calls[name] // options.steps] for name in costliest}
    print(
        json.dumps(
            {"step_seconds": wall, "busy_seconds": busy, "kinds": dict(by_kind), "kernels": kernels, "idle": idle}
        )
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
