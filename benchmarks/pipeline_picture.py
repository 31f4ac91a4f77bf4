"""Draws what every pipeline stage does in one step, per schedule, from measured events.

    python -m benchmarks.pipeline_picture --out docs/pictures

Ranks are processes that exchange real tensors over gloo, in the order of the schedules that Megalith runs. What a stage
computes is a sleep of fixed length, a forward pass one unit, the two halves of a backward pass one unit each, so that
the picture shows the waits of the schedule and not those for the cores of the machine that draws it.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from megalith.parallel.pipeline import Pipeline
from megalith.parallel.reduce import Replicated
from tests.ranks import run_ranks

WIDTH = 4  # of the stream that travels


@dataclass(frozen=True)
class Event:
    """One pass of one microbatch through one part of the model.

    kind: F forward, B whole backward, I the part of it for the inputs, W the one for the weights.
    """

    kind: str
    part: int
    microbatch: int
    start: float  # seconds
    end: float


@dataclass(frozen=True)
class Picture:
    """What is drawn: a schedule with its stages, parts of the model per stage and microbatches."""

    name: str
    schedule: str
    parts: int
    stages: int = 4
    microbatches: int = 8
    waits: float = 0.0  # units that a stage should wait in a step, of one part's forward pass

    @property
    def work(self) -> int:
        """Units that a stage works in a step: one forward, two backward, of parts that share out the same model."""
        return 3 * self.microbatches * self.parts


# The waits: Narayanan et al. 2021 (arXiv:2104.04473), and Qi et al. 2023 (arXiv:2401.10241) for the split backward.
PICTURES = (
    Picture("gpipe", "gpipe", 1, waits=3 * 3),
    Picture("1f1b", "1f1b", 1, waits=3 * 3),
    Picture("interleaved", "interleaved", 2, waits=3 * 3),
    Picture("zero-bubble", "zero-bubble", 1, waits=3 * 1),
)


class Part(nn.Module):
    """A part of a model, with a weight to give a gradient to."""

    def __init__(self, number: int, num_parts: int) -> None:
        super().__init__()
        self.is_first, self.is_last = number == 0, number == num_parts - 1
        self.weight = nn.Parameter(torch.eye(WIDTH))


def run_part(part: nn.Module, entering: Tensor, batch: dict[str, Tensor]) -> Tensor:
    assert isinstance(part, Part)
    stream = entering[..., None].expand(-1, -1, WIDTH).float() if part.is_first else entering
    leaving = stream @ part.weight
    return leaving.sum().reshape(1) if part.is_last else leaving


@contextmanager
def recorded(events: list[Event], unit: float) -> Iterator[None]:
    """Let all stages of this process note what they do, and take that long for it (seconds per unit)."""

    def noted(kind_of: Callable[..., str], units: dict[str, int], method: Callable[..., Any]) -> Callable[..., Any]:
        def run(stage: PipelineStage, microbatch: int, *args: Any, **kwargs: Any) -> Any:
            start, kind = time.monotonic(), kind_of(**kwargs)
            result = method(stage, microbatch, *args, **kwargs)
            if kind != "F" and not stage.has_backward:  # an evaluation, in which the call does nothing
                return result
            time.sleep(units[kind] * unit)
            events.append(Event(kind, stage.stage_index, microbatch, start, time.monotonic()))
            return result

        return run

    def backward_kind(*, full_backward: bool = True, **kwargs: Any) -> str:
        return "B" if full_backward else "I"

    kinds: dict[str, tuple[Callable[..., str], dict[str, int]]] = {
        "forward_one_chunk": (lambda **kwargs: "F", {"F": 1}),
        "backward_one_chunk": (backward_kind, {"B": 2, "I": 1}),
        "backward_weight_one_chunk": (lambda **kwargs: "W", {"W": 1}),
    }
    methods = {name: getattr(PipelineStage, name) for name in kinds}
    for name, (kind_of, units) in kinds.items():
        setattr(PipelineStage, name, noted(kind_of, units, methods[name]))
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(PipelineStage, name, method)


def events_on(rank: int, *, picture: Picture, unit: float, backward: bool = True) -> list[Event]:
    """What a rank did in one step, in order. Called on every stage."""
    num_parts = picture.stages * picture.parts
    numbers = [chunk * picture.stages + rank for chunk in range(picture.parts)]
    assert dist.group.WORLD is not None
    pipeline = Pipeline(
        {number: Part(number, num_parts) for number in numbers},
        run_part,
        num_parts=num_parts,
        schedule=picture.schedule,
        group=dist.group.WORLD,
        device=torch.device("cpu"),
        stream_shape=(2, WIDTH),
        stream_dtype=torch.float32,
        reduction=Replicated([], None, overlap=False),
        num_losses=1,
        sums_over=(),
    )
    batches = [{"tokens": torch.ones(1, 2, dtype=torch.int64)} for _ in range(picture.microbatches)]
    untimed = lambda name: nullcontext()  # noqa: E731 - timers that do not time
    # The first step connects the ranks.
    pipeline.run(batches, backward=backward, timers=untimed)
    events: list[Event] = []
    dist.barrier()
    with recorded(events, unit):
        pipeline.run(batches, backward=backward, timers=untimed)
    return events


def measure(picture: Picture, *, unit: float, backward: bool = True) -> list[list[Event]]:
    """The events of every stage in one step, on forked ranks."""
    return run_ranks(partial(events_on, picture=picture, unit=unit, backward=backward), picture.stages)


COLORS = {"F": ("#9ecae1", "#4292c6"), "B": ("#fdae6b", "#e6550d"), "I": ("#fdae6b", "#e6550d"), "W": ("#a1d99b",) * 2}
MEANING = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights"}
UNIT, ROW, LEFT, TOP = 22, 30, 64, 40  # pixels


def draw(picture: Picture, events: Sequence[Sequence[Event]], *, unit: float) -> str:
    """An SVG with one row per stage, time to the right; darker are the passes through a stage's second part."""
    began = min(event.start for stage in events for event in stage)
    ended = max(event.end for stage in events for event in stage)
    width, height = LEFT + (ended - began) / unit * UNIT + 20, TOP + ROW * len(events) + 34
    shapes = [f'<text x="8" y="22" font-size="15">{title(picture, events, unit=unit)}</text>']
    for row, stage in enumerate(events):
        y = TOP + row * ROW
        shapes.append(f'<text x="8" y="{y + 19}">stage {row}</text>')
        for event in stage:
            x, wide = LEFT + (event.start - began) / unit * UNIT, (event.end - event.start) / unit * UNIT
            color = COLORS[event.kind][event.part // picture.stages]
            shapes.append(
                f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{ROW - 4}" fill="{color}" stroke="white"/>'
                f'<text x="{x + wide / 2:.1f}" y="{y + 18}" text-anchor="middle">{event.microbatch}</text>'
            )
    x = float(LEFT)
    for kind in sorted({event.kind for stage in events for event in stage}):
        y = TOP + ROW * len(events) + 8
        shapes.append(f'<rect x="{x}" y="{y}" width="14" height="14" fill="{COLORS[kind][0]}"/>')
        shapes.append(f'<text x="{x + 20}" y="{y + 12}">{MEANING[kind]}</text>')
        x += 150
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" font-family="sans-serif"'
    return "\n".join(
        [f'{head} font-size="12">', '<rect width="100%" height="100%" fill="white"/>', *shapes, "</svg>\n"]
    )


def waiting(events: Sequence[Sequence[Event]]) -> float:
    """The share of the step in which the stages wait."""
    began = min(event.start for stage in events for event in stage)
    ended = max(event.end for stage in events for event in stage)
    busy = sum(event.end - event.start for stage in events for event in stage)
    return 1 - busy / ((ended - began) * len(events))


def most_kept(stage: Sequence[Event]) -> int:
    """Of how many microbatches a stage keeps activations at once, at most; each part of the model counts."""
    kept = most = 0
    for event in stage:
        kept += {"F": 1, "B": -1, "I": 0, "W": -1}[event.kind]
        most = max(most, kept)
    return most


def title(picture: Picture, events: Sequence[Sequence[Event]], *, unit: float) -> str:
    """What the picture shows, with the share of the step that is waiting, measured and as it should be."""
    expected = picture.waits / (picture.work + picture.waits)
    kept = max(most_kept(stage) for stage in events) / picture.parts
    waits = f"waits {waiting(events):.0%} of the step (by formula {expected:.0%})"
    return f"{picture.name}: {waits}, keeps activations of up to {kept:g} microbatches"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder for one SVG per schedule")
    parser.add_argument("--unit", type=float, default=0.05, help="seconds of a forward pass")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        events = measure(picture, unit=arguments.unit)
        print(title(picture, events, unit=arguments.unit))
        to = arguments.out / f"pipeline-{picture.name}.svg"
        to.write_text(draw(picture, events, unit=arguments.unit), encoding="utf-8")


if __name__ == "__main__":
    main()
