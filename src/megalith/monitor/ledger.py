"""Where the time of a run went: every nanosecond since it began is booked once, so the entries add up to the whole.

The ledger is kept in the run directory while the run goes on, and in each checkpoint. A run that goes on from a
checkpoint books the steps since then as redone, for they are done again, and the time in which it did not run as
interrupted. Only clocks that cannot be set measure; the calendar is asked only across a restart of the machine.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megalith.files import DISK, Disk, Location, write_whole

# What time is spent on; "other" is whatever nobody claimed.
ACCOUNTS = ("startup", "data", "step", "check", "evaluation", "checkpoint", "other", "redone", "interrupted")
# What is lost with the steps that are done again; the rest is the price of being able to.
LOST_WITH_STEPS = ("data", "step", "check", "evaluation", "other")
SHOWN = {"startup": "start-up", "step": "steps", "check": "checks", "checkpoint": "checkpoints"}
NANOSECONDS = 1_000_000_000
FILE_NAME = "ledger.json"
LARGEST_FILE = 1 << 16  # bytes
SECONDS_BETWEEN_WRITES = 5.0
SHARE_OF_WRITES = 0.01  # of the time, at most


def since_boot() -> tuple[str, int]:
    """Which boot of which machine this is, and nanoseconds since; ("", 0) where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    except OSError:
        return "", 0


class Ledger:
    """Books time to one account at a time, from its making on; it begins with startup.

    clock gives nanoseconds that only grow, calendar nanoseconds since 1970, boot what `since_boot` does. age: seconds
    that the process has lived before, which are booked too.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], int] = time.perf_counter_ns,
        calendar: Callable[[], int] = time.time_ns,
        boot: Callable[[], tuple[str, int]] = since_boot,
        age: float = 0.0,
    ) -> None:
        self._clock, self._calendar, self._boot = clock, calendar, boot
        self._spent = dict.fromkeys(ACCOUNTS, 0)
        self.account = "startup"  # the open one
        self.moves = 0  # how often another was opened, or `move` called
        before = int(age * NANOSECONDS)
        self._since = clock() - before
        machine, booted = boot()
        self._started, self._machine, self._booted = calendar() - before, machine, booted - before

    def switch(self, account: str) -> str:
        """Book what follows to account; give the account that was open. Raises ValueError for an unknown one."""
        if account not in self._spent:
            raise ValueError(f"account = {account!r} is unknown: use one of {', '.join(ACCOUNTS)}")
        now = self._clock()
        self._spent[self.account] += now - self._since
        self._since = now
        before, self.account = self.account, account
        self.moves += 1
        return before

    def move(self) -> None:
        """Note that the run goes on, within the same account."""
        self.moves += 1

    @contextmanager
    def spend(self, account: str) -> Iterator[None]:
        """Book the time inside to account; time spent inside that on another account is not counted twice."""
        before = self.switch(account)
        try:
            yield
        finally:
            self.switch(before)

    def seconds(self) -> dict[str, float]:
        """What each account holds now, earlier starts included; their sum is the time since the run first began."""
        self.switch(self.account)
        return {account: spent / NANOSECONDS for account, spent in self._spent.items()}

    def total(self) -> float:
        """Seconds since the run first began."""
        self.switch(self.account)
        return sum(self._spent.values()) / NANOSECONDS

    def state(self, *, ended: bool = False) -> dict[str, Any]:
        """What a checkpoint and the run directory keep, as JSON values. ended: what follows is no interruption."""
        self.switch(self.account)
        machine, booted = self._boot()
        at = {"saved": self._calendar(), "machine": machine, "booted": booted}
        return {"spent": dict(self._spent), "ended": ended, **at}

    def restore(self, checkpoint: Mapping[str, Any] | None, last: Mapping[str, Any] | None = None) -> None:
        """Take over the accounts of the starts before; call it once.

        checkpoint: the state in the checkpoint from which the run goes on, None if it starts anew. last: the newest
        state, from the run directory; what it has of work beyond the checkpoint is redone. Accounts that this version
        does not know go to other.
        """
        kept = _accounts(checkpoint)
        newest, reached = checkpoint, kept
        if last is not None and sum(_accounts(last).values()) >= sum(kept.values()):
            newest, reached = last, _accounts(last)
            lost = {name: max(0, reached[name] - kept[name]) for name in LOST_WITH_STEPS}
            reached = {name: spent - lost.get(name, 0) for name, spent in reached.items()}
            reached["redone"] += sum(lost.values())
        for account, spent in reached.items():
            self._spent[account] += spent
        if newest is not None and not newest.get("ended", False):
            self._spent["interrupted"] += max(0, self._gap(newest))

    def go_back(self, checkpoint: Mapping[str, Any]) -> None:
        """The run goes on from a checkpoint of its own while it runs: what it did since is redone.

        checkpoint: the state in the checkpoint.
        """
        self.switch(self.account)
        kept = _accounts(checkpoint)
        for name in LOST_WITH_STEPS:
            lost = max(0, self._spent[name] - kept[name])
            self._spent[name] -= lost
            self._spent["redone"] += lost

    def _gap(self, state: Mapping[str, Any]) -> int:
        """Nanoseconds from when a state was written to when this process began."""
        if self._machine and state.get("machine") == self._machine:
            return self._booted - int(state["booted"])
        return self._started - int(state["saved"])

    def told(self) -> str:
        """One line: the whole, its parts, and the share of it in which the run went forward for good."""
        seconds = self.seconds()
        total = sum(seconds.values())
        parts = ", ".join(f"{SHOWN.get(name, name)} {spent:.1f}" for name, spent in seconds.items() if spent >= 0.05)
        share = 100.0 * seconds["step"] / total if total > 0 else 0.0
        return f"wall time {total:.1f} s: {parts}; effective training time {share:.1f} %"


def _accounts(state: Mapping[str, Any] | None) -> dict[str, int]:
    """The nanoseconds of a state by the accounts of this version."""
    accounts = dict.fromkeys(ACCOUNTS, 0)
    for account, spent in (state or {"spent": {}})["spent"].items():
        accounts[account if account in accounts else "other"] += int(spent)
    return accounts


class LedgerFile:
    """The ledger in the run directory, whole at any moment; written rarely enough to cost a hundredth of the time.

    A disk that fails does not stop the run: then a restart knows the ledger of its checkpoint only.
    """

    def __init__(self, run_dir: Location, *, disk: Disk = DISK, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = Path(run_dir) / FILE_NAME
        self._disk, self._clock = disk, clock
        self._next = clock()

    def read(self) -> dict[str, Any] | None:
        """The state that was written last; None if there is none, or none that can be read."""
        try:
            # The disk opens a named pipe without waiting for its writer.
            with os.fdopen(self._disk.open(self.path), "rb") as file:
                state = json.loads(file.read(LARGEST_FILE))
            _accounts(state)
            return {**state, "saved": int(state["saved"]), "booted": int(state["booted"])}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            return None

    def finished_step(self) -> int | None:
        """The last step of the run, if it was written that nothing is left to do after it."""
        finished = (self.read() or {}).get("finished")
        return finished if isinstance(finished, int) else None

    def write_if_due(self, ledger: Ledger) -> None:
        if self._clock() >= self._next:
            self.write(ledger)

    def write(self, ledger: Ledger, *, ended: bool = False, finished: int | None = None) -> None:
        """finished: the last step of a run of which nothing is left to do."""
        began = self._clock()
        with suppress(OSError):
            state = {**ledger.state(ended=ended), "finished": finished}
            write_whole(self.path, json.dumps(state) + "\n", disk=self._disk)
        now = self._clock()
        self._next = now + max(SECONDS_BETWEEN_WRITES, (now - began) / SHARE_OF_WRITES)
