"""What is seen of `megalith preprocess` while it runs, on standard error: a bar on a terminal, else plain lines."""

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from rich.progress import TaskID

SECONDS_BETWEEN_LINES = 1.0


@dataclass(frozen=True)
class Amount:
    """How much is done. num_bytes: of text; num_read and num_total: of the input files as they lie on the disk."""

    documents: int = 0
    tokens: int = 0
    num_bytes: int = 0
    num_read: int = 0
    num_total: int | None = None

    def rates(self, seconds: float) -> str:
        seconds = max(seconds, 1e-9)
        return (
            f"{self.documents / seconds:,.0f} documents/s, {self.tokens / seconds:,.0f} tokens/s, "
            f"{self.num_bytes / seconds / 1e6:.1f} MB/s"
        )

    def time_left(self, seconds: float) -> str:
        """How long the rest takes at the rate so far; empty where the total is not known."""
        if not self.num_total or not self.num_read:
            return ""
        left = seconds * max(self.num_total - self.num_read, 0) / self.num_read
        minutes, rest = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{rest:02} left"


class Progress(Protocol):
    """Shows how far the work is; told after every block."""

    def show(self, amount: Amount) -> None: ...


def open_progress(log_interval: int, *, quiet: bool = False) -> AbstractContextManager[Progress]:
    """A bar if standard error is a terminal, else a line each time log_interval more documents are done."""
    if quiet:
        return nullcontext(_Silent())
    return _Bar() if sys.stderr.isatty() else nullcontext(_Lines(log_interval))


class _Silent:
    def show(self, amount: Amount) -> None:
        return None


class _Lines:
    def __init__(self, log_interval: int) -> None:
        self._log_interval = log_interval
        self._begin = self._last = time.monotonic()
        self._next = log_interval

    def show(self, amount: Amount) -> None:
        now = time.monotonic()
        if amount.documents < self._next or now - self._last < SECONDS_BETWEEN_LINES:
            return
        seconds = now - self._begin
        rates = ", ".join(part for part in (amount.rates(seconds), amount.time_left(seconds)) if part)
        print(f"Processed {amount.documents} documents ({rates})", file=sys.stderr, flush=True)
        self._last = now
        self._next = (amount.documents // self._log_interval + 1) * self._log_interval


class _Bar:
    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        columns = (TextColumn("tokenizing"), BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task: TaskID = self._bar.add_task("", total=None)
        self._begin = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, amount: Amount) -> None:
        seconds = time.monotonic() - self._begin
        parts = (f"{amount.documents:,} documents", amount.rates(seconds), amount.time_left(seconds))
        description = ", ".join(part for part in parts if part)
        self._bar.update(self._task, description=description, completed=amount.num_read, total=amount.num_total)
