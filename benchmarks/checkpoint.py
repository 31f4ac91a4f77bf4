"""What saving costs a training: how long steps wait for it, beside what they would wait without a thread of its own.

    python benchmarks/checkpoint.py                      14 million parameters, 3 saves 50 steps apart
    python benchmarks/checkpoint.py --width 512 --device cuda --folder /somewhere/on/disk

A stall is the time that the training's thread waits: for the copy to host memory, and for the end of the save before.
"blocking" is the whole write, from the start of the save to its commit, which a save in the foreground would cost. The
shares are of a step; goal: a stall of at most 5 % of a step at an interval of 50 steps. Digest and read-back are
measured alone, on the same bytes, and given as shares of the time of a write in the foreground.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megalith.checkpoint.pieces import whole
from megalith.checkpoint.saver import AsyncSaver, Saved
from megalith.checkpoint.store import save
from megalith.checkpoint.verify import verify

GOAL = 0.05  # of a step

HEAD_WIDTH = 64


@dataclass(frozen=True)
class Figures:
    """Seconds, medians over the saves; bytes of a checkpoint."""

    num_bytes: int
    step: float  # a step with no save beside it
    step_beside: float  # a step while a checkpoint is being written
    stall: float  # that the steps waited for a save in all
    blocking: float  # the whole write
    foreground: float  # the whole write with nothing beside it
    digest: float  # SHA-256 of the bytes in memory
    read_back: float  # reading and digesting what was written

    def rows(self, interval: int) -> list[tuple[str, float, float, str]]:
        """What, seconds, share, of what."""
        per_interval = self.stall / (interval * self.step)
        return [
            ("step, nothing beside it", self.step, 1.0, "of a step"),
            ("step beside a save", self.step_beside, self.step_beside / self.step, "of a step"),
            (f"stall (goal {GOAL:.0%})", self.stall, self.stall / self.step, "of a step"),
            (f"stall over {interval} steps", self.stall, per_interval, "of the time"),
            ("blocking: the whole write", self.blocking, self.blocking / self.step, "of a step"),
            ("write in the foreground", self.foreground, self.foreground / self.step, "of a step"),
            ("digest", self.digest, self.digest / self.foreground, "of that write"),
            ("read-back", self.read_back, self.read_back / self.foreground, "of that write"),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description="What saving costs a training.")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="of a step")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--interval", type=int, default=50, help="steps between two saves")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--folder", type=Path, help="on the file system to measure [the temporary one]")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if min(options.width // HEAD_WIDTH, options.layers, options.tokens, options.saves, options.interval) < 1:
        parser.error(f"--width: must be at least {HEAD_WIDTH}; --layers, --tokens, --saves, --interval: at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    if options.folder is not None and not options.folder.is_dir():
        parser.error(f"--folder = {options.folder}: is no directory")
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        figures = measure(options, folder)
    finally:
        shutil.rmtree(folder)
    if options.json:
        print(json.dumps(asdict(figures)))
        return
    print(f"{figures.num_bytes:,} bytes a checkpoint, {options.saves} saves, {options.interval} steps apart")
    for name, seconds, share, of in figures.rows(options.interval):
        print(f"  {name:<26}{seconds:10.4f} s {share:10.2%} {of}")


class Training:
    """Transformer layers that are trained on drawn tokens with Adam."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(1)
        self.device = torch.device(options.device)
        self.model = torch.nn.Sequential(
            torch.nn.Embedding(8192, options.width),
            *(
                torch.nn.TransformerEncoderLayer(options.width, options.width // HEAD_WIDTH, batch_first=True)
                for _ in range(options.layers)
            ),
            torch.nn.Linear(options.width, 8192),
        ).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.tokens = torch.randint(8192, (1, options.tokens), device=self.device)
        self.before_update: Callable[[], float] = lambda: 0.0
        self.step()

    def step(self) -> float:
        """Take a step; give the seconds that it waited for a copy."""
        loss = torch.nn.functional.cross_entropy(self.model(self.tokens).flatten(0, 1), self.tokens.flatten())
        loss.backward()
        waited = self.before_update()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return waited

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds: weights and both moments."""
        named = {f"weight.{name}": parameter.data for name, parameter in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for kind in ("exp_avg", "exp_avg_sq"):
                named[f"{kind}.{name}"] = self.optimizer.state[parameter][kind]
        return named


def measure(options: argparse.Namespace, folder: Path) -> Figures:
    training = Training(options)
    pieces = {name: whole(tensor) for name, tensor in training.tensors().items()}
    saver = AsyncSaver(folder / "beside", keep_last=1)
    training.before_update = saver.before_update
    rows: list[list[float]] = [[] for _ in range(7)]
    steps, beside, stalls, writes, foreground, digests, reads = rows
    saver.save(0, pieces, {})  # the first allocates the memory of the copy
    saver.wait()
    for number in range(1, options.saves + 1):
        stall = saver.save(number, pieces, {}, overlap=True)
        saved: list[Saved] = []
        for _ in range(options.interval):
            began = time.perf_counter()
            stall += training.step()
            (steps if saved else beside).append(time.perf_counter() - began)
            saved = saved or saver.poll()
        saved = saved or saver.wait()
        stalls.append(stall)
        writes.append(saved[0].seconds)
        began = time.perf_counter()
        path = save(folder / "foreground", number, pieces, {})
        foreground.append(time.perf_counter() - began)
        digests.append(seconds_of_digest(training))
        began = time.perf_counter()
        verify(path)
        reads.append(time.perf_counter() - began)
        shutil.rmtree(path)
    saver.close()
    median = statistics.median
    return Figures(
        num_bytes=saved[0].num_bytes,
        step=median(steps or beside),
        step_beside=median(beside),
        stall=median(stalls),
        blocking=median(writes),
        foreground=median(foreground),
        digest=median(digests),
        read_back=median(reads),
    )


def seconds_of_digest(training: Training) -> float:
    """Seconds to digest what a checkpoint holds, from host memory."""
    flat = [tensor.detach().cpu().contiguous().view(-1) for tensor in training.tensors().values()]
    data = [tensor.view(torch.uint8).numpy() for tensor in flat]
    began = time.perf_counter()
    sha256 = hashlib.sha256()
    for part in data:
        sha256.update(part.data)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
