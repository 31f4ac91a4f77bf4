"""Named timers, by Megatron-LM's names and in its order.

Work on a GPU runs on after the call that started it has returned, so a timer measures it only if the device is
synchronized at both ends. That costs speed: it is done only if a `synchronize` is given.
"""

import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

# The order of the timers line of a step. optimizer contains the four before it. forward-backward, which Megatron-LM of
# 2021 lacks, is the whole schedule of a pipeline; without one forward and backward passes are timed apart.
STEP_TIMERS = (
    "forward-compute",
    "forward-recv",
    "forward-send",
    "forward-backward-send-forward-backward-recv",
    "backward-compute",
    "backward-recv",
    "backward-send",
    "backward-send-forward-recv",
    "backward-send-backward-recv",
    "forward-backward",
    "backward-params-all-reduce",
    "backward-embedding-all-reduce",
    "optimizer-copy-to-main-grad",
    "optimizer-unscale-and-check-inf",
    "optimizer-clip-main-grad",
    "optimizer-copy-main-to-model-params",
    "optimizer",
    "batch-generator",
    "checkpoint-stall",  # that a step waited for the copy of a checkpoint, or for the end of the one before
)
SETUP_TIMERS = ("model-and-optimizer-setup", "train/valid/test-data-iterators-setup")


class Timer:
    """A stopwatch: runs while entered, adds up, gives the sum of its seconds."""

    def __init__(self, name: str, synchronize: Callable[[], None], clock: Callable[[], float]) -> None:
        self.name = name
        self._synchronize = synchronize
        self._clock = clock
        self._sum = 0.0
        self._started: float | None = None

    @property
    def runs(self) -> bool:
        return self._started is not None

    def start(self) -> None:
        assert self._started is None, f"timer {self.name} runs already"
        self._synchronize()
        self._started = self._clock()

    def stop(self) -> None:
        assert self._started is not None, f"timer {self.name} does not run"
        self._synchronize()
        self._sum += self._clock() - self._started
        self._started = None

    def elapsed(self, *, reset: bool) -> float:
        """Seconds counted so far; a running timer goes on running. With reset, counting begins anew."""
        running = self._started is not None
        if running:
            self.stop()
        total = self._sum
        if reset:
            self._sum = 0.0
        if running:
            self.start()
        return total

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Timers:
    """The timers by name; one exists from its first use on.

    synchronize: returns when the device has done its work, as torch.cuda.synchronize does; None: only the host is
    timed.
    """

    def __init__(
        self, synchronize: Callable[[], None] | None = None, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._synchronize = synchronize or (lambda: None)
        self._clock = clock
        self._timers: dict[str, Timer] = {}

    def __call__(self, name: str) -> Timer:
        """The timer of that name: `with timers("optimizer"): ...`."""
        if name not in self._timers:
            self._timers[name] = Timer(name, self._synchronize, self._clock)
        return self._timers[name]

    def running(self) -> list[str]:
        """The timers that run now, in the order of their first use; any thread may ask."""
        return [timer.name for timer in list(self._timers.values()) if timer.runs]

    def elapsed(self, names: Iterable[str], *, reset: bool = True) -> dict[str, float]:
        """Seconds of those timers among names that have been used, in the order of names."""
        return {name: self._timers[name].elapsed(reset=reset) for name in names if name in self._timers}
