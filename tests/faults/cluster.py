"""Runs of the command on forked ranks, as its launcher starts and ends them, for campaigns of hundreds of runs.

The ranks are forked from this process, which has imported everything, and call the command's own `main`. They meet and
watch each other through the launcher's anonymous memory; once a rank is lost, the others get the launcher's second to
end by themselves, and are killed.
"""

import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch

import tests.early  # noqa: F401 - for its effect
from megalith import cli
from megalith.launch import ALL_END_SO, PEER_LOST, SECONDS_TO_FOLLOW, end_with_parent, rank_environment
from tests.faults.disk import Disturbance, undisturbed

RAISED = 1  # what Python ends with when nothing caught an exception
LONGEST_RUN = 60.0  # seconds; a whole run takes about one


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    statuses: tuple[int, ...]  # of the ranks; negative for a signal
    killed: frozenset[int]  # the ranks that did not end by themselves
    said: str  # on the error streams
    hung: bool = False  # and was killed for that

    @property
    def status(self) -> int:
        """What the launcher would end with, or nearly: that of a rank that ended by itself and followed no other."""
        own = [status for rank, status in enumerate(self.statuses) if status and rank not in self.killed]
        causes = [status for status in own if status != PEER_LOST] or own
        return next(iter(causes), -signal.SIGKILL if self.killed else 0)

    @property
    def raised(self) -> bool:
        """Whether a rank ended with a traceback."""
        return RAISED in self.statuses or "Traceback (most recent call last)" in self.said


@dataclass
class _Ranks:
    """The ranks of a run that is going on."""

    pids: list[int]
    statuses: dict[int, int] = field(default_factory=dict)
    killed: set[int] = field(default_factory=set)
    kill_at: float | None = None

    @property
    def running(self) -> list[int]:
        return [rank for rank in range(len(self.pids)) if rank not in self.statuses]

    def kill(self) -> None:
        for rank in self.running:
            os.kill(self.pids[rank], signal.SIGKILL)
            self.killed.add(rank)


def run_ranks(
    words: Sequence[str],
    world_size: int,
    folder: Path,
    *,
    disturb: Disturbance = undisturbed,
    kill_after: Callable[[float], Sequence[int]] | None = None,
    follow: float = SECONDS_TO_FOLLOW,
    limit: float = LONGEST_RUN,
) -> Ended:
    """Run `megalith` with these words on that many ranks; folder: for what they say.

    disturb: called on each rank before the command. kill_after: asked every few milliseconds, with the seconds since
    the start, for ranks to kill. follow: seconds that the others have once a rank is lost.
    """
    memory = [os.memfd_create(name) for name in ("megalith-store", "megalith-board")]
    errors = os.open(folder / "errors", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    ranks = _Ranks([])
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            _be_rank(words, rank, world_size, memory, errors, disturb)
        ranks.pids.append(pid)
    try:
        hung = _wait(ranks, kill_after, follow=follow, limit=limit)
        said = os.pread(errors, 1 << 20, 0).decode(errors="replace")
    finally:
        ranks.kill()
        for rank in ranks.running:
            os.waitpid(ranks.pids[rank], 0)
        for descriptor in (*memory, errors):
            os.close(descriptor)
    statuses = tuple(ranks.statuses[rank] for rank in range(world_size))
    return Ended(statuses, frozenset(ranks.killed), said, hung)


def _wait(ranks: _Ranks, kill_after: Callable[[float], Sequence[int]] | None, *, follow: float, limit: float) -> bool:
    """Return when all ranks have ended; whether that took too long."""
    started = time.monotonic()
    hung = False
    poll = select.poll()
    handles = {os.pidfd_open(pid): rank for rank, pid in enumerate(ranks.pids)}
    for handle in handles:
        poll.register(handle, select.POLLIN)
    while ranks.running:
        now = time.monotonic()
        if now - started > limit:
            hung = True
        if hung or (ranks.kill_at is not None and now >= ranks.kill_at):
            ranks.kill()
        for rank in kill_after(now - started) if kill_after is not None else ():
            if rank in ranks.running:
                os.kill(ranks.pids[rank], signal.SIGKILL)
        until = min(started + limit, ranks.kill_at or now + limit) - now
        wait = 0.002 if kill_after is not None else max(0.001, until)
        for handle, _ in poll.poll(1000 * wait):
            rank = handles[handle]
            poll.unregister(handle)
            os.close(handle)
            status = os.waitstatus_to_exitcode(os.waitpid(ranks.pids[rank], 0)[1])
            ranks.statuses[rank] = status
            if status not in ALL_END_SO and ranks.kill_at is None:
                ranks.kill_at = time.monotonic() + follow
    return hung


def _be_rank(
    words: Sequence[str], rank: int, world_size: int, memory: Sequence[int], errors: int, disturb: Disturbance
) -> NoReturn:
    """The life of a forked rank."""
    status = RAISED
    try:
        os.dup2(errors, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        # What the test process has put in their place may be anything.
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
        end_with_parent()
        torch.set_num_threads(1)
        os.environ.update(rank_environment(os.environ, rank, world_size, memory))
        disturb(rank)
        status = cli.main(words)
    except BaseException:  # whatever it is, the judge is to know
        traceback.print_exc()
    finally:
        # Without the clean-up of the test process that this is a copy of.
        os._exit(status)
