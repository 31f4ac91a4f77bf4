"""One owner: a run directory is written by one job at a time, which holds a lease on it; rank 0 keeps it.

The lease is a file that names a process and counts its heartbeats. Whoever finds the lease of another looks whether
that one lives. On the same host, boot and space of process numbers the kernel says so, and a dead owner's lease is
taken over at once. Elsewhere its heartbeat is watched: it is taken over once that has stood still for
SECONDS_WITHOUT_BEAT of the watcher's own clock. The calendar plays no part. Of several who start at once one wins: they
look and write under a lock of the kernel's on the directory, and the owner looks again before each save.
"""

import json
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megalith.checkpoint.directory import discard_leftovers
from megalith.checkpoint.shards import DamagedError, read_file
from megalith.config import ConfigError, Run
from megalith.files import DISK, NO_ROOM, Disk, Location, make_directories, open_directory, sync_directory, write_whole
from megalith.monitor.peers import Peer, this_process
from megalith.parallel.mesh import Layout
from megalith.ranks import Ranks
from megalith.terminal import printable, say

FILE_NAME = "lease.json"
# Files of a run directory that are replaced whole; a kill may leave their temporary names behind.
REPLACED_FILES = (FILE_NAME, "ledger.json", "run.toml", "tokenizer/*")
LARGEST_FILE = 4096  # bytes
SECONDS_BETWEEN_BEATS = 10.0
SECONDS_WITHOUT_BEAT = 60.0
SECONDS_FOR_LOCK = 10.0
SECONDS_WITHOUT_LOCK = 1.0  # where the file system has none: for others who looked at the same time to have written
TICK = 0.5  # seconds between two looks at another's heartbeat


@dataclass(frozen=True)
class Entry:
    """What the file says."""

    host: str  # name, boot and space of process numbers
    pid: int
    started: int  # clock ticks since the boot of the host
    token: str  # of this lease alone
    booted: float  # seconds from the boot to the lease
    calendar: float  # Unix seconds of the lease; for people
    beat: int = 0

    @classmethod
    def parsed(cls, text: bytes) -> Self | None:
        """The entry; None if the text is not one."""
        try:
            values: dict[str, Any] = json.loads(text)
            entry = cls(**{field.name: field.type(values[field.name]) for field in fields(cls)})  # type: ignore[operator]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        return entry if entry.pid > 0 and entry.host.strip() else None

    @property
    def peer(self) -> Peer:
        return Peer(0, self.pid, self.host, self.started)

    @property
    def age(self) -> float:
        """Seconds since it was taken."""
        if self.peer.is_here:
            return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - self.booted)
        return max(0.0, time.time() - self.calendar)

    def __str__(self) -> str:
        name = printable(self.host.split()[0][:64])
        return f"process {self.pid} on host {name}, for {_told(self.age)}"


class OwnedError(ValueError):
    """Another job owns the run directory; the message names it."""


class Lease:
    """The right to write to a run directory, from `take` on; kept by a thread until it is given back.

    lost: who has taken it over, in words; empty while it is ours.
    """

    def __init__(
        self,
        run_dir: Location,
        *,
        disk: Disk = DISK,
        clock: Callable[[], float] = time.monotonic,
        between_beats: float = SECONDS_BETWEEN_BEATS,
        without_beat: float = SECONDS_WITHOUT_BEAT,
    ) -> None:
        self.path = Path(run_dir) / FILE_NAME
        self.lost = ""
        self._disk, self._clock = disk, clock
        self._between_beats, self._without_beat = between_beats, without_beat
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="megalith-lease", daemon=True)
        me = this_process(0)
        booted = time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else 0.0
        self._entry = Entry(me.host, me.pid, me.started, secrets.token_hex(16), booted, time.time())

    def take(self, tell: Callable[[str], None]) -> None:
        """Become the owner; tell: called if that needs patience.

        Raises OwnedError, naming host, process and age, if another job is. Raises OSError if the disk fails.
        """
        make_directories(self.path.parent, disk=self._disk)
        watched, since = b"", self._clock()
        while True:
            with self._locked() as is_locked:
                text = self._read()
                if text != watched:
                    self._greet(text, watched, tell)
                    watched, since = text, self._clock()
                if self._binds_nobody(text) or self._clock() - since >= self._without_beat:
                    self._write()
                    self._remove_leftovers()
                    break
            time.sleep(TICK)
        if not is_locked:
            time.sleep(SECONDS_WITHOUT_LOCK)
            self.check()
        self._thread.start()

    def _binds_nobody(self, text: bytes) -> bool:
        """Whether there is no lease, or one of a process that is known to be dead."""
        other = Entry.parsed(text)
        return not text or (other is not None and other.peer.is_gone)

    def _greet(self, text: bytes, watched: bytes, tell: Callable[[str], None]) -> None:
        """Raise OwnedError if the lease is of a living job: one that is seen here, or one whose heart has just beaten.

        watched: the lease that stood there before.
        """
        other, before = Entry.parsed(text), Entry.parsed(watched)
        beats = other is not None and before is not None and other.token == before.token
        if other is not None and (beats or (other.peer.is_here and not other.peer.is_gone)):
            raise OwnedError(
                f"--save = {self.path.parent}: another job writes there, {other}. Wait for its end, stop it, or choose "
                "another directory"
            )
        if not self._binds_nobody(text):
            who = f"is held by {other}" if other is not None else "holds a lease that cannot be read"
            tell(
                f"--save = {self.path.parent}: {who}. Whether it lives cannot be seen from here: its heartbeat is "
                f"watched for {self._without_beat:g} s"
            )

    def check(self) -> None:
        """Raise OwnedError if another job has taken the lease over; a file that cannot be read is no proof of that."""
        with suppress(OSError, DamagedError):
            self._look()
        if self.lost:
            raise OwnedError(
                f"--save = {self.path.parent}: another job has taken this directory over, {self.lost}; this one was "
                "silent for too long. Nothing more is written by it"
            )

    def _look(self) -> None:
        """Find out whether the lease is still ours."""
        other = Entry.parsed(self._read())
        if other is not None and other.token != self._entry.token:
            self.lost = str(other)

    def _keep(self) -> None:
        while not self._over.wait(self._between_beats) and not self.lost:
            # A disk that fails costs a heartbeat; the next save says what is wrong with it.
            with suppress(OSError, DamagedError), self._locked():
                self._look()
                if not self.lost and not self._over.is_set():
                    self._entry = replace(self._entry, beat=self._entry.beat + 1)
                    self._write()

    def give_back(self) -> None:
        """Let the directory go, if it is ours."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(SECONDS_FOR_LOCK)
        # What cannot be removed now is taken over at once by the next job, for this process will have ended.
        with suppress(OSError, DamagedError), self._locked():
            self._look()
            if not self.lost:
                self._disk.remove(self.path)
                sync_directory(self.path.parent, disk=self._disk)

    def _read(self) -> bytes:
        try:
            return read_file(self.path, LARGEST_FILE, disk=self._disk)
        except FileNotFoundError:
            return b""

    def _write(self) -> None:
        write_whole(self.path, json.dumps(asdict(self._entry)) + "\n", disk=self._disk)

    def _remove_leftovers(self) -> None:
        """Remove what killed owners have left half-written; the names are ours alone, and so is the directory now."""
        for name in map(Path, REPLACED_FILES):
            folder = self.path.parent / name.parent
            if folder.is_symlink() and folder != self.path.parent:
                continue  # what a link points at may be another's
            for left in folder.glob(f".{name.name}.{'[0-9a-f]' * 8}.tmp"):
                with suppress(OSError):
                    self._disk.remove(left)

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """Nobody else looks at the lease or writes it meanwhile; False where the file system knows no locks."""
        descriptor = open_directory(self.path.parent, disk=self._disk)
        try:
            yield self._lock(descriptor)
        finally:
            self._disk.close(descriptor)  # which ends the lock, as the end of the process would

    def _lock(self, descriptor: int) -> bool:
        until = self._clock() + SECONDS_FOR_LOCK
        while True:
            try:
                self._disk.lock(descriptor)
                return True
            except BlockingIOError:
                if self._clock() >= until:
                    raise
                time.sleep(0.02)
            except OSError:
                return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_back()


@contextmanager
def owned(run: Run, layout: Layout) -> Iterator[Lease | None]:
    """While entered, this job owns its run directory, if it has one. Every rank calls it; rank 0 has the lease.

    Raises OwnedError on rank 0 if another job owns it, and on the others an error that says nothing.
    """
    if run.checkpoint.save is None or run.train.exit_before_training:
        yield None
        return
    ranks, refused, lease = Ranks(), None, None
    if layout.rank == 0:
        lease = Lease(run.checkpoint.save)
        try:
            lease.take(say)
        except (OSError, DamagedError, OwnedError) as error:
            refused = error
        else:
            # No other rank is at work yet. What cannot be removed now costs room only; the next save says why.
            with suppress(OSError):
                discard_leftovers(run.checkpoint.save, disk=DISK)
    is_ours = bool(ranks.from_first(refused is None))
    if refused is not None:
        if isinstance(refused, OwnedError):
            raise refused
        raise ValueError(f"--save = {run.checkpoint.save}: {refused}. {remedy_for(refused)}") from refused
    if not is_ours:
        raise ConfigError(())  # rank 0 speaks for all
    if lease is None:
        yield None
        return
    with lease:
        yield lease


def remedy_for(error: BaseException) -> str:
    """What a user can do about a run directory that could not be written to for that, or for its cause."""
    codes = {getattr(found, "errno", None) for found in (error, error.__cause__)}
    return "Make room, or choose another directory." if codes & NO_ROOM else "Choose another directory."


def _told(seconds: float) -> str:
    """12 s, 5 min, 3.2 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
