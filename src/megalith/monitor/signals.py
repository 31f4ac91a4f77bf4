"""Stopping a run from outside: a first SIGTERM, SIGINT, SIGUSR1 or SIGHUP (a terminal that goes away) asks for a stop
after the step, a second stops now.
One that comes before there is anything to finish ends the process by itself, with the status of a stopped run.

A handler writes the signal down and says at once what will happen; the train loop looks at it between steps, a start
between its parts, and both agree with the other ranks.

One request may arrive twice: a scheduler or a terminal signals every process of a job, and the launcher hands on what
it got. So what follows within a second is the same request.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType, TracebackType
from typing import Self

from megalith.launch import SECONDS_OF_ONE_REQUEST, STOPPING, handled, heard
from megalith.terminal import say

STOPPED_BY_SIGNAL = 75  # saved, or there was nothing to save yet; the same command goes on
STOPPED_UNSAVED = 76  # a signal stopped a run that has no --save


def stopped_status(*, saves: bool) -> int:
    """What a run ends with that a signal stopped; saves: whether it has a directory for that."""
    return STOPPED_BY_SIGNAL if saves else STOPPED_UNSAVED


@contextmanager
def ending_at_once(status: int, *, speaks: bool) -> Iterator[None]:
    """While entered, the watched signals end the process with this status, as nothing has been begun; `StopSignals` may
    take them over meanwhile. What waited, because a launcher has blocked it, comes now.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if speaks:
            say(f"{signal.Signals(number).name}: the run ends before its first step")
        os._exit(status)

    with handled(heard(), end):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        yield


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
        self._handling = ExitStack()

    def __enter__(self) -> Self:
        self._handling.enter_context(handled(heard(), self._note))
        return self

    @contextmanager
    def doing(self, effect: str) -> Iterator[None]:
        """While entered, a signal has this effect."""
        before, self.effect = self.effect, effect
        try:
            yield
        finally:
            self.effect = before

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handling.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._at = signal.Signals(number), self._clock()
            if self._speaks:
                say(f"{self.received.name}: {self.effect}; a second signal ends it at once")
        elif self._clock() - self._at > SECONDS_OF_ONE_REQUEST:
            # What was committed is whole whatever happens now; nothing here may wait.
            os._exit(128 + number)
