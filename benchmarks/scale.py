"""What a step or a start costs as one size grows and all others stay: curves beside their expected order of growth.

    python -m benchmarks.scale                          a table for each size, under ten minutes on two cores
    python -m benchmarks.scale --figures docs/pictures  and scale.svg
    python -m benchmarks.scale --only sequence ranks --quick

Costs are CPU seconds with one thread (of all ranks together), the least of a few: they hardly depend on what else the
machine does. Expected is what the operations of the model say (causal convention), or the count itself, scaled to the
middle of the curve. A growth is the exponent fitted to the upper half of a curve: cost ~ n^growth.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalith.allocator import keep_freed_memory
from megalith.bench import made_for_measuring, prepared
from megalith.check import check
from megalith.data.index_maps import build_index_maps
from megalith.monitor.flops import training_flops
from megalith.sources import read_command_line
from megalith.train import take_told_step
from tests.ranks import run_ranks

FAR = 0.15  # a point departs if its cost is so far from the expected one, relative


@dataclass(frozen=True)
class Model:
    """The sizes that stay while one grows; small enough that the largest of each curve takes seconds."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    sequence: int = 256
    batch: int = 4  # sequences
    vocabulary: int = 8192

    def operations(self) -> float:
        """Floating-point operations of a step."""
        return training_flops(
            num_layers=self.layers,
            hidden_size=self.width,
            seq_length=self.sequence,
            vocab_size=self.vocabulary,
            batch=self.batch,
            causal=True,
        )


@dataclass(frozen=True)
class Point:
    size: int
    cost: float  # CPU seconds
    expected: float  # in units of its own


@dataclass(frozen=True)
class Curve:
    """How a cost grows with one size."""

    name: str
    size_of: str
    cost_of: str
    order: str  # expected, in words
    points: tuple[Point, ...]

    def scale(self) -> float:
        """From the units of the expectation to seconds: the median over the points."""
        return statistics.median(point.cost / point.expected for point in self.points)

    def off(self, point: Point) -> float:
        """How far a cost is from the expected one, relative."""
        return point.cost / (point.expected * self.scale()) - 1

    def growth(self, value: Callable[[Point], float]) -> float:
        """The exponent over the upper half of the sizes, by least squares in logarithms."""
        upper = self.points[len(self.points) // 2 :] if len(self.points) > 3 else self.points
        logs = [(math.log(point.size), math.log(value(point))) for point in upper]
        return statistics.linear_regression(*zip(*logs, strict=True)).slope

    def departures(self) -> str:
        """At which sizes it costs clearly more or less than expected."""
        far = [f"{self.off(point):+.0%} at {point.size:,}" for point in self.points if abs(self.off(point)) > FAR]
        return ", ".join(far) or "nowhere"


def words_of(model: Model) -> list[str]:
    return f"""
        --num-layers {model.layers} --hidden-size {model.width} --num-attention-heads {model.heads}
        --seq-length {model.sequence} --max-position-embeddings {model.sequence} --micro-batch-size {model.batch}
        --vocab-size {model.vocabulary} --make-vocab-size-divisible-by 1 --attention-dropout 0 --hidden-dropout 0
        --lr 1e-4 --device cpu --mock-data
    """.split()


def step_seconds(model: Model, *, steps: int, world_size: int = 1) -> float:
    """The least CPU seconds of this process for a step of pretrain, after two that are not counted.

    world_size: of a rank whose environment says which it is.
    """
    run = made_for_measuring(read_command_line(words_of(model)), steps=steps + 2)
    assert not check(run, world_size)
    with prepared(run, started=time.monotonic()) as (job, keeper):
        seconds = []
        for _ in range(steps + 2):
            began = time.process_time()
            take_told_step(job, keeper)
            seconds.append(time.process_time() - began)
    return min(seconds[2:])


def sweep(
    name: str, sizes: Sequence[int], model_of: Callable[[int], Model], *, size_of: str, order: str, steps: int
) -> Curve:
    """A step's cost over models."""
    points = [Point(n, step_seconds(model_of(n), steps=steps), model_of(n).operations()) for n in sizes]
    return Curve(name, size_of, "a step", order, tuple(points))


def sequence(quick: bool, steps: int) -> Curve:
    sizes = (64, 128, 256) if quick else (64, 128, 256, 512, 1024, 2048, 4096)
    model_of = partial(_with, batch=1)
    return sweep(
        "sequence",
        sizes,
        lambda n: model_of(sequence=n),
        size_of="tokens of the one sequence",
        order="n, with n^2 of attention",
        steps=steps,
    )


def vocabulary(quick: bool, steps: int) -> Curve:
    sizes = (1024, 4096) if quick else (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
    return sweep(
        "vocabulary",
        sizes,
        lambda n: _with(vocabulary=n),
        size_of="entries",
        order="n, with what the layers cost",
        steps=steps,
    )


def depth(quick: bool, steps: int) -> Curve:
    sizes = (1, 2, 4) if quick else (1, 2, 4, 8, 16, 32)
    return sweep(
        "depth",
        sizes,
        lambda n: _with(layers=n),
        size_of="layers",
        order="n, with what the vocabulary costs",
        steps=steps,
    )


def batch(quick: bool, steps: int) -> Curve:
    sizes = (1, 2, 4) if quick else (1, 2, 4, 8, 16, 32)
    return sweep("batch", sizes, lambda n: _with(batch=n), size_of="sequences of 256 tokens", order="n", steps=steps)


def _with(**sizes: int) -> Model:
    return dataclasses.replace(Model(), **sizes)


def documents(quick: bool, steps: int) -> Curve:
    """Index maps of one epoch of documents of which only the lengths exist: 1 to 1999 tokens, 1000 in the mean."""
    points = []
    for count in (10**4, 10**5) if quick else (10**4, 10**5, 10**6, 10**7, 10**8):
        lengths = np.random.default_rng(0).integers(1, 2000, count, dtype=np.int32)
        tokens = int(lengths.sum(dtype=np.int64))
        numbers = np.arange(count, dtype=np.int32)
        began = time.process_time()
        build_index_maps(numbers, lengths, num_samples=tokens // 1024 - 1, sequence_length=1024, seed=1)
        points.append(Point(count, time.process_time() - began, float(count)))
    return Curve("documents", "documents", "the index maps of an epoch", "n", tuple(points))


def ranks(quick: bool, steps: int) -> Curve:
    """Data parallelism over gloo, each rank with a batch of its own: the work of all of them together."""
    points = []
    for world_size in (1, 2) if quick else (1, 2, 4, 8):
        on_rank = partial(_step_on_rank, steps=steps, world_size=world_size)
        points.append(Point(world_size, sum(run_ranks(on_rank, world_size, timeout=300)), float(world_size)))
    return Curve("ranks", "data-parallel ranks", "a step, over all ranks", "n", tuple(points))


def _step_on_rank(rank: int, *, steps: int, world_size: int) -> float:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    return step_seconds(Model(batch=2), steps=steps, world_size=world_size)


# Ranks first: they are forked, and a process that has computed with threads does not fork well.
CURVES: dict[str, Callable[[bool, int], Curve]] = {
    "ranks": ranks,
    "sequence": sequence,
    "vocabulary": vocabulary,
    "depth": depth,
    "batch": batch,
    "documents": documents,
}


def table(curve: Curve) -> str:
    """A curve as Markdown."""
    lines = [
        f"\n{curve.name}: CPU seconds of {curve.cost_of}; expected: {curve.order}",
        f"growth n^{curve.growth(lambda p: p.cost):.2f}, expected n^{curve.growth(lambda p: p.expected):.2f}; "
        f"departs by more than {FAR:.0%}: {curve.departures()}",
        "",
        f"| {curve.size_of} | CPU-s | over expected |",
        "|---|---|---|",
    ]
    lines += [f"| {point.size:,} | {point.cost:.4g} | {1 + curve.off(point):.2f} |" for point in curve.points]
    return "\n".join(lines)


WIDE, HIGH, MARGIN, COLUMNS = 300, 220, 46, 3  # pixels of a panel; panels in a row


def draw(curves: Sequence[Curve]) -> str:
    """An SVG with a panel per curve, both axes logarithmic: dots are measured, the line is expected."""
    shapes: list[str] = []
    for number, curve in enumerate(curves):
        left, top = number % COLUMNS * WIDE + MARGIN, number // COLUMNS * HIGH + 30
        shapes += _panel(curve, left, top, WIDE - MARGIN - 14, HIGH - 76)
    width, height = WIDE * min(COLUMNS, len(curves)), HIGH * -(-len(curves) // COLUMNS)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif"'
    return "\n".join(
        [f'{head} font-size="11">', '<rect width="100%" height="100%" fill="white"/>', *shapes, "</svg>\n"]
    )


def _panel(curve: Curve, left: int, top: int, wide: int, high: int) -> list[str]:
    scale = curve.scale()
    costs = [value for point in curve.points for value in (point.cost, point.expected * scale)]
    sizes = [point.size for point in curve.points]

    def place(size: float, cost: float) -> tuple[float, float]:
        x = math.log(size / min(sizes)) / math.log(max(sizes) / min(sizes))
        y = math.log(cost / min(costs)) / math.log(max(costs) / min(costs))
        return left + x * wide, top + (1 - y) * high

    line = " ".join("{:.1f},{:.1f}".format(*place(p.size, p.expected * scale)) for p in curve.points)
    growths = curve.growth(lambda p: p.cost), curve.growth(lambda p: p.expected)
    shapes = [
        f'<text x="{left}" y="{top - 10}" font-size="13">{curve.name}: n^{growths[0]:.2f}'
        f" (expected n^{growths[1]:.2f})</text>",
        f'<rect x="{left}" y="{top}" width="{wide}" height="{high}" fill="none" stroke="#ccc"/>',
        f'<polyline points="{line}" fill="none" stroke="#4292c6"/>',
        f'<text x="{left}" y="{top + high + 16}">{min(sizes):,}</text>',
        f'<text x="{left + wide}" y="{top + high + 16}" text-anchor="end">{max(sizes):,} {curve.size_of}</text>',
        f'<text x="{left - 4}" y="{top + 9}" text-anchor="end">{max(costs):.2g} s</text>',
        f'<text x="{left - 4}" y="{top + high}" text-anchor="end">{min(costs):.2g} s</text>',
    ]
    dots = (place(point.size, point.cost) for point in curve.points)
    return shapes + [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#e6550d"/>' for x, y in dots]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CURVES, default=list(CURVES), help="these curves")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each point, of which the least [3]")
    parser.add_argument("--quick", action="store_true", help="few and small sizes")
    parser.add_argument("--figures", type=Path, help="folder for scale.svg")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps = {options.steps}: must be at least 1")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json = {options.json}: there is no directory {options.json.parent}")
    keep_freed_memory()
    torch.set_num_threads(1)
    curves = []
    for name, measure in CURVES.items():
        if name in options.only:
            curves.append(measure(options.quick, options.steps))
            print(table(curves[-1]), flush=True)
    if options.figures is not None:
        options.figures.mkdir(parents=True, exist_ok=True)
        (options.figures / "scale.svg").write_text(draw(curves), encoding="utf-8")
    if options.json is not None:
        plain: list[dict[str, Any]] = [dataclasses.asdict(curve) for curve in curves]
        options.json.write_text(json.dumps(plain), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
