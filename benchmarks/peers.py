"""Megalith side by side with what one would have used instead: the same model, batch, precision and optimizer.

    python benchmarks/peers.py                         all programs and sizes: half an hour, 8 GB of disk
    python benchmarks/peers.py --sizes small --rounds 5
    python benchmarks/peers.py --programs megalith hf-eager hf-eager-tcmalloc
    python benchmarks/peers.py --bf16                  16-bit products, for processors that have them

Each program is a process in a virtual environment of its own, which this script makes (and keeps in --directory). The
programs of a size stand side by side and take their steps in turns, A B C A B C, so that whatever else the machine does
meets all alike; a ratio is the median over rounds of (this program's tokens per second / those of hf-eager in the same
round). Where memory does not hold all programs of a size at once, they run in groups, each beside hf-eager. fp32 (with
--bf16 torch.autocast, and Megalith's --bf16), AdamW (fused), clipping at 1.0, no dropout, random tokens, all cores.

first step: seconds from starting the process to the end of its first step, alone on the machine, median of --starts.
peak: high-water mark of resident memory. Programs with -tcmalloc have that allocator preloaded (Debian:
libtcmalloc-minimal4).
"""

import argparse
import ctypes.util
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PROGRAMS_FOLDER = Path(__file__).parent / "peers_programs"
TORCH = "torch>=2.11,<2.14"
VOCABULARY = 50304
# What the ratios are to.
YARDSTICK = "hf-eager"
OURS = "megalith"


@dataclass(frozen=True)
class Program:
    script: str
    environment: str
    mode: str = "eager"
    tcmalloc: bool = False
    has_bf16: bool = False


PROGRAMS = {
    "megalith": Program("megalith_program.py", "megalith", has_bf16=True),
    "hf-eager": Program("hugging_face_loop.py", "hugging-face", has_bf16=True),
    "hf-eager-tcmalloc": Program("hugging_face_loop.py", "hugging-face", tcmalloc=True, has_bf16=True),
    "hf-compiled": Program("hugging_face_loop.py", "hugging-face", mode="compiled"),
    "hf-trainer": Program("hugging_face_trainer.py", "hugging-face"),
    "megatron-core": Program("megatron_core_program.py", "megatron-core"),
    "litgpt": Program("litgpt_program.py", "litgpt"),
    "megalith-tcmalloc": Program("megalith_program.py", "megalith", tcmalloc=True),
    "megalith-compiled": Program("megalith_program.py", "megalith", mode="compiled"),
}
# What is installed beside torch, by environment.
PACKAGES: dict[str, tuple[str, ...]] = {
    "megalith": (str(ROOT),),
    "hugging-face": ("transformers", "accelerate>=1.1"),
    "megatron-core": ("megatron-core", "einops"),
    "litgpt": ("litgpt",),
}
# (layers, width, heads, sequence, batch, steps of a round)
SIZES = {
    "small": (6, 384, 6, 256, 8, 3),
    "124m-512": (12, 768, 12, 512, 2, 2),
    "124m-1024": (12, 768, 12, 1024, 1, 2),
}


@dataclass
class Measured:
    """What came of a program at a size."""

    first_step: float = 0.0  # seconds
    num_parameters: int = 0
    threads: int = 0
    peak: int = 0  # bytes
    tokens_per_second: list[float] = field(default_factory=list)  # by round
    # Over the yardstick in the same round: tokens per second, and per second of processor time.
    ratios: list[float] = field(default_factory=list)
    cpu_ratios: list[float] = field(default_factory=list)
    failed: str = ""


def main() -> int:
    options = parse()
    names = [name for name in options.programs if PROGRAMS[name].has_bf16 or not options.bf16]
    if YARDSTICK not in names:
        names.insert(0, YARDSTICK)
    allocator = ctypes.util.find_library("tcmalloc_minimal")
    for name in list(names):
        if PROGRAMS[name].tcmalloc and allocator is None:
            print(f"{name}: left out, tcmalloc is not installed on this machine", flush=True)
            names.remove(name)
    for environment in sorted({PROGRAMS[name].environment for name in names}):
        make_environment(options.directory, environment)
    results: dict[str, dict[str, Measured]] = {}
    is_stopped = False
    for size in options.sizes:
        results[size] = {name: Measured() for name in names}
        try:
            measure_size(size, results[size], options)
        except KeyboardInterrupt:
            is_stopped = True
            print(f"\n{size}: stopped; what had been measured:", flush=True)
        print_table(size, results[size], options)
        if is_stopped:
            break
    print(conditions(options.directory))
    if options.json is not None:
        plain = {size: {n: dataclasses.asdict(m) for n, m in measured.items()} for size, measured in results.items()}
        options.json.write_text(json.dumps({"conditions": conditions(options.directory), "sizes": plain}))
    return 130 if is_stopped else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--bf16", action="store_true", help="in bf16 instead of fp32; only programs that offer it")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each program [7]")
    parser.add_argument("--starts", type=int, default=3, help="starts of each program, for its first step [3]")
    parser.add_argument("--steps", type=int, help="steps in a turn [3 of the small size, 2 of the others]")
    parser.add_argument(
        "--directory", type=Path, default=Path("peers-environments"), help="where environments are kept"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.starts) < 1 or (arguments.steps is not None and arguments.steps < 1):
        parser.error("--rounds, --starts and --steps: must be at least 1")
    if arguments.json is not None and not arguments.json.parent.is_dir():
        parser.error(f"--json = {arguments.json}: there is no directory {arguments.json.parent}")
    return arguments


def make_environment(directory: Path, name: str) -> None:
    """A virtual environment with torch and the packages of that name; made once, Megalith itself anew each time."""
    folder = directory / name
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"making the environment {name} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        # torch first and by itself: some packages would pull another build.
        _pip(python, TORCH, "numpy")
        _pip(python, *PACKAGES[name])
        (folder / "complete").touch()
    elif name == "megalith":
        _pip(python, "--force-reinstall", "--no-deps", *PACKAGES[name])


def _pip(python: Path, *words: str) -> None:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words)
    subprocess.run([python, *words], check=True, env=clean)


class Running:
    """A program that waits for rounds."""

    def __init__(self, name: str, size: str, directory: Path, *, bf16: bool) -> None:
        program = PROGRAMS[name]
        layers, width, heads, length, batch, _ = SIZES[size]
        model = {
            "num_layers": layers,
            "hidden_size": width,
            "num_heads": heads,
            "sequence_length": length,
            "batch_size": batch,
            "vocab_size": VOCABULARY,
            "seed": 1234,
            "mode": program.mode,
            "bf16": bf16,
        }
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "LD_PRELOAD")}
        environment["PYTHONDONTWRITEBYTECODE"] = ""
        if program.tcmalloc:
            environment["LD_PRELOAD"] = str(ctypes.util.find_library("tcmalloc_minimal"))
        self.errors = (directory / f"{name}-{size}.errors").open("w+", encoding="utf-8")
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            [directory / program.environment / "bin" / "python", PROGRAMS_FOLDER / program.script, json.dumps(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            text=True,
        )

    def answer(self) -> dict[str, Any]:
        """What it says next. Raises RuntimeError with the end of its errors if it says nothing more."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            last = [text for text in self.errors.read().splitlines() if text.strip()][-1:]
            raise RuntimeError(last[0] if last else f"it ended with status {self.process.returncode}")
        return dict(json.loads(line))

    def take(self, steps: int) -> dict[str, Any]:
        """Let it take steps."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.errors.close()


def measure_size(size: str, measured: dict[str, Measured], options: argparse.Namespace) -> None:
    """All programs at a size: in groups that memory holds, each with the yardstick in it."""
    yardstick = start(YARDSTICK, size, measured[YARDSTICK], options)
    if yardstick is None:
        raise RuntimeError(f"{size}: nothing can be compared without {YARDSTICK}: {measured[YARDSTICK].failed}")
    waiting = [name for name in measured if name != YARDSTICK]
    while waiting:
        group = {YARDSTICK: yardstick}
        largest = yardstick.take(1)["peak"]
        # Room for one more program as large as the largest, and a fifth to spare.
        while waiting and (len(group) == 1 or available_memory() > 1.2 * largest):
            name = waiting.pop(0)
            program = start(name, size, measured[name], options)
            if program is not None:
                group[name] = program
                largest = max(largest, program.take(1)["peak"])
        for _ in range(options.rounds):
            take_turns(group, size, measured, options)
        for name, program in group.items():
            if name != YARDSTICK:
                program.end()
    yardstick.end()


def start(name: str, size: str, found: Measured, options: argparse.Namespace) -> Running | None:
    """Start a program as often as is asked for; the last takes a second step. None if it fails, which is noted."""
    seconds: list[float] = []
    try:
        for left in reversed(range(options.starts)):
            program = Running(name, size, options.directory, bf16=options.bf16)
            said = program.answer()
            seconds.append(time.perf_counter() - program.began)
            if left:
                program.end()
        program.take(1)  # The second step still meets much for the first time.
    except RuntimeError as error:
        found.failed = str(error)
        program.end()
        print(f"{size} {name}: failed: {error}", flush=True)
        return None
    found.first_step = statistics.median(seconds)
    found.num_parameters, found.threads = said["num_parameters"], said["threads"]
    return program


def take_turns(
    group: dict[str, Running], size: str, measured: dict[str, Measured], options: argparse.Namespace
) -> None:
    """One round: every program of the group takes its steps, one program after the other."""
    _, _, _, length, batch, steps = SIZES[size]
    steps = options.steps or steps
    said = {name: program.take(steps) for name, program in group.items()}
    base = said[YARDSTICK]
    for name, answer in said.items():
        measured[name].tokens_per_second.append(steps * batch * length / answer["seconds"])
        measured[name].ratios.append(base["seconds"] / answer["seconds"])
        measured[name].cpu_ratios.append(base["cpu_seconds"] / answer["cpu_seconds"])
        measured[name].peak = answer["peak"]


def available_memory() -> int:
    """Bytes that a program can still take, as Linux tells; without end elsewhere."""
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), sys.maxsize)


def print_table(size: str, measured: dict[str, Measured], options: argparse.Namespace) -> None:
    """Figures and ratios of a size, as Markdown."""
    layers, width, heads, length, batch, steps = SIZES[size]
    steps = options.steps or steps
    print(
        f"\n{size}: {layers} layers x {width}, {heads} heads, sequence {length}, batch {batch}, vocabulary "
        f"{VOCABULARY}; {'bf16; ' if options.bf16 else ''}{options.rounds} rounds, steps in a turn: {steps}\n\n"
        "| program | tokens/s | x (wall), quartiles | x (CPU time) | peak MB | x | first step s | x | parameters |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    base = measured[YARDSTICK]
    for name, found in measured.items():
        if found.failed:
            print(f"| {name} | failed: {found.failed[:80]} | | | | | | | |")
            continue
        if not found.ratios:
            print(f"| {name} | not measured | | | | | | | |")
            continue
        ratios, busy = found.ratios, found.cpu_ratios
        low, high = statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else (ratios[0], ratios[0])
        print(
            f"| {name} | {statistics.median(found.tokens_per_second):,.0f} | {statistics.median(ratios):.2f}, "
            f"{low:.2f} to {high:.2f} | {statistics.median(busy):.2f} | {found.peak / 1e6:,.0f} | "
            f"{found.peak / base.peak:.2f} | {found.first_step:.1f} | {found.first_step / base.first_step:.2f} | "
            f"{found.num_parameters:,} |",
            flush=True,
        )
    if OURS in measured and measured[OURS].ratios:
        others = {n: statistics.median(m.ratios) for n, m in measured.items() if m.ratios and not n.startswith(OURS)}
        best = max(others, key=lambda name: others[name])
        ratio = statistics.median(measured[OURS].ratios) / others[best]
        print(f"\n{OURS} over the best of the others ({best}): {ratio:.2f}", flush=True)


def conditions(directory: Path) -> str:
    """Machine, versions and commit."""
    model = "unknown processor"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    versions = []
    for name, packages in PACKAGES.items():
        python = directory / name / "bin" / "python"
        wanted = [package.split(">")[0] for package in packages if not package.startswith("/")] + ["torch"]
        code = f"import importlib.metadata as m; print(', '.join(p + ' ' + m.version(p) for p in {wanted!r}))"
        if python.exists():
            said = subprocess.run([python, "-c", code], capture_output=True, text=True)
            versions.append(f"{name}: {said.stdout.strip()}")
    return (
        f"\n{time.strftime('%Y-%m-%d')}, {model}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"Megalith at {commit.stdout.strip() or 'an unknown commit'}; {'; '.join(versions)}"
    )


if __name__ == "__main__":
    sys.exit(main())
