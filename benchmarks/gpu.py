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
INT8 = "--optimizer-state-dtype int8"
STILL = "--hidden-dropout 0 --attention-dropout 0"


@dataclass(frozen=True)
class Row:
    """A model that is measured by megalith bench, and what is hoped for."""

    name: str
    model: str
    words: str
    batch: str
    loss: float  # of the last step; on an H200, before weights' gradients and norms had kernels of our own
    seconds: float | None = None  # goal for a step
    gib: float | None = None  # goal for the peak


# In the order of what is missed most: of 39 s each, seven end within five minutes.
ROWS = (
    Row("XL bf16, no dropout, microbatch 16", XL, f"--bf16 {STILL}", "16 64", 10.9960, seconds=1.30),
    Row("XL bf16, dropout, microbatch 16", XL, "--bf16", "16 64", 10.9959, seconds=1.50),
    Row("XL bf16, no dropout, microbatch 8", XL, f"--bf16 {STILL}", "8 64", 10.9960, gib=46),
    Row("XL bf16, dropout, full recomput. at 16", XL, f"--bf16 {FULL}", "16 64", 10.9959, seconds=1.75),
    Row("XL bf16, dropout, full recomput. at 8", XL, f"--bf16 {FULL}", "8 64", 10.9958, gib=26),
    Row("XL fp8, no dropout, microbatch 16", XL, f"--bf16 --fp8-format e4m3 {STILL}", "16 64", 10.9950, seconds=1.12),
    Row("XL bf16, int8 moments, full recomput.", XL, f"--bf16 {FULL} {INT8}", "8 64", 10.9958, gib=17),
    Row("XL fp16, dropout, microbatch 16", XL, "--fp16 --initial-loss-scale 65536", "16 64", 10.9958, seconds=1.50),
    Row("124M bf16, no dropout", SMALL, f"--bf16 {STILL}", "32 64", 10.9331),
    Row("350M bf16, no dropout", MEDIUM, f"--bf16 {STILL}", "16 64", 10.9564),
)  # fmt: skip
# Between losses of one row, at most: GPUs, microbatches and recomputation move them by 1e-4.
LOSSES_APART = 3e-4

# Of which rows a profile is made, and by which program.
PROFILES = ((0, "gpu_profile"), (2, "gpu_memory"), (5, "gpu_profile"), (1, "gpu_profile"))


@dataclass
class Report:
    """What has been measured."""

    rehearse: bool
    deadline: float
    num_rows: int  # of the models
    place: Path  # of the files, without the ends of their names
    figures: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    printed: list[str] = field(default_factory=list)  # all that processes said which failed

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
        limit = min(seconds, self.left)
        try:
            ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=limit, check=False)
        except subprocess.TimeoutExpired as late:
            self._fail(f"{name}: took more than its {limit:.0f} s", late.stdout, late.stderr)
            return None
        if ended.returncode:
            self._fail(f"{name}: status {ended.returncode}", ended.stdout, ended.stderr)
            return None
        return ended.stdout

    def figures_of(
        self, name: str, command: Sequence[str], *, seconds: float, needs: float = 0.0
    ) -> tuple[list[str], dict[str, Any]] | None:
        """The lines that a process printed, and the JSON object that is the last of them; else as `run`."""
        said = self.run(name, command, seconds=seconds, needs=needs)
        if said is None:
            return None
        *lines, last = said.splitlines() or [""]
        try:
            return lines, json.loads(last)
        except ValueError:
            self._fail(f"{name}: its last line is no JSON", said)
            return None

    def _fail(self, fault: str, *outputs: str | bytes | None) -> None:
        # Those of a process that was ended are bytes.
        texts = [text.decode(errors="replace") if isinstance(text, bytes) else text or "" for text in outputs]
        self.faults.append("\n".join([fault, *(text.strip()[-1500:] for text in texts if text.strip())]))
        self.printed += [f"== {fault}", *texts]
        self.keep()

    def keep(self) -> None:
        """Write all that is known until now: whoever ends this program too early leaves that."""
        try:
            self.place.parent.mkdir(parents=True, exist_ok=True)
            figures = json.dumps({**self.figures, "faults": self.faults}, indent=1)
            for end, lines in ((".json", [figures]), (".txt", self.lines + self.printed)):
                self.place.with_name(self.place.name + end).write_text("\n".join(lines) + "\n")
        except OSError as error:
            if not any(fault.startswith("files: ") for fault in self.faults):
                self.faults.append(f"files: {error}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at toy sizes")
    parser.add_argument("--only", nargs="*", choices=[section.__name__ for section in SECTIONS])
    parser.add_argument("--rows", type=int, default=len(ROWS), metavar="N", help="models: the first N rows alone [all]")
    parser.add_argument("--minutes", type=float, default=8.7, help="for everything [8.7]")
    options = parser.parse_args()
    place = place_of(options.only or (), rehearse=options.rehearse)
    report = Report(options.rehearse, time.monotonic() + 60 * options.minutes, options.rows, place)
    for section in SECTIONS:
        name = section.__name__
        if section is conditions or name in (options.only or WHOLE):
            began = time.monotonic()
            try:
                section(report)
            except Exception as error:  # whatever it is, the other sections are measured all the same
                report.faults.append(f"{name}: {type(error).__name__}: {error}")
            report.say(f"  ({name}: {time.monotonic() - began:.0f} s)")
            report.keep()
    for fault in report.faults:
        report.say(f"FAULT {fault}")
    print("\n".join(["", *table(report)]), flush=True)
    report.keep()
    return 1 if report.faults else 0


def place_of(sections: Sequence[str], *, rehearse: bool) -> Path:
    """Where the report is written, but for the ends of the names: beside those that are there."""
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    stem = "-".join([time.strftime("gpu-%Y-%m-%d"), *sections])
    names = (f"{stem}{number}{'-rehearsal' * rehearse}" for number in ("", *(f"-{n}" for n in range(2, 1000))))
    return folder / next(name for name in names if not (folder / f"{name}.json").exists())


def conditions(report: Report) -> None:
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu and not report.rehearse:
        sys.exit("gpu.sh: no CUDA device here. --rehearse runs everything on the CPU at toy sizes.")
    report.figures["conditions"] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if on_gpu and not report.rehearse else platform.processor() or "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        # COMMIT first: a copy of the source may lie in a checkout of something older.
        "commit": os.environ.get("COMMIT") or _commit(),
    }
    for name, value in report.figures["conditions"].items():
        report.say(f"{name}: {value}")


def _commit() -> str:
    try:
        told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    except OSError:  # there is no git
        return "unknown"
    return told.stdout.strip() or "unknown"


def products(report: Report) -> None:
    """Rates of matrix products and attention, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu_products", *_toy(report)]
    _tell("products", report.figures_of("products", command, seconds=120, needs=20), report)


def tests(report: Report) -> None:
    """Those of the kernels, what no GPU has run first; and in a process of their own those that pin memory."""
    names = ("accumulate", "norm_fused", "sixteen", "float8", "attend_fused", "random")
    files = [f"tests/layers/test_{name}.py" for name in names]
    if not report.rehearse:
        files.insert(2, "tests/optim/test_compact_fused.py")
        files += ["tests/layers/test_attend.py", "tests/optim/test_groups.py", "tests/optim/test_clip.py"]
    _test("tests", [*files, "-k", "not learns and not compile"], report, seconds=150)
    if not report.rehearse:
        pinning = ["-m", "gpu", "tests/checkpoint/test_saver.py", "tests/data/test_loader.py"]
        _test("tests of pinned memory", pinning, report, seconds=40)


def _test(name: str, words: Sequence[str], report: Report, *, seconds: float) -> None:
    # With a line for each test: of those that have no time left the last one tells.
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *words]
    said = report.run(name, command, seconds=seconds, needs=10)
    if said is not None:
        report.figures[name] = said.strip().splitlines()[-1].strip("= ")
        report.say(f"{name}: {report.figures[name]}")


def models(report: Report) -> None:
    """The reference job and smaller ones: predicted and measured."""
    report.figures["models"] = {}
    for row in ROWS[: report.num_rows]:
        words = _flags_of(row, report)
        steps = ["--steps", "3" if report.rehearse else "6", "--warmup", "1" if report.rehearse else "2", "--json"]
        command = [sys.executable, "-m", "megalith", "bench", *steps, *words]
        with ThreadPoolExecutor() as beside:  # the plan needs no GPU
            plan = beside.submit(_planned, report, words)
            found = report.figures_of(row.name, command, seconds=120, needs=35)
            planned = plan.result()
        if found is None:
            continue
        _, measured = found
        report.figures["models"][row.name] = {**measured, **planned}
        report.say(_model_line(row, measured, planned))
        if not report.rehearse and not abs(measured["last_loss"] - row.loss) < LOSSES_APART:
            report.faults.append(f"{row.name}: its last loss is {measured['last_loss']:.4f} and was {row.loss}")
        report.keep()


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
    found = report.figures_of(
        "plan", [sys.executable, "-m", "megalith", "plan", "--json", "--on", on, *words], seconds=40
    )
    plan = {} if found is None else found[1]
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
    _tell("kernels", report.figures_of("kernels", command, seconds=120, needs=30), report)


def _tell(name: str, found: tuple[list[str], dict[str, Any]] | None, report: Report) -> None:
    if found is not None:
        lines, report.figures[name] = found
        for line in lines:
            report.say(line)


def profiles(report: Report) -> None:
    """Where the time of a step goes, kernel by kernel, and what holds its memory at the peak."""
    report.figures["profiles"] = {}
    for number, program in PROFILES:
        row = ROWS[number]
        if report.rehearse and program == "gpu_memory":  # there is nothing to record on a CPU
            continue
        command = [sys.executable, "-m", f"benchmarks.{program}", *_toy(report), *_flags_of(row, report)]
        found = report.figures_of(f"{program} of {row.name}", command, seconds=120, needs=35)
        if found is not None:
            lines, report.figures["profiles"][f"{row.name}, {program}"] = found
            for line in (f"{row.name}, {program}", *lines):
                report.say(line)
            report.keep()


def equality(report: Report) -> None:
    """The same fp32 model with dropout on GPU and CPU: the same losses, for masks and weights are the same bits."""
    words = (TOY if report.rehearse else TOY.replace("32", "64")) + " --vocab-size 500 --micro-batch-size 4"
    losses = {}
    for device in ("cpu", "cpu" if report.rehearse else "cuda"):
        command = [sys.executable, "-m", "megalith", "bench", "--steps", "6", "--warmup", "1", "--json"]
        found = report.figures_of("equality", [*command, *words.split(), "--device", device], seconds=60)
        if found is None:
            return
        _, figures = found
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
