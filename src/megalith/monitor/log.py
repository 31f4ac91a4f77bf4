"""Everything a run says goes through here: one report, shown in the chosen form, kept whole in log.jsonl, drawn in
TensorBoard. Nothing that goes wrong in saying it reaches the training.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TextIO

from megalith.monitor.clean import clean_lines
from megalith.monitor.events import Event, StepDone, Warned
from megalith.monitor.outlet import JsonLines, Outlet, json_line, record_of
from megalith.monitor.progress import TerminalConsole
from megalith.monitor.reference import reference_lines
from megalith.monitor.scalars import Scalars
from megalith.terminal import printable

FORMATS = ("reference", "rich", "json")
MOST_WAITING = 256  # steps whose values are not yet read from the device


def choose_format(asked: str, stream: TextIO) -> str:
    """The form of the lines: as asked, or for auto rich on a terminal and else Megatron-LM's, which scripts parse.

    Raises ValueError for an unknown form.
    """
    if asked not in ("auto", *FORMATS):
        raise ValueError(f"log_format = {asked!r} is unknown: use auto, {', '.join(FORMATS)}")
    if asked == "auto":
        return "rich" if stream.isatty() else "reference"
    return asked


class Console(Protocol):
    """A way to show events to whoever watches the stream."""

    shows_details: bool  # bookkeeping that only Megatron-LM's form has

    def show(self, event: Event, now: float) -> None: ...
    def line(self, text: str) -> None: ...
    def close(self) -> None: ...


class LineConsole:
    """Each event as the lines that a function gives for it; none, if there is no function."""

    def __init__(
        self, outlet: Outlet, lines: Callable[[Event, float], list[str]] | None, *, shows_details: bool
    ) -> None:
        self.shows_details = shows_details
        self._outlet = outlet
        self._lines = lines

    def show(self, event: Event, now: float) -> None:
        for text in self._lines(event, now) if self._lines is not None else []:
            self.line(text)

    def line(self, text: str) -> None:
        if self._lines is not None:
            self._outlet.write(printable(text) + "\n")

    def close(self) -> None:
        """Nothing is open."""


def open_console(log_format: str, outlet: Outlet) -> Console:
    """The console of a format; rich is a bar only on a terminal that can move its cursor, and else plain lines."""
    if log_format == "reference":
        return LineConsole(outlet, reference_lines, shows_details=True)
    if log_format == "json":  # the records themselves go to the stream
        return LineConsole(outlet, None, shows_details=False)
    if outlet.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        return TerminalConsole(outlet)
    return LineConsole(outlet, lambda event, now: clean_lines(event), shows_details=False)


class RunLog:
    """What a run says: on one stream, in log.jsonl and in TensorBoard.

    log_format: reference, rich or json (see choose_format); raises ValueError for another. Only the rank that prints
    says anything; on others every method does nothing. clock gives Unix seconds. Use it as a context, or close it: the
    last steps may wait in memory.
    """

    def __init__(
        self,
        log_format: str,
        stream: TextIO,
        *,
        jsonl_path: Path | None = None,
        scalars: Scalars | None = None,
        is_printing_rank: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if log_format not in FORMATS:
            raise ValueError(f"log_format = {log_format!r} is unknown: use {', '.join(FORMATS)}")
        self._clock = clock
        self._outlet = Outlet(stream, self._stream_lost)
        self._file = JsonLines(jsonl_path, self._file_lost) if jsonl_path is not None else None
        self._scalars = scalars
        self._as_json = log_format == "json"
        self._console = open_console(log_format, self._outlet) if is_printing_rank else None
        self._waiting: list[tuple[float, StepDone]] = []
        self._step: int | None = None

    @property
    def speaks(self) -> bool:
        """Whether anything that is said here is heard."""
        return self._console is not None

    def line(self, text: str, *, detail: bool = False) -> None:
        """Say a text; each of its lines is one line. A detail is bookkeeping that only Megatron-LM's form shows."""
        if self._console is None:
            return
        self._settle()
        for part in text.split("\n"):
            self._record({"event": "line", "time": self._clock(), "step": self._step, "text": part})
            if self._console.shows_details or not detail:
                self._console.line(part)

    def report(self, event: Event) -> None:
        """Say that something happened.

        The values of a step are read from the device only when something else is reported, so that no step waits for
        the one before it; until then its record waits too.
        """
        if self._console is None:
            return
        now = self._clock()
        if isinstance(event, StepDone):
            self._step = event.step
            self._waiting.append((now, event))
        if not isinstance(event, StepDone) or len(self._waiting) >= MOST_WAITING:
            self._settle()
        if not isinstance(event, StepDone):
            self._keep(event, now)
        self._console.show(event, now)

    def _settle(self) -> None:
        """Write down the steps that wait."""
        waiting, self._waiting = self._waiting, []
        for then, step in waiting:
            self._keep(step, then)

    def _keep(self, event: Event, now: float) -> None:
        if self._file is not None or self._as_json:
            self._record(record_of(event, time=now, step=self._step))
        if self._scalars is not None:
            self._scalars.report(event, now, self._scalars_lost)

    def _record(self, record: Mapping[str, object]) -> None:
        line = json_line(record)
        if self._file is not None:
            self._file.write(line)
        if self._as_json:
            self._outlet.write(line + "\n")

    def _stream_lost(self, reason: str) -> None:
        """Say so in the file, or for want of one on the error stream."""
        text = f"the run's output is lost, training goes on: {reason}"
        if self._file is not None:
            self._file.write(self._warning(text))
        else:
            Outlet(sys.stderr, lambda reason: None).write(printable(f"warning: {text}") + "\n")

    def _file_lost(self, reason: str) -> None:
        assert self._file is not None and self._console is not None
        text = f"{self._file.path} is not written, training goes on: {reason}"
        self._console.show(Warned(text), self._clock())
        if self._as_json:
            self._outlet.write(self._warning(text) + "\n")

    def _scalars_lost(self, reason: str) -> None:
        assert self._scalars is not None and self._console is not None
        text = f"TensorBoard's files in {self._scalars.directory} are not written any more, training goes on: {reason}"
        self._record(record_of(Warned(text), time=self._clock(), step=self._step))
        self._console.show(Warned(text), self._clock())

    def _warning(self, text: str) -> str:
        return json_line(record_of(Warned(text), time=self._clock(), step=self._step))

    def close(self) -> None:
        """Write down what waits, and leave the terminal as it was. Nothing can be said afterwards."""
        if self._console is None:
            return
        self._settle()
        if self._scalars is not None:
            self._scalars.close(self._clock(), self._scalars_lost)
        self._console.close()
        self._console = None
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
