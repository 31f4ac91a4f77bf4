"""Starting the ranks of one machine, and ending them all when one is lost; it neither imports torch nor opens a port.

The ranks find each other through anonymous memory that the launcher hands down (parallel/rendezvous.py), so there is
nothing on the network and nothing is left behind, whoever is killed: each rank ends with the launcher, by order of the
kernel. Linux only; elsewhere torchrun does the job.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from megalith.terminal import say

# What the launcher tells a rank: the files of anonymous memory for the rendezvous and for the beats of the watch.
STORE_VARIABLE = "MEGALITH_STORE"
BOARD_VARIABLE = "MEGALITH_BOARD"

# Exit statuses of a rank, beside those of train.py and monitor/signals.py.
NOT_STARTED = 2  # a fault that was named
PEER_LOST = 77  # another rank died or failed
HUNG = 78  # no progress for --hang-timeout seconds

# 0, and what train.py, monitor/signals.py and guard.py have a run end with: all ranks have agreed to it, or were told,
# and follow each in its time.
ALL_END_SO = (0, 74, 75, 76, 80, 81)

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SECONDS_TO_FOLLOW = 1.0  # that ranks get to end by themselves once one is lost
# A fault that all ranks find alike is said by rank 0, which may be the last to have imported everything.
SECONDS_TO_TELL = 30.0
# A launcher, a scheduler and a terminal may each hand on the same signal: what follows so soon is no second request.
SECONDS_OF_ONE_REQUEST = 1.0

# By signal: what may be the reason that a rank was ended by it.
HINTS = {
    signal.SIGKILL: "; if memory ran out, a smaller --micro-batch-size needs less",
    signal.SIGBUS: "; a data file that was being read has become shorter, or its disk failed",
}

PR_SET_PDEATHSIG = 1  # from linux/prctl.h


@contextmanager
def handled(numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While entered, these signals call the handler; in a thread beside the main one, which alone may set it, none."""
    may = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in numbers} if may else {}
    try:
        yield
    finally:
        for number, other in before.items():
            signal.signal(number, other)


def heard() -> tuple[signal.Signals, ...]:
    """The signals that ask to stop: those of STOPPING, but not SIGHUP where it is ignored, as under nohup."""
    deaf = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in STOPPING if not (deaf and number is signal.SIGHUP))


class PeerLostError(Exception):
    """Another rank died, failed or hangs, so this one cannot go on; the message names it."""


class LeftToAnotherError(Exception):
    """What is wrong is said by another rank of this node."""


def ranks_in(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, world size, local rank) that torchrun or SLURM announces in the environment; (0, 1, 0) without either.

    Raises ValueError for numbers that no launcher would give.
    """
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
        rank, world, local = names
        if rank not in environment or world not in environment:
            continue
        said = {name: environment.get(name, "0") for name in names}
        for name, text in said.items():
            if not (text.isascii() and text.isdigit()):
                raise ValueError(f"{name} = {text}: is no rank or number of ranks. Leave it to torchrun or srun.")
        if int(said[rank]) >= int(said[world]):
            raise ValueError(f"{rank} = {said[rank]}: must be below {world} = {said[world]}. Correct one of them.")
        return int(said[rank]), int(said[world]), int(said[local])
    return 0, 1, 0


@contextmanager
def one_of_a_node_tells() -> Iterator[None]:
    """While entered, a fault that all ranks find alike before they meet is said by one rank of each node, which has a
    command line and files of its own; the others raise LeftToAnotherError.

    Those of torchrun give that one time first: at the first rank that ends, torchrun ends all.
    """
    tells = ranks_in(os.environ)[2] == 0
    try:
        yield
    except (ValueError, OSError):
        if tells:
            raise
        if "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(SECONDS_TO_TELL)
        raise LeftToAnotherError from None


def speaks_for_all(rank: int) -> bool:
    """Whether this rank says what a signal does: rank 0, but where a launcher speaks for its ranks."""
    return rank == 0 and STORE_VARIABLE not in os.environ


def end_with_parent() -> None:
    """From now on the kernel kills this process when its parent has died, whatever it is doing."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it has died in between
            os._exit(128 + signal.SIGKILL)


def as_program(module: str, *words: str) -> list[str]:
    """The command that runs a module with this Python, which looks for modules where this process does.

    By -m alone it would look in the current directory first, where a file may have the name of a library.
    """
    is_searched = any(not place or (os.path.isdir(place) and os.path.samefile(place, ".")) for place in sys.path)
    return [sys.executable, *([] if is_searched else ["-P"]), "-m", module, *words]


def launch(
    command: Sequence[str],
    num_ranks: int,
    *,
    stop_grace: float,
    max_restarts: int = 0,
    signals_wait: bool = False,
    effect: str = "finish their step, save and end",
) -> int:
    """Run the command as that many ranks; return the exit status when all have ended.

    A signal to stop is handed on; effect: what the ranks then do; stop_grace: seconds that they have for it. A rank
    that is lost takes the others with it; that is done again at most max_restarts times, unless the ranks were told to
    stop. signals_wait: in a rank, until it unblocks them. Raises ValueError where there is nothing to start.
    """
    if num_ranks < 1:
        raise ValueError(f"--nproc = {num_ranks}: must be greater than 0. Give a positive number")
    if sys.platform != "linux":
        raise ValueError(
            f"--nproc = {num_ranks}: starts ranks by what Linux alone has. Leave it out, and start the rest of the "
            f"command by torchrun --nproc-per-node {num_ranks} -m megalith ... instead of megalith ..."
        )
    launcher = _Launcher(stop_grace, effect, signals_wait)
    for restarts in range(max_restarts + 1):
        status = launcher.run(command, num_ranks)
        lost = status in (1, PEER_LOST, HUNG) or status > 128
        if not lost or launcher.stopping is not None or restarts == max_restarts:
            break
        say(f"starting the {num_ranks} ranks again, restart {restarts + 1} of {max_restarts}")
    return status


@dataclass
class _Launcher:
    """One machine's ranks, and what has been asked of them."""

    stop_grace: float
    effect: str
    signals_wait: bool = False
    stopping: signal.Signals | None = None  # the first request
    stopped_at: float = 0.0
    ranks: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)  # of ended ranks, in the order in which they ended
    killed: set[int] = field(default_factory=set)  # by us, once the job was lost
    kill_at: float | None = None  # by time.monotonic

    def run(self, command: Sequence[str], num_ranks: int) -> int:
        self.statuses, self.killed, self.kill_at = {}, set(), None
        memory = [os.memfd_create(name) for name in ("megalith-store", "megalith-board")]
        # Signals wait until they are asked for: nothing here can be interrupted, and none is missed.
        waited_for = {*heard(), signal.SIGCHLD}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
        try:
            blocked = heard() if self.signals_wait else ()
            self.ranks = [_start(command, rank, num_ranks, memory, blocked) for rank in range(num_ranks)]
            while len(self.statuses) < num_ranks:
                left = None if self.kill_at is None else max(0.0, self.kill_at - time.monotonic())
                received = (
                    signal.sigwaitinfo(waited_for) if left is None else signal.sigtimedwait(waited_for, min(left, 3600))
                )
                if received is not None and received.si_signo != signal.SIGCHLD:
                    self._stop(signal.Signals(received.si_signo))
                self._reap()
                if self.kill_at is not None and time.monotonic() >= self.kill_at:
                    self._kill()
        finally:
            self._kill()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for descriptor in memory:
                os.close(descriptor)
        return self._outcome()

    def _stop(self, number: signal.Signals) -> None:
        """Hand a request on; the ranks know what a second one means."""
        # A terminal that goes away is a reason to save and end.
        number = signal.SIGTERM if number == signal.SIGHUP else number
        now = time.monotonic()
        if self.stopping is None:
            self.stopping, self.stopped_at = number, now
            self.kill_at = now + self.stop_grace
            say(f"{number.name}: the ranks {self.effect}; a second signal ends them at once")
        elif now - self.stopped_at > SECONDS_OF_ONE_REQUEST:
            self.kill_at = min(self.kill_at or now, now) + SECONDS_TO_FOLLOW
        for rank, process in enumerate(self.ranks):
            if rank not in self.statuses:
                process.send_signal(number)

    def _reap(self) -> None:
        for rank, process in enumerate(self.ranks):
            if rank in self.statuses or (status := process.poll()) is None:
                continue
            self.statuses[rank] = status
            if status in ALL_END_SO or rank in self.killed:
                continue
            patience = SECONDS_TO_TELL if status == NOT_STARTED else SECONDS_TO_FOLLOW
            at = time.monotonic() + patience
            self.kill_at = at if self.kill_at is None else min(self.kill_at, at)

    def _kill(self) -> None:
        left = [rank for rank in range(len(self.ranks)) if rank not in self.statuses]
        if left and self.stopping is not None and time.monotonic() >= self.stopped_at + self.stop_grace:
            say(f"{_named(left)} did not end within --stop-grace = {self.stop_grace:g} s; the last commit is whole")
        for rank in left:
            self.ranks[rank].kill()
            self.killed.add(rank)
        for rank in left:
            self.statuses[rank] = self.ranks[rank].wait()

    def _outcome(self) -> int:
        """The status for all: that of the rank that ended the job, 128 + n if a signal n ended it."""
        own = {rank: status for rank, status in self.statuses.items() if rank not in self.killed}
        failed = {rank: status for rank, status in own.items() if status != 0}
        if not failed:
            return 128 + signal.SIGKILL if self.killed else 0
        if HUNG in failed.values():  # which ended the others, and said so
            return HUNG
        # Those that only followed are not the cause.
        causes = {r: s for r, s in failed.items() if s != PEER_LOST} or failed
        rank, status = next(iter(causes.items()))
        if status < 0:
            number = signal.Signals(-status)
            followed = "; the others were ended" if len(self.ranks) > 1 else ""
            process = self.ranks[rank].pid
            say(f"rank {rank} (process {process}) was ended by {number.name}{followed}{HINTS.get(number, '')}")
            return 128 - status
        if status in (1, PEER_LOST):
            say(f"rank {rank} ended with status {status}: what it printed above says why")
        return status


def _start(
    command: Sequence[str], rank: int, num_ranks: int, memory: Sequence[int], blocked: Sequence[signal.Signals]
) -> "subprocess.Popen[bytes]":
    launcher = os.getpid()

    def become_rank() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        end_with_parent()
        if os.getppid() != launcher:
            os._exit(128 + signal.SIGKILL)

    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        env=rank_environment(os.environ, rank, num_ranks, memory),
        pass_fds=memory,
        preexec_fn=become_rank,  # the launcher has one thread
    )


def rank_environment(
    environment: Mapping[str, str], rank: int, num_ranks: int, memory: Sequence[int]
) -> dict[str, str]:
    """What a rank is told: its place, where the others are found, and to leave cores to them."""
    store, board = (f"/proc/self/fd/{descriptor}" for descriptor in memory)
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    return {
        "OMP_NUM_THREADS": str(threads),
        **environment,
        **{name: str(value) for name, value in told.items()},
        STORE_VARIABLE: store,
        BOARD_VARIABLE: board,
    }


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
