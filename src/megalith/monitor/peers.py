"""The ranks as processes of their hosts: who they are, and whether they live."""

import functools
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """A rank as a process."""

    rank: int
    pid: int
    host: str  # of name, boot and process numbers, so that two containers of one name are not taken for one
    started: int  # clock ticks since boot, with which a process number is not used twice; 0: unknown

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host.split()[0]})"

    @property
    def is_here(self) -> bool:
        """Whether it runs where its process can be seen."""
        return self.started != 0 and self.host == this_host()

    @property
    def is_gone(self) -> bool:
        """Whether its process has ended, as far as can be seen from here."""
        if not self.is_here or (fields := _fields(self.pid)) is None:
            return False
        return _state(fields) != (self.started, True)

    @property
    def is_stopped(self) -> bool:
        """Whether a signal keeps it from running."""
        return self.is_here and (_fields(self.pid) or [])[:1] in ([b"T"], [b"t"])


def this_process(rank: int) -> Peer:
    """This process as a rank."""
    return Peer(rank, os.getpid(), this_host(), state_of(os.getpid())[0])


@functools.cache
def this_host() -> str:
    """The name of this machine, its boot, and its space of process numbers."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{socket.gethostname()} {file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def state_of(pid: int) -> tuple[int, bool]:
    """When a process of this host began, in clock ticks since boot, and whether it lives; (0, False) for none."""
    return _state(_fields(pid) or [])


def _state(fields: list[bytes]) -> tuple[int, bool]:
    return (int(fields[19]), fields[0] not in (b"Z", b"X")) if fields else (0, False)


def seconds_of_life() -> float:
    """How long this process has lived; 0 where the system does not say. The calendar plays no part."""
    started, lives = state_of(os.getpid())
    if not lives:
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK"))


def _fields(pid: int) -> list[bytes] | None:
    """What the kernel says of a process, from its state on; nothing if there is none, None if it cannot be asked."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name before, in parentheses, may hold anything.
            return file.read().rpartition(b") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    except OSError:  # no file can be opened any more: that says nothing of the process
        return None


def named(peers: Sequence[Peer]) -> str:
    """Rank 1 (...), rank 3 (...)."""
    return ", ".join(map(str, peers))
