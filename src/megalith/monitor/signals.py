"""Stopping a run from outside: a first SIGTERM, SIGINT or SIGUSR1 asks for a stop after the step, a second stops now.

A handler writes the signal down and says at once what will happen; the train loop looks at it between steps, a start
between its parts, and both agree with the other ranks.

One request may arrive twice: a scheduler or a terminal signals every process of a job, and the launcher hands on what
it got. So what follows within a second is the same request.
"""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Self

from megalith.launch import SECONDS_OF_ONE_REQUEST

WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """While entered, the watched signals set `received` instead of ending the process; a second one ends it at once.

    effect: what the first one does, to be said by the process that speaks for all; it changes as the run comes along.
    """

    def __init__(self, effect: str = "", *, speaks: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.received: signal.Signals | None = None
        self.effect = effect
        self._speaks = speaks
        self._at = 0.0
        self._clock = clock
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
        if self.received is None:
            self.received, self._at = signal.Signals(number), self._clock()
            if self._speaks:
                said = f"megalith: {self.received.name}: {self.effect}; a second signal ends it at once\n"
                # Not by print, which may be in the middle of a line.
                with suppress(OSError):
                    os.write(2, said.encode())
        elif self._clock() - self._at > SECONDS_OF_ONE_REQUEST:
            # What was committed is whole whatever happens now; nothing here may wait.
            os._exit(128 + number)
