"""What ranks send each other in one step: the bytes of every collective, measured, next to what they should be.

    python -m benchmarks.traffic                       a table of all layouts, about a minute
    python -m benchmarks.traffic --layouts tp2,zero1   of these

Real trainings of a tiny model on forked ranks; every collective that reaches PyTorch's process groups in the second
step is counted, with the size of its whole tensor (what an all-gather gives, what a reduce-scatter takes). Shown is the
rank that moves most. Ends with status 1 if any collective moves more than its formula says.

The formulas are those of `megalith plan` (megalith/plan/traffic.py).
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megalith.job import Job, build_job, open_log
from megalith.keeper import Keeper
from megalith.loaders import open_data
from megalith.parallel.mesh import Layout, make_layout
from megalith.plan.traffic import Transfer, transfers
from megalith.planned import planned
from megalith.train import take_step
from tests.layouts.runs import MODEL, configured, write_data
from tests.ranks import run_ranks

# By the name of the operation of torch's process groups: what it is called here. What is received is not counted twice.
COLLECTIVES = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "send": "send",
    "recv_": None,
}
AXES = (("tensor",), ("context",), ("data",), ("pipeline",), ("data", "context"))
# Collectives this small carry a few numbers for all: losses, counts, the norm. They are added up in one row.
NUMBERS, MOST_NUMBERS = 48, 2048  # bytes each, bytes of a step
Moved = dict[tuple[str, str], int]

TP, PP, CP, SHARD = (
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--context-parallel-size",
    "--data-parallel-sharding",
)
LLAMA = """
    --normalization RMSNorm --disable-bias-linear --swiglu --position-embedding-type rope
    --group-query-attention --num-query-groups 2
""".split()
QWEN = [*LLAMA, "--qk-layernorm", "--add-qkv-bias"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "dp2": (2, []),
    "dp2-deterministic": (2, ["--deterministic"]),
    "tp2": (2, [TP, "2"]),
    "tp2-sp": (2, [TP, "2", "--sequence-parallel"]),
    "pp2": (2, [PP, "2"]),
    "pp2-interleaved": (2, [PP, "2", "--num-layers-per-virtual-pipeline-stage", "1"]),
    "pp4": (4, [PP, "4"]),
    "cp2": (2, [CP, "2"]),
    "cp2-all-to-all": (2, [CP, "2", "--context-exchange", "all-to-all"]),
    "zero1": (2, [SHARD, "optimizer"]),
    "zero2": (2, [SHARD, "gradients"]),
    "zero3": (2, [SHARD, "parameters"]),
    "hybrid": (4, [SHARD, "parameters", "--data-parallel-shard-size", "2"]),
    "pp2-zero1": (4, [PP, "2", SHARD, "optimizer"]),
    "pp2-zero2": (4, [PP, "2", SHARD, "gradients"]),
    "pp2-zero3": (4, [PP, "2", SHARD, "parameters"]),
    # Two sequences, so that what is sent of the losses is more than a few numbers.
    "tp2-cp2": (4, [TP, "2", "--sequence-parallel", CP, "2", "--micro-batch-size", "2"]),
    "tp2-full": (2, [TP, "2", "--checkpoint-activations"]),
    "tp2-full-shared": (2, [TP, "2", "--checkpoint-activations", "--distribute-checkpointed-activations"]),
    "tp2-sp-full": (2, [TP, "2", "--sequence-parallel", "--checkpoint-activations", "--hidden-dropout", "0"]),
    "tp2-sp-zero1": (4, [TP, "2", "--sequence-parallel", SHARD, "optimizer"]),
    "tp2-sp-zero3": (4, [TP, "2", "--sequence-parallel", SHARD, "parameters"]),
    "tp2-llama": (2, [TP, "2", *LLAMA]),
    "tp2-sp-llama": (2, [TP, "2", "--sequence-parallel", *LLAMA]),
    "tp2-qwen": (2, [TP, "2", *QWEN]),
    "tp2-sp-qwen": (2, [TP, "2", "--sequence-parallel", *QWEN]),
    "tp2-zero1-qwen": (4, [TP, "2", SHARD, "optimizer", *QWEN]),
    "tp2-zero3-qwen": (4, [TP, "2", SHARD, "parameters", *QWEN]),
    "cp2-llama": (2, [CP, "2", *LLAMA]),
    "cp2-all-to-all-llama": (2, [CP, "2", "--context-exchange", "all-to-all", *LLAMA]),
    "tp2-bf16": (2, [TP, "2", "--bf16"]),
    "zero3-bf16": (2, [SHARD, "parameters", "--bf16"]),
    "cp2-full": (2, [CP, "2", "--checkpoint-activations"]),
    "cp2-all-to-all-full": (2, [CP, "2", "--context-exchange", "all-to-all", "--checkpoint-activations"]),
    "cp2-all-to-all-selective": (
        2,
        [CP, "2", "--context-exchange", "all-to-all", "--recompute-granularity", "selective"],
    ),
    "pp2-tp2-dp2": (8, [PP, "2", TP, "2"]),
}


class Counted(TorchDispatchMode):
    """Adds up the bytes of the collectives that this process calls, by collective and axis of the mesh."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.moved: Moved = Counter()
        self._axis_of = {tuple(layout.ranks_along(*axes)): " x ".join(axes) for axes in reversed(AXES)}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Sequence[Any]) -> None:
        if name not in COLLECTIVES:
            raise ValueError(f"{name} is a collective that this program does not know: add it to COLLECTIVES")
        called = COLLECTIVES[name]
        if called is None:
            return
        size = max(sum(tensor.nbytes for tensor in tensors_in(arg)) for arg in args)
        group = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
        ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
        axis = self._axis_of.get(ranks, "shards" if ranks[1] == ranks[0] + 1 else "copies")
        self.moved[("numbers", "all") if size <= NUMBERS else (called, axis)] += size


def tensors_in(arg: Any) -> list[Tensor]:
    """The tensors of an argument that may be one, or a list of lists."""
    if isinstance(arg, Tensor):
        return [arg]
    return [tensor for part in arg for tensor in tensors_in(part)] if isinstance(arg, list | tuple) else []


def expected(job: Job) -> Moved:
    """What each collective should move in a step, by the formulas of `megalith plan`."""
    run, layout = job.run, job.layout
    numbers = planned(run, layout.world_size, vocab_size=job.vocab_size, device="cpu")
    moved: Moved = Counter()
    for move in transfers(numbers):
        collective = move.collective
        if run.parallel.deterministic and move.purpose == "replicas":
            # Each replica gathers the gradients of all, and adds them up in order.
            collective, move = "all-gather", replace(move, size=move.size * move.ranks)
        moved[collective, _axis(move, layout)] += round(move.total)
    return moved


def _axis(move: Transfer, layout: Layout) -> str:
    """The axis of the mesh along which it moves, as `Counted` names it."""
    if move.purpose == "tables":
        return "pipeline" if layout.pipeline == 2 else "copies"
    if move.purpose == "replicas":
        if move.ranks < layout.data * layout.context:
            return "shards"
        return "context" if layout.data == 1 else "data" if layout.context == 1 else "data x context"
    return move.purpose


def count_on(rank: int, *, world_size: int, words: list[str]) -> tuple[Moved, Moved]:
    """(measured, expected) bytes of the second step on a rank."""
    run = configured(rank, world_size, words)
    layout = make_layout(
        os.environ,
        tensor=run.parallel.tensor_model_parallel_size,
        pipeline=run.parallel.pipeline_model_parallel_size,
        context=run.parallel.context_parallel_size,
    )
    with open_log(run, layout) as log:
        job = build_job(run, layout, torch.device("cpu"), log, started=time.monotonic())
        open_data(job)
        with Keeper(job) as keeper:
            # The first step connects the ranks and prepares what is done in every later one.
            take_step(job, keeper)
            with Counted(layout) as counted:
                take_step(job, keeper)
    sys.stdout.flush()
    return dict(counted.moved), {what: size for what, size in expected(job).items() if size}


def measure(layout: str, data: Path, further: Sequence[str] = ()) -> list[tuple[Moved, Moved]]:
    """(measured, expected) bytes of a step of every rank."""
    world_size, words = LAYOUTS[layout]
    words = [*MODEL, "--data-path", str(data), "--train-iters", "4", *further, *words]
    return run_ranks(partial(count_on, world_size=world_size, words=words), world_size, timeout=120)


def compare(ranks: Sequence[tuple[Moved, Moved]]) -> list[tuple[str, str, int, int, bool]]:
    """(collective, axis, measured, expected, whether it is too much) of the rank that moves most, for each of them."""
    rows = []
    for what in sorted({key for measured, formula in ranks for key in (*measured, *formula)}):
        measured, formula = max((m.get(what, 0), e.get(what, 0)) for m, e in ranks)
        limit = MOST_NUMBERS if what[0] == "numbers" else formula
        too_much = any(m.get(what, 0) > (limit if what[0] == "numbers" else e.get(what, 0)) for m, e in ranks)
        rows.append((*what, measured, limit, too_much))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="of these, with commas between them")
    arguments = parser.parse_args()
    if unknown := set(arguments.layouts.split(",")) - set(LAYOUTS):
        parser.error(f"--layouts: {', '.join(sorted(unknown))} is none of {', '.join(LAYOUTS)}")
    torch.set_num_threads(1)
    print(f"{'layout':<18} {'collective':<15} {'axis':<15} {'bytes a step':>13} {'formula':>13}")
    found = False
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder))
        for layout in arguments.layouts.split(","):
            for collective, axis, measured, formula, too_much in compare(measure(layout, data)):
                found |= too_much
                limit = f"< {formula:,}" if collective == "numbers" else f"{formula:,}"
                flag = "  MORE" if too_much else ""
                print(f"{layout:<18} {collective:<15} {axis:<15} {measured:>13,} {limit:>13}{flag}", flush=True)
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
