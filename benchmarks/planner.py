"""How well `megalith plan` foretells: its seconds and bytes beside those that were measured, by others and by us.

    python -m benchmarks.planner             others' step times, and ours on a GPU; a few seconds, no GPU
    python -m benchmarks.planner --here      also steps on this machine's CPU: six minutes
    python -m benchmarks.planner --fit       choose the constants of the A100 anew, by every second row of vTrain's

Published step times are of other programs (Megatron-LM of 2021 and 2022, Megatron-DeepSpeed) on A100s: the model of
products, memory, collectives and pipelines is the one that `megalith plan` uses, and only what those programs do
besides is described here. Where the rows come from: benchmarks/published/README.md.
"""

import argparse
import csv
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megalith.monitor.flops import TERA
from megalith.plan.job import Job
from megalith.plan.machine import A100, H200, MICROSECOND, Machine
from megalith.plan.time import COMPILED, MILLISECOND, Program, predict_time

FOLDER = Path(__file__).parent
VOCABULARY = 51200
# Both write their scores, in 16 bits, and compute whole layers again.
DEEPSPEED = Program(
    stream_passes=11.0,
    inner_passes=10.0,
    backward_passes=2.0,
    score_bytes=(11.0, 20.0),
    logit_bytes=40.0,
    gradient_bytes=6.0,
    travelling_bytes=2.0,
    host_forward=1.17 * MILLISECOND,
    host_backward=2.06 * MILLISECOND,
    gap=79 * MICROSECOND,
    fixed=1.27 * MILLISECOND,
    overlaps=False,
    hides_exchanges=False,
    recomputes_all=True,
)
A100_BENEATH_DEEPSPEED = replace(A100, link_latency=44 * MICROSECOND, network_latency=240 * MICROSECOND)
# Its gradients travel in fp32, and its host is faster; not fitted.
MEGATRON = replace(
    DEEPSPEED,
    travelling_bytes=4.0,
    shares_out_sends=True,
    host_forward=0.5 * MILLISECOND,
    host_backward=0.8 * MILLISECOND,
    gap=3 * MICROSECOND,
)
# Then the update with int8 moments was many passes, gradients were added up in one of their own, and backward passes of
# norms were the compiler's.
AS_MEASURED = replace(COMPILED, compact_bytes=2100.0, adds_in_products=False, backward_passes=1.83)
# What products reach by themselves; in a step, whose minutes the power limit holds down, it is less.
ALONE = 0.81


@dataclass(frozen=True)
class Measured:
    """A job that somebody timed."""

    name: str
    job: Job
    seconds: float  # of a step


def rows_of(name: str) -> Iterator[dict[str, str]]:
    with open(FOLDER / "published" / f"{name}.csv", encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def published_job(
    layers: str, hidden: str, heads: str, sequence: str, micro_batch: str, *, batch: str, **layout: int | str | bool
) -> Job:
    """A GPT in 16 bits with dropout, as all of these were."""
    width, num_heads = int(hidden), int(heads)
    data = int(layout.get("data", 1))
    return Job(
        num_layers=int(layers),
        width=width,
        num_heads=num_heads,
        head_width=width // num_heads,
        inner=4 * width,
        vocab_size=VOCABULARY,
        num_positions=int(sequence),
        sequence_length=int(sequence),
        micro_batch_size=int(micro_batch),
        num_microbatches=max(1, int(batch) // (data * int(micro_batch))),
        compute_bytes=2,
        stream_bytes=2,
        device="cuda",
        **layout,  # type: ignore[arg-type]
    )


def vtrain(name: str, *, recompute: str | None) -> list[Measured]:
    """Megatron-DeepSpeed on A100s (Bang et al. 2024, vTrain): one node, or up to 64."""
    return [
        Measured(
            f"{row['# GPUs']} GPUs, width {row['hidden size']}, {row['# layers']} layers, microbatch "
            f"{row['micro batch']}, tensor {row['tensor parallelism']}, pipeline {row['pipeline parallelism']}",
            published_job(
                row["# layers"],
                row["hidden size"],
                row["attention heads"],
                row["sequence length"],
                row["micro batch"],
                batch=row["global batch"],
                tensor=int(row["tensor parallelism"]),
                data=int(row["data parallelism"]),
                pipeline=int(row["pipeline parallelism"]),
                recompute=recompute or "",
            ),
            float(row["iteration time (ms)"]) * MILLISECOND,
        )
        for row in rows_of(name)
    ]


def deepspeed() -> tuple[list[Measured], list[Measured]]:
    """vTrain's jobs on one node, where nothing is computed again, and on more, where all layers are."""
    return (
        vtrain("vtrain_ground_truth_single", recompute=None),
        vtrain("vtrain_ground_truth_multi", recompute="full"),
    )


def korthikanti() -> list[Measured]:
    """Megatron-LM with full, or with selective recomputation and sequence parallelism (Korthikanti et al. 2022)."""
    found = []
    for row in rows_of("korthikanti2022"):
        for recompute, column in (("full", "iter_s_full_recompute"), ("selective", "iter_s_selective_plus_SP")):
            parts = int(row["interleave"])
            job = published_job(
                row["layers"],
                row["hidden"],
                row["heads"],
                row["seq"],
                row["micro_batch"],
                batch=row["batch"],
                tensor=int(row["TP"]),
                pipeline=int(row["PP"]),
                parts=parts,
                schedule="interleaved" if parts > 1 else "1f1b",
                recompute=recompute,
                sequence_parallel=recompute == "selective",
            )
            found.append(Measured(f"{row['model']}, {recompute} recomputation", job, float(row[column])))
    return found


def errors(rows: Sequence[Measured], machine: Machine, program: Program) -> list[float]:
    """Of each row, predicted over measured, less 1."""
    return [predict_time(row.job, machine, program).total / row.seconds - 1 for row in rows]


def mean_and_worst(found: Sequence[float]) -> tuple[float, float]:
    return sum(map(abs, found)) / len(found), max(map(abs, found))


@dataclass(frozen=True)
class Fit:
    """Constants of a machine and a program that are chosen by measured times."""

    machine: Machine
    program: Program

    def with_constant(self, name: str, factor: float) -> "Fit":
        """A copy with one constant multiplied."""
        part = self.machine if name in MACHINE_CONSTANTS else self.program
        changed = replace(part, **{name: getattr(part, name) * factor})
        return replace(self, machine=changed) if isinstance(changed, Machine) else replace(self, program=changed)


MACHINE_CONSTANTS = ("product_share", "depth", "memory_share", "link_latency", "network_latency")
PROGRAM_CONSTANTS = ("host_forward", "host_backward", "gap", "fixed")


def fitted(start: Fit, tables: Sequence[Sequence[Measured]]) -> Fit:
    """The constants by which the mean error, of the tables together, is least: a search along one after the other."""

    def loss(fit: Fit) -> float:
        if fit.machine.product_share > 1 or fit.machine.memory_share > 1:
            return math.inf
        return sum(mean_and_worst(errors(rows, fit.machine, fit.program))[0] for rows in tables)

    steps = dict.fromkeys((*MACHINE_CONSTANTS, *PROGRAM_CONSTANTS), 0.2)
    best, least = start, loss(start)
    while max(steps.values()) > 0.01:
        for name in steps:
            tried = [best.with_constant(name, math.exp(sign * steps[name])) for sign in (1, -1)]
            losses = [loss(fit) for fit in tried]
            if min(losses) < least - 1e-6:
                best, least = tried[losses.index(min(losses))], min(losses)
            else:
                steps[name] *= 0.6
    return best


def products() -> Iterator[tuple[str, float, float]]:
    """(name, predicted, measured) TFLOP/s of products at GPT-2 XL's shapes on an H200, each by itself."""
    shapes = {
        "qkv": (1600, 4800),
        "out": (1600, 1600),
        "up": (1600, 6400),
        "down": (6400, 1600),
        "logits": (1600, 50304),
    }
    by_itself = replace(H200, product_share=ALONE)
    for name, measured in our_figures("gpu-2026-11-26-h200.json")["products"].items():
        words = name.replace(",", "").split()
        if words[0] not in shapes or "8 bits" in name:
            continue
        (entering, leaving), rows = shapes[words[0]], int(words[-2])
        rows, inner, columns = {
            "forward": (rows, entering, leaving),
            "input": (rows, leaving, entering),
            "weight": (leaving, rows, entering),
        }[words[2] if words[1] == "by" else words[1]]
        seconds = by_itself.product(rows, inner, columns, size=2)
        yield name, 2 * rows * inner * columns / seconds / TERA, measured


def our_figures(name: str) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((FOLDER / "results" / name).read_text(encoding="utf-8"))
    return figures


# Rows of the results by name: what differs from GPT-2 XL in bf16 without dropout, 16 sequences at a time.
DROPOUT: dict[str, Any] = {"dropout": True, "attention_dropout": True}
EIGHT: dict[str, Any] = {"micro_batch_size": 8, "num_microbatches": 8}
FULL: dict[str, Any] = {**DROPOUT, "recompute": "full"}
SMALL_GPT = {
    "num_layers": 12,
    "width": 768,
    "num_heads": 12,
    "inner": 3072,
    "micro_batch_size": 32,
    "num_microbatches": 2,
}
ROWS: dict[str, dict[str, Any]] = {
    "XL bf16, no dropout, microbatch 16": {},
    "XL bf16, no dropout, microbatch 8": EIGHT,
    "XL bf16, dropout, microbatch 16": DROPOUT,
    "XL fp16, dropout, microbatch 16": DROPOUT,
    "XL bf16, dropout, full recomputation": {**FULL, **EIGHT},
    "XL bf16, dropout, full recomput. at 16": FULL,
    "XL fp8, no dropout, microbatch 16": {"fp8": True},
    "XL bf16, int8 moments, full recomput.": {**FULL, **EIGHT, "moments": "int8"},
    "124M bf16, no dropout": SMALL_GPT,
    "350M bf16, no dropout": {"num_layers": 24, "width": 1024, "num_heads": 16, "inner": 4096},
}


def ours() -> list[tuple[Measured, float]]:
    """Jobs of Megalith on an H200, 64 sequences a step, and what was foretold before they ran."""
    xl = Job(
        num_layers=48,
        width=1600,
        num_heads=25,
        head_width=64,
        inner=6400,
        vocab_size=50304,
        num_positions=1024,
        sequence_length=1024,
        micro_batch_size=16,
        num_microbatches=4,
        compute_bytes=2,
        stream_bytes=2,
        bf16=True,
        compiled=True,
        device="cuda",
    )
    return [
        (Measured(f"{name} ({commit})", replace(xl, **ROWS[name]), row["step_seconds"]), row["predicted_step_seconds"])
        for commit in ("bd61cc3", "e1d575d")
        for name, row in our_figures(f"gpu-2026-11-26-h200-{commit}.json")["models"].items()
        if name in ROWS
    ]


def show(name: str, found: Sequence[float], goal: str) -> None:
    mean, worst = mean_and_worst(found)
    print(f"{name:<62} {len(found):>5} {100 * mean:>6.1f} % {100 * worst:>6.1f} %  {goal}")


def print_published(fit: Fit) -> None:
    one, many = deepspeed()
    print(f"{'step times':<62} {'rows':>5} {'mean':>8} {'worst':>8}  goal")
    for name, rows, goal in (("one node", one, "8 %"), ("up to 64 nodes", many, "12 %")):
        show(f"Megatron-DeepSpeed, {name}: rows that chose constants", errors(rows[::2], fit.machine, fit.program), "")
        show(f"Megatron-DeepSpeed, {name}: the other rows", errors(rows[1::2], fit.machine, fit.program), goal)
    show(
        "Megatron-LM 2022 (Korthikanti), nothing fitted",
        errors(korthikanti(), A100, MEGATRON),
        "3.5 %, worst 8 %",
    )
    rates = [predicted / measured - 1 for _, predicted, measured in products()]
    show("products on an H200: rates", rates, "")
    jobs = [measured for measured, _ in ours()]
    before = [foretold / measured.seconds - 1 for measured, foretold in ours()]
    show("Megalith on an H200: foretold before they ran", before, "3 %")
    show("the same, dropout's, 8 bits' and int8's costs chosen by them", errors(jobs, H200, AS_MEASURED), "3 %")
    print()
    for row in korthikanti():
        print_row(row, predict_time(row.job, A100, MEGATRON).total, "")
    for row, foretold in ours():
        print_row(row, predict_time(row.job, H200, AS_MEASURED).total, f"{foretold:8.3f} s foretold")


def print_row(row: Measured, predicted: float, more: str) -> None:
    ratio = predicted / row.seconds
    print(f"  {row.name:<50} {row.seconds:7.3f} s measured {predicted:7.3f} s predicted {ratio:6.3f} {more}".rstrip())


# On this machine: name, flags.
SMALL = "--num-layers 6 --hidden-size 384 --num-attention-heads 6 --seq-length 256 --vocab-size 50304"
MIDDLE = "--num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 512 --vocab-size 50304"
NARROW = "--num-layers 12 --hidden-size 256 --num-attention-heads 4 --seq-length 1024 --vocab-size 8192"
PLAIN = "--hidden-dropout 0 --attention-dropout 0 --device cpu"
# Of the small model, on two ranks.
TWO = f"{SMALL} --global-batch-size 8 --nproc 2"
HERE = (
    ("6 x 384, sequence 256", f"{SMALL} --micro-batch-size 8 --global-batch-size 8"),
    ("6 x 384, two microbatches", f"{SMALL} --micro-batch-size 4 --global-batch-size 8"),
    ("6 x 384, full recomputation", f"{SMALL} --micro-batch-size 8 --global-batch-size 8 --checkpoint-activations"),
    ("12 x 768, sequence 512", f"{MIDDLE} --micro-batch-size 2 --global-batch-size 2"),
    ("12 x 256, sequence 1024", f"{NARROW} --micro-batch-size 4 --global-batch-size 4"),
    ("6 x 384, data 2", f"{TWO} --micro-batch-size 4"),
    ("6 x 384, tensor 2", f"{TWO} --micro-batch-size 8 --tensor-model-parallel-size 2"),
    ("6 x 384, pipeline 2", f"{TWO} --micro-batch-size 2 --pipeline-model-parallel-size 2"),
    ("6 x 384, ZeRO 1 over 2", f"{TWO} --micro-batch-size 4 --data-parallel-sharding optimizer"),
)


def print_here() -> None:
    """Steps on this machine's CPU, predicted and taken."""
    found = []
    print(f"{'on this CPU, fp32':<40} {'predicted':>10} {'measured':>10} {'ratio':>7}")
    for name, words in HERE:
        flags = [*words.split(), *PLAIN.split()]
        foretold = figures_of("plan", "--on", "cpu", *flags)["step_seconds"]
        taken = figures_of("bench", "--steps", "6", "--warmup", "2", *flags)["step_seconds"]
        found.append(foretold / taken - 1)
        print(f"{name:<40} {foretold:>8.3f} s {taken:>8.3f} s {foretold / taken:>7.2f}", flush=True)
    show("all", found, "")


def figures_of(*words: str) -> dict[str, Any]:
    """What a command of megalith prints as JSON."""
    command = [sys.executable, "-m", "megalith", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="choose the constants anew first, and print them")
    parser.add_argument("--here", action="store_true", help="also take steps on this machine's CPU: six minutes")
    arguments = parser.parse_args()
    fit = Fit(A100_BENEATH_DEEPSPEED, DEEPSPEED)
    if arguments.fit:
        fit = fitted(fit, [rows[::2] for rows in deepspeed()])
        for name in (*MACHINE_CONSTANTS, *PROGRAM_CONSTANTS):
            print(f"{name:<20} {getattr(fit.machine if name in MACHINE_CONSTANTS else fit.program, name):.3g}")
    print_published(fit)
    if arguments.here:
        print()
        print_here()
    return 0


if __name__ == "__main__":
    sys.exit(main())
