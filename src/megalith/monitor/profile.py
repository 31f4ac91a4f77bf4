"""--profile: where a few steps spend time and memory, as a Chrome trace, a memory snapshot and one screen of text.

The steps are traced by torch.profiler, which slows them; nothing is traced before or after.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalith.files import write_whole

if TYPE_CHECKING:
    import torch

COSTLIEST = 10  # rows of the summary
TRACE = "trace.json"
MEMORY = "memory.json"  # of the CPU's operations
SNAPSHOT = "memory.pickle"  # of a CUDA device
SUMMARY = "summary.txt"


@dataclass(frozen=True)
class Cost:
    """What an operation took over the traced steps."""

    name: str
    seconds: float  # of its own, without what it called; on the device if there is one
    calls: int
    bytes_taken: int  # memory it took and did not give back itself


class Profile:
    """Traces the steps first to last (numbered from 1) and writes what it saw into a folder.

    Call before_step and after_step around every step; both return at once outside of those steps. Call close when no
    step follows: what was traced of steps that a run did not get through is written, too. tell: takes the lines of the
    summary.
    """

    def __init__(
        self, folder: Path, device: "torch.device", *, first: int, last: int, tell: Callable[[str], None]
    ) -> None:
        self.folder = folder
        self._device = device
        self._first, self._last = first, last
        self._tell = tell
        self._tracer: Any = None
        self._traced: list[int] = []  # the steps that were done while it ran
        self._is_written = False

    def before_step(self, step: int) -> None:
        """Begin with the first of the steps, or where a resumed run goes on among them."""
        if self._tracer is None and not self._is_written and self._first <= step <= self._last:
            self._start()

    def after_step(self, step: int) -> None:
        """End with the last of them, and write."""
        if self._tracer is None:
            return
        self._traced.append(step)
        if step >= self._last:
            self.close()

    def close(self) -> None:
        """End now and write what was traced, or say that no step was."""
        if self._tracer is None:
            if not self._is_written:
                self._tell(f"--profile: nothing was traced, for no step from {self._first} to {self._last} was taken")
            return
        tracer, self._tracer = self._tracer, None
        self._synchronize()
        tracer.__exit__(None, None, None)
        self._is_written = True
        try:
            self._write(tracer)
        except OSError as error:
            # The training that was looked at is worth more than what was seen.
            self._tell(f"WARNING: {error.filename or self.folder}: {error.strerror}: what was traced is lost")
        finally:
            if self._device.type == "cuda":
                import torch

                torch.cuda.memory._record_memory_history(enabled=None)

    def _start(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            import torch

            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=100_000)
        self._synchronize()
        # acc_events: torch 2.11 and 2.12 warn without it, though there is one cycle only.
        self._tracer = profile(activities=activities, profile_memory=True, acc_events=True)
        self._tracer.__enter__()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)

    def _write(self, tracer: Any) -> None:
        costs = costs_of(tracer.key_averages(), on_device=self._device.type == "cuda")
        text = summary(costs, steps=self._traced)
        for line in text.splitlines():
            self._tell(line)
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f".{TRACE}"
        tracer.export_chrome_trace(str(unfinished))
        unfinished.replace(self.folder / TRACE)
        self._write_memory(costs)
        write_whole(self.folder / SUMMARY, text + "\n")
        self._tell(f"the trace lies in {self.folder / TRACE} (open it at chrome://tracing or ui.perfetto.dev)")

    def _write_memory(self, costs: Sequence[Cost]) -> None:
        """Of a CUDA device every block and when and where it was taken, as torch's viewer wants it (memory_viz), which
        takes pickles alone; else the bytes by operation.
        """
        if self._device.type == "cuda":
            import torch

            unfinished = self.folder / f".{SNAPSHOT}"
            torch.cuda.memory._dump_snapshot(str(unfinished))
            unfinished.replace(self.folder / SNAPSHOT)
            self._tell(f"memory lies in {self.folder / SNAPSHOT} (open it at pytorch.org/memory_viz)")
            return
        taken = {cost.name: cost.bytes_taken for cost in costs}
        by_bytes = {name: count for name, count in sorted(taken.items(), key=lambda item: -item[1]) if count}
        write_whole(self.folder / MEMORY, json.dumps({"bytes_taken": by_bytes}))


def costs_of(averages: Iterable[Any], *, on_device: bool) -> list[Cost]:
    """The operations, costliest first; of a device the kernels alone, whose time what starts them has once more."""
    costs = [
        Cost(
            name=str(event.key),
            seconds=(event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6,
            calls=int(event.count),
            bytes_taken=int(event.self_device_memory_usage if on_device else event.self_cpu_memory_usage),
        )
        for event in averages
        if not on_device or not (event.device_type.name == "CPU" or event.is_user_annotation)
    ]
    return sorted(costs, key=lambda cost: -cost.seconds)


def summary(costs: list[Cost], *, steps: Sequence[int]) -> str:
    """The costliest operations on one screen."""
    total = sum(cost.seconds for cost in costs)
    num_steps = len(steps)
    which = f"steps {min(steps)} to {max(steps)}"
    lines = [f"the {COSTLIEST} costliest of {which} (operations by themselves, seconds of one step):"]
    for cost in costs[:COSTLIEST]:
        share = 100 * cost.seconds / total if total else 0.0
        lines.append(
            f"  {share:5.1f} %  {cost.seconds / num_steps:9.4f} s  {cost.calls // num_steps:6} calls  {cost.name[:72]}"
        )
    rest = sum(cost.seconds for cost in costs[COSTLIEST:])
    lines.append(f"  {100 * rest / total if total else 0.0:5.1f} %  {rest / num_steps:9.4f} s  the rest")
    return "\n".join(lines)
