"""Stopping a run from outside: a first SIGTERM, SIGINT or SIGUSR1 asks for a stop after the step, a second stops now.

A handler only writes the signal down; the train loop looks at it between steps and agrees with the other ranks.
"""

import os
import signal
from types import FrameType, TracebackType
from typing import Self

WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """While entered, the watched signals set `received` instead of ending the process; a second one ends it at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in WATCHED:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            # What was committed is whole whatever happens now; nothing here may wait.
            os._exit(128 + number)
        self.received = signal.Signals(number)
