"""What ranks send each other in one step: the bytes of every collective, measured, next to what they should be.

    python -m benchmarks.traffic                       a table of all layouts, about a minute
    python -m benchmarks.traffic --layouts tp2,zero1   of these

Real trainings of a tiny model on forked ranks; every collective that reaches PyTorch's process groups in the second
step is counted, with the size of its whole tensor (what an all-gather gives, what a reduce-scatter takes). Shown is the
rank that moves most. Ends with status 1 if any collective moves more than its formula says.

Letters of the formulas: b samples of a microbatch, T tokens, D width, L layers, m microbatches, t c p ranks along the
tensor, context and pipeline axes, S = b T D / c x 4 bytes the stream, W the bytes of the weights on a rank.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    "pp2-zero2": (4, [PP, "2", SHARD, "gradients"]),
    "pp2-zero3": (4, [PP, "2", SHARD, "parameters"]),
    "tp2-cp2": (4, [TP, "2", "--sequence-parallel", CP, "2"]),
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


@dataclass(frozen=True)
class Weights:
    """Shapes of the weights that stand on a rank, by name."""

    shapes: dict[str, tuple[int, ...]]

    def size(self, *, names: Sequence[str] | None = None, padded_to: int = 1) -> int:
        """Bytes in fp32, rows filled up to a multiple."""
        total = 0
        for name, shape in self.shapes.items():
            if names is None or name in names:
                rows = -(-shape[0] // padded_to) * padded_to
                total += 4 * rows * (torch.Size(shape).numel() // shape[0])
        return total


def weights_before_sharding(job: Job) -> Weights:
    """What a rank would hold of the weights if replicas shared nothing out."""
    return Weights({name: tuple(p.shape) for part in job.laid.parts.values() for name, p in part.named_parameters()})


def expected(job: Job) -> Moved:
    """What each collective should move in a step, by the formulas."""
    run, layout, weights = job.run, job.layout, weights_before_sharding(job)
    moved: Moved = Counter()
    layers = sum(1 for name in weights.shapes if name.endswith("attention.qkv.weight"))
    width, tokens = run.model.hidden_size or 0, run.data.seq_length or 0
    micro = run.optimizer.micro_batch_size or 0
    microbatches = job.batch_sizes.num_microbatches(0)
    stream = micro * tokens * width // layout.context * 4
    has_first, has_last = 0 in job.laid.parts, layout.is_last_stage
    if layout.tensor > 1:
        # Two products in a block, each with a collective forward and one back; one at each end of the model.
        streams = microbatches * (4 * layers + has_first + has_last) * stream
        if run.parallel.sequence_parallel:
            moved["all-gather", "tensor"] = moved["reduce-scatter", "tensor"] = streams
            copied = [name for name, cut in job.laid.cuts.items() if cut.summed_over_tokens]
            moved["all-reduce", "tensor"] = weights.size(names=copied)
        else:
            moved["all-reduce", "tensor"] = streams
        # Largest logit, sum of powers and the label's logit of every token.
        moved["all-reduce", "tensor"] += has_last * microbatches * micro * tokens // layout.context * 3 * 4
    if layout.context > 1:
        heads = stream // layout.tensor  # all queries of a rank, or keys, or values
        if run.parallel.context_exchange == "gather":
            both = microbatches * layers * 2 * heads * layout.context
            moved["all-gather", "context"] = moved["reduce-scatter", "context"] = both
        else:
            numbers = micro * (run.model.num_attention_heads or 0) // layout.tensor * tokens // layout.context
            moved["all-to-all", "context"] = microbatches * layers * (8 * heads + 4 * numbers)
    if layout.pipeline > 1:
        sent = len(job.laid.parts) * 2 - has_first - has_last
        cut = layout.tensor if run.parallel.sequence_parallel else 1
        moved["send", "pipeline"] = microbatches * sent * stream // cut
        if has_first or has_last:
            table = weights.size(names=["word_embedding.weight"])
            if run.parallel.data_parallel_sharding in ("gradients", "parameters"):
                table //= run.parallel.data_parallel_shard_size or layout.data * layout.context
            moved["all-reduce", "pipeline" if layout.pipeline == 2 else "copies"] = table
    moved.update(expected_over_replicas(job, weights, microbatches))
    return moved


def expected_over_replicas(job: Job, weights: Weights, microbatches: int) -> Moved:
    """What replicas move: sums of gradients, and gathers of weights where those are shared out."""
    parallel, layout = job.run.parallel, job.layout
    replicas = layout.data * layout.context
    sharding = parallel.data_parallel_sharding
    if replicas == 1:
        return {}
    axis = "context" if layout.data == 1 else "data" if layout.context == 1 else "data x context"
    if sharding == "none":
        if parallel.deterministic:
            return {("all-gather", axis): replicas * weights.size()}
        return {("all-reduce", axis): weights.size()}
    if sharding == "optimizer":
        whole = weights.size(padded_to=replicas)
        return {("reduce-scatter", axis): whole, ("all-gather", axis): whole}
    group = parallel.data_parallel_shard_size or replicas
    axis = axis if group == replicas else "shards"
    whole = weights.size(padded_to=group)
    # Stages keep what they gathered, and the sums, until the step's last backward pass.
    passes = microbatches if layout.pipeline == 1 else 1
    gathers = 1
    if sharding == "parameters":
        # What 1F1B gathers for a backward pass serves for the forward pass after it.
        gathers = 2 * microbatches if layout.pipeline == 1 else microbatches + 1
    moved = {("all-gather", axis): gathers * whole, ("reduce-scatter", axis): passes * whole}
    if group < replicas:
        moved["all-reduce", "copies"] = passes * whole // group
    return moved


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
