"""What one GPU reaches, see gpu.sh. Every measurement is a process with a time limit; what had no time left is told.

The rows of the reference job are `megalith bench` on GPT-2 XL with 64 sequences of 1024 tokens a step; goals are those
of docs/performance.md for one H100 SXM.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
GIB = 2**30
XL = "--num-layers 48 --hidden-size 1600 --num-attention-heads 25 --seq-length 1024 --max-position-embeddings 1024"
SMALL = "--num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024 --max-position-embeddings 1024"
MEDIUM = "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 --max-position-embeddings 1024"
TOY = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32"
FULL = "--checkpoint-activations"
STILL = "--hidden-dropout 0 --attention-dropout 0"


@dataclass(frozen=True)
class Row:
    """A model that is measured by megalith bench, and what is hoped for."""

    name: str
    model: str
    words: str
    batch: str
    seconds: float | None = None  # goal for a step
    gib: float | None = None  # goal for the peak


ROWS = (
    Row("XL bf16, no dropout, microbatch 16", XL, f"--bf16 {STILL}", "16 64", seconds=1.30),
    Row("XL bf16, dropout, microbatch 16", XL, "--bf16", "16 64", seconds=1.50),
    Row("XL bf16, no dropout, microbatch 8", XL, f"--bf16 {STILL}", "8 64", gib=46),
    Row("XL bf16, dropout, full recomput. at 16", XL, f"--bf16 {FULL}", "16 64", seconds=1.75),
    Row("XL bf16, dropout, full recomput. at 8", XL, f"--bf16 {FULL}", "8 64", gib=26),
    Row("XL fp16, dropout, microbatch 16", XL, "--fp16 --initial-loss-scale 65536", "16 64", seconds=1.50),
    Row("XL fp8, no dropout, microbatch 16", XL, f"--bf16 --fp8-format e4m3 {STILL}", "16 64", seconds=1.12),
    Row("XL bf16, int8 moments, full recomput.", XL, f"--bf16 {FULL} --optimizer-state-dtype int8", "8 64", gib=17),
    Row("124M bf16, no dropout", SMALL, f"--bf16 {STILL}", "32 64"),
    Row("350M bf16, no dropout", MEDIUM, f"--bf16 {STILL}", "16 64"),
)  # fmt: skip


# Of which rows a profile is made, and by which program.
PROFILES = ((0, "gpu_profile"), (2, "gpu_memory"), (6, "gpu_profile"), (1, "gpu_profile"))


@dataclass
class Report:
    """What has been measured."""

    rehearse: bool
    deadline: float
    num_rows: int  # of the models
    figures: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def say(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)

    def run(self, name: str, command: Sequence[str], *, seconds: float, needs: float = 0.0) -> str | None:
        """The output of a process; None, and a fault, if it fails or no time is left for it."""
        if self.left < max(needs, 5.0):
            self.faults.append(f"{name}: no time was left")
            return None
        try:
            ended = subprocess.run(
                command, capture_output=True, text=True, cwd=ROOT, timeout=min(seconds, self.left), check=False
            )
        except subprocess.TimeoutExpired:
            self.faults.append(f"{name}: took more than its {min(seconds, self.left):.0f} s")
            return None
        if ended.returncode:
            self.faults.append(f"{name}: status {ended.returncode}: {(ended.stderr or ended.stdout).strip()[-600:]}")
            return None
        return ended.stdout


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at toy sizes")
    parser.add_argument("--only", nargs="*", choices=[section.__name__ for section in SECTIONS])
    parser.add_argument("--rows", type=int, default=len(ROWS), metavar="N", help="models: the first N rows alone [all]")
    parser.add_argument("--minutes", type=float, default=8.7, help="for everything [8.7]")
    options = parser.parse_args()
    report = Report(options.rehearse, time.monotonic() + 60 * options.minutes, options.rows)
    for section in SECTIONS:
        if section.__name__ in (options.only or WHOLE):
            began = time.monotonic()
            section(report)
            report.say(f"  ({section.__name__}: {time.monotonic() - began:.0f} s)")
    for fault in report.faults:
        report.say(f"FAULT {fault}")
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    stem = time.strftime("gpu-%Y-%m-%d") + ("-rehearsal" if options.rehearse else "")
    (folder / f"{stem}.json").write_text(json.dumps({**report.figures, "faults": report.faults}, indent=1) + "\n")
    (folder / f"{stem}.txt").write_text("\n".join(report.lines) + "\n")
    print("\n".join(["", *table(report)]), flush=True)
    return 1 if report.faults else 0


def conditions(report: Report) -> None:
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu and not report.rehearse:
        sys.exit("gpu.sh: no CUDA device here. --rehearse runs everything on the CPU at toy sizes.")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    report.figures["conditions"] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if on_gpu and not report.rehearse else platform.processor() or "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        # COMMIT first: a copy of the source may lie in a checkout of something older.
        "commit": os.environ.get("COMMIT") or commit.stdout.strip() or "unknown",
    }
    for name, value in report.figures["conditions"].items():
        report.say(f"{name}: {value}")


def products(report: Report) -> None:
    """Rates of matrix products and attention, in a process of its own."""
    said = report.run(
        "products", [sys.executable, "-m", "benchmarks.gpu_products", *_toy(report)], seconds=120, needs=20
    )
    if said is not None:
        report.figures["products"] = json.loads(said.splitlines()[-1])
        for line in said.splitlines()[:-1]:
            report.say(line)


def tests(report: Report) -> None:
    """The tests that need a GPU, and those of the kernels."""
    names = ("accumulate", "attend_fused", "random", "float8", "sixteen", "norm_fused")
    files = [f"tests/layers/test_{name}.py" for name in names]
    chosen = (
        files if report.rehearse else ["-m", "gpu or not gpu", *files, "tests/layers/test_attend.py", "tests/optim"]
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "not learns and not compile",
        *chosen,
    ]
    said = report.run("tests", command, seconds=150, needs=30)
    if said is not None:
        report.figures["tests"] = said.strip().splitlines()[-1]
        report.say(f"tests: {report.figures['tests']}")


def models(report: Report) -> None:
    """The reference job and smaller ones: predicted and measured."""
    report.figures["models"] = {}
    for row in ROWS[: report.num_rows]:
        words = _flags_of(row, report)
        steps = ["--steps", "3" if report.rehearse else "6", "--warmup", "1" if report.rehearse else "2", "--json"]
        command = [sys.executable, "-m", "megalith", "bench", *steps, *words]
        with ThreadPoolExecutor() as beside:  # the plan needs no GPU
            plan = beside.submit(_planned, report, words)
            said = report.run(row.name, command, seconds=120, needs=35)
            planned = plan.result()
        if said is None:
            continue
        measured = json.loads(said.splitlines()[-1])
        report.figures["models"][row.name] = {**measured, **planned}
        report.say(_model_line(row, measured, planned))


def _flags_of(row: Row, report: Report) -> list[str]:
    """What the row is to megalith bench."""
    micro, whole = ("2", "4") if report.rehearse else row.batch.split()
    model = TOY if report.rehearse else row.model
    words = f"{model} {row.words} --micro-batch-size {micro} --global-batch-size {whole} --vocab-size 50257".split()
    if report.rehearse:
        words += ["--device", "cpu", "--vocab-size", "300"]
    else:
        words += ["--compile", "on"]
    return words


def _planned(report: Report, words: Sequence[str]) -> dict[str, Any]:
    """What `megalith plan` says of it; nothing if it fails."""
    on = "cpu" if report.rehearse else "h200" if "H200" in report.figures["conditions"]["device"] else "h100"
    said = report.run("plan", [sys.executable, "-m", "megalith", "plan", "--json", "--on", on, *words], seconds=40)
    plan = {} if said is None else json.loads(said)
    return {f"predicted_{name}": plan.get(name) for name in ("peak_bytes", "step_seconds")}


def _model_line(row: Row, measured: dict[str, Any], planned: dict[str, Any]) -> str:
    seconds, peak = measured["step_seconds"], measured["peak_memory_bytes"] / GIB
    goals = [
        f"{name} {'met' if reached <= goal else 'missed'} ({goal:g})"
        for name, reached, goal in (("time", seconds, row.seconds), ("memory", peak, row.gib))
        if goal is not None
    ]
    predicted = ""
    if planned["predicted_peak_bytes"] is not None:
        predicted = (
            f", planned {planned['predicted_peak_bytes'] / GIB:.1f} and {planned['predicted_step_seconds']:.3f} s"
        )
    datasheet = measured["mfu_datasheet"]
    mfu = f"MFU {100 * measured['mfu']:.1f} % of the measured product" + (
        "" if datasheet is None else f", {100 * datasheet:.1f} % of the data sheet"
    )
    speed = f"{seconds:8.3f} s {measured['tokens_per_second']:10,.0f} tokens/s {peak:7.2f} GiB{predicted}; {mfu}"
    first = f"first step after {measured['first_step_seconds']:.0f} s"
    return f"{row.name:<40}{speed}; {first}; {', '.join(goals) or 'no goal'}"


def kernels(report: Report) -> None:
    """Sizes of the kernels of attention with dropout; not on the CPU, whose time says nothing of them."""
    if report.rehearse:
        return
    command = [sys.executable, "-m", "benchmarks.gpu_products", "--kernels"]
    said = report.run("kernels", command, seconds=120, needs=30)
    if said is not None:
        report.figures["kernels"] = json.loads(said.splitlines()[-1])
        for line in said.splitlines()[:-1]:
            report.say(line)


def profiles(report: Report) -> None:
    """Where the time of a step goes, kernel by kernel, and what holds its memory at the peak."""
    report.figures["profiles"] = {}
    for number, program in PROFILES:
        row = ROWS[number]
        if report.rehearse and program == "gpu_memory":  # there is nothing to record on a CPU
            continue
        command = [sys.executable, "-m", f"benchmarks.{program}", *_toy(report), *_flags_of(row, report)]
        said = report.run(f"{program} of {row.name}", command, seconds=120, needs=35)
        if said is not None:
            report.figures["profiles"][f"{row.name}, {program}"] = json.loads(said.splitlines()[-1])
            report.say(f"{row.name}, {program}")
            for line in said.splitlines()[:-1]:
                report.say(line)


def equality(report: Report) -> None:
    """The same fp32 model with dropout on GPU and CPU: the same losses, for masks and weights are the same bits."""
    words = (TOY if report.rehearse else TOY.replace("32", "64")) + " --vocab-size 500 --micro-batch-size 4"
    losses = {}
    for device in ("cpu", "cpu" if report.rehearse else "cuda"):
        command = [sys.executable, "-m", "megalith", "bench", "--steps", "6", "--warmup", "1", "--json"]
        said = report.run("equality", [*command, *words.split(), "--device", device], seconds=60)
        if said is None:
            return
        figures = json.loads(said.splitlines()[-1])
        losses[device] = [figures["first_loss"], figures["last_loss"]]
    first, *_ = losses.values()
    *_, last = losses.values()
    difference = max(abs(a - b) / abs(a) for a, b in zip(first, last, strict=True))
    report.figures["equality"] = {"losses": losses, "largest_relative_difference": difference}
    report.say(f"fp32 losses beside the CPU's: {difference:.1e} apart at most")
    if difference > 1e-4:
        report.faults.append(f"equality: fp32 losses are {difference:.1e} apart: {losses}")


def text(report: Report) -> None:
    """Real text with the reference's schedule: the step beside that of made-up tokens, and 8-bit products' loss."""
    report.figures["text"] = {}
    model, steps, batch = (TOY, 6, 4) if report.rehearse else (SMALL, 150, 16)
    for name, more in (("bf16", []), ("fp8", ["--fp8-format", "e4m3"])):
        with tempfile.TemporaryDirectory() as folder:
            words = (
                f"{model} --bf16 --micro-batch-size {batch} --global-batch-size {batch} {STILL} --corpus python".split()
            )
            words += f"--train-iters {steps} --lr 6e-4 --lr-decay-iters 1000 --lr-warmup-fraction 0.01".split()
            words += (
                f"--save {folder}/run --save-interval {steps} --log-interval 1 --log-format json --eval-iters 0".split()
            )
            words += ["--device", "cpu", "--corpus-vocab-size", "400"] if report.rehearse else ["--compile", "on"]
            said = report.run(
                f"text, {name}", [sys.executable, "-m", "megalith", "pretrain", *words, *more], seconds=110, needs=40
            )
            if said is None:
                return
            records = [json.loads(line) for line in (Path(folder) / "run" / "log.jsonl").read_text().splitlines()]
        done = [record for record in records if record["event"] == "step_done"]
        report.figures["text"][name] = {
            "loss": statistics.mean(record["losses"]["lm loss"] for record in done[-max(2, steps // 8) :]),
            "step_seconds": statistics.median(record["seconds"] for record in done[3:]),
        }
    losses = {name: found["loss"] for name, found in report.figures["text"].items()}
    gap = losses["fp8"] / losses["bf16"] - 1
    report.figures["text"]["fp8_loss_gap"] = gap
    found = f"loss {losses['bf16']:.4f} in bf16, {losses['fp8']:.4f} with fp8 ({100 * gap:+.2f} %)"
    report.say(f"124M on real text, {steps} steps: {found}")
    if gap > 0.005 and not report.rehearse:
        report.faults.append(f"fp8: its loss is {100 * gap:.2f} % above bf16's; 0.5 % is the limit")


def _toy(report: Report) -> list[str]:
    return ["--toy"] if report.rehearse else []


# The whole in the order of what is missed most, should the time run out; the others when they are asked for.
SECTIONS: tuple[Callable[[Report], None], ...] = (
    conditions, products, kernels, profiles, models, equality, text, tests
)  # fmt: skip
WHOLE = ("conditions", "products", "models", "equality", "text", "tests")


def table(report: Report) -> list[str]:
    """The end of the output: what matters, once more."""
    heads = f"{'model':<40}{'s/step':>8}{'tokens/s':>11}{'TFLOP/s':>9}{'causal':>8}{'MFU %':>7}{'GiB':>7}"
    lines = [f"{heads}{'plan':>7}{'s':>8}"]
    for name, found in report.figures.get("models", {}).items():
        peak, seconds = found["predicted_peak_bytes"] or 0, found["predicted_step_seconds"] or 0
        lines.append(
            f"{name:<40}{found['step_seconds']:8.3f}{found['tokens_per_second']:11,.0f}{found['model_tflops']:9.1f}"
            f"{found['model_tflops_causal']:8.1f}{100 * found['mfu']:7.1f}{found['peak_memory_bytes'] / GIB:7.1f}"
            f"{peak / GIB:7.1f}{seconds:8.3f}"
        )
    return [*lines, f"{len(report.faults)} faults"]


if __name__ == "__main__":
    sys.exit(main())
