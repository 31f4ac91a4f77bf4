"""Where the time of a run went: every nanosecond since it began is booked once, so the entries add up to the whole.

The state goes into each checkpoint. When a run goes on from one, the time from the saving of that checkpoint to the new
start is booked as interrupted: work lost and work not done; the earlier entries are kept.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# What time is spent on; "other" is whatever nobody claimed.
ACCOUNTS = ("startup", "data", "step", "evaluation", "checkpoint", "other", "interrupted")
NANOSECONDS = 1_000_000_000


class Ledger:
    """Books time to one account at a time, from its making on; it begins with startup.

    clock gives nanoseconds that only grow, calendar nanoseconds since 1970.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], int] = time.perf_counter_ns,
        calendar: Callable[[], int] = time.time_ns,
    ) -> None:
        self._clock = clock
        self._calendar = calendar
        self._spent = dict.fromkeys(ACCOUNTS, 0)
        self._account = "startup"
        self._since = clock()
        self._started = calendar()

    def switch(self, account: str) -> str:
        """Book what follows to account; give the account that was open. Raises ValueError for an unknown one."""
        if account not in self._spent:
            raise ValueError(f"account = {account!r} is unknown: use one of {', '.join(ACCOUNTS)}")
        now = self._clock()
        self._spent[self._account] += now - self._since
        self._since = now
        before, self._account = self._account, account
        return before

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
        self.switch(self._account)
        return {account: spent / NANOSECONDS for account, spent in self._spent.items()}

    def total(self) -> float:
        """Seconds since the run first began."""
        self.switch(self._account)
        return sum(self._spent.values()) / NANOSECONDS

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        self.switch(self._account)
        return {"spent": dict(self._spent), "saved": self._calendar()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the accounts of a checkpoint, and book the time from its saving to this start as interrupted.

        Accounts that this version does not know go to other. A calendar that was set back counts as no time.
        """
        for account, spent in state["spent"].items():
            self._spent[account if account in self._spent else "other"] += int(spent)
        self._spent["interrupted"] += max(0, self._started - int(state["saved"]))
