"""The bar at the bottom of a terminal: where training stands, what it yields, how fast it goes, how long it takes yet.

It is drawn when a step is reported, at most every REFRESH_SECONDS; there is no drawing thread, which the forks of data
workers would not survive. The loss shown is read from the device only when the bar is drawn.
"""

from typing import TYPE_CHECKING, Any, TextIO, cast

from megalith.monitor.clean import clean_lines, duration, rates
from megalith.monitor.events import Event, IntervalDone, RunEnded, StepDone, TrainingStarted
from megalith.monitor.flops import throughput
from megalith.monitor.outlet import Outlet
from megalith.terminal import printable

if TYPE_CHECKING:
    from rich.progress import Progress

REFRESH_SECONDS = 0.2
WIDE = 120  # characters of a terminal on which the long bar has room
BAR_WIDTH = 20
NARROW_BAR_WIDTH = 10
MEMORY = 0.9  # weight of the past in the smoothed speed, per step


class Pace:
    """The speed of the last steps, smoothed: of each figure the average over steps, later ones counting more."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0.0
        self.flops = 0.0
        self._weight = 0.0

    def add(self, step: StepDone) -> None:
        self._weight = MEMORY * self._weight + 1.0
        for name, value in (
            ("seconds", step.seconds),
            ("tokens", float(step.num_tokens)),
            ("flops", step.model_flops or 0.0),
        ):
            before = getattr(self, name)
            setattr(self, name, before + (value - before) / self._weight)


class TerminalConsole:
    """Lines above, a bar below. Colours follow NO_COLOR and TERM."""

    shows_details = False

    def __init__(self, outlet: Outlet) -> None:
        from rich.console import Console

        self._console = Console(file=cast(TextIO, outlet), highlight=False, markup=False, emoji=False)
        self._progress: Progress | None = None
        self._task: Any = None
        self._started: TrainingStarted | None = None
        self._pace = Pace()
        self._drawn = 0.0

    def show(self, event: Event, now: float) -> None:
        if isinstance(event, StepDone):
            self._advance(event, now)
            return
        if isinstance(event, RunEnded):
            self.close()
        if not isinstance(event, IntervalDone):  # the bar says it
            for text in clean_lines(event):
                self.line(text)
        if isinstance(event, TrainingStarted):
            self._open(event)

    def line(self, text: str) -> None:
        self._console.print(printable(text), soft_wrap=True)

    def _open(self, started: TrainingStarted) -> None:
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self._started = started
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=BAR_WIDTH if self._console.width >= WIDE else NARROW_BAR_WIDTH),
            TextColumn("{task.fields[figures]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=self._console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        steps = max(1, started.last_step - started.step)
        self._task = self._progress.add_task(place(started.step, started.last_step), total=steps, figures="")
        self._progress.start()

    def _advance(self, step: StepDone, now: float) -> None:
        self._pace.add(step)
        if self._progress is None or self._started is None:
            return
        if now - self._drawn < REFRESH_SECONDS and step.step < self._started.last_step:
            return
        self._drawn = now
        description = place(step.step, self._started.last_step)
        bar = BAR_WIDTH if self._console.width >= WIDE else NARROW_BAR_WIDTH
        room = self._console.width - len(description) - bar - 2  # a blank on either side of the bar
        self._progress.update(
            self._task,
            completed=step.step - self._started.step,
            description=description,
            figures=fitted([(weight, printable(text)) for weight, text in self._figures(step, self._started)], room),
        )
        self._progress.refresh()

    def _figures(self, step: StepDone, started: TrainingStarted) -> list[tuple[int, str]]:
        """What stands beside the bar, each with its weight: the lighter goes first where there is no room."""
        losses = [f"{name} skipped" if step.skipped else f"{name} {float(x):.4f}" for name, x in step.losses.items()]
        speed = throughput(
            self._pace.tokens,
            self._pace.seconds,
            model_flops=None if step.model_flops is None else self._pace.flops,
            num_devices=started.num_devices,
            peak_flops=started.peak_flops,
        )
        left = duration(self._pace.seconds * (started.last_step - step.step))
        shown = rates(speed.tokens_per_second, speed.tflops_per_device, speed.mfu)
        return [
            *((9 - number, text) for number, text in enumerate(losses)),
            (1, f"lr {step.learning_rate:.2e}"),
            *zip((4, 2, 3), shown, strict=False),
            (10, f"left {left}"),
        ]

    def close(self) -> None:
        """Leave the bar as it stands, and the cursor below it."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def fitted(figures: list[tuple[int, str]], room: int) -> str:
    """The texts, in their order, of those figures that fit into room characters; the lightest are left out first."""
    kept = list(figures)
    while len(kept) > 1 and len(" | ".join(text for _, text in kept)) > room:
        kept.remove(min(kept))
    return " | ".join(text for _, text in kept)


def place(step: int, last_step: int) -> str:
    return f"step {step:,}/{last_step:,}"
