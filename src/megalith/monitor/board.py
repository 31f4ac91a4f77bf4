"""Where each rank writes what it is doing and reads what the others do: a row of JSON a rank.

The board is not the process group: a rank that hangs in a collective has one all the same. On one machine it is memory
that the launcher hands to all ranks, so it needs nobody to answer; else it is torch's key-value store.
"""

import fcntl
import json
import mmap
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, Self

ROW_BYTES = 256
LONGEST_PHASE = 60  # characters
SECONDS_TO_CLAIM = 1.0  # that a store gets to answer


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    beats: int = 0  # how often it has said so: grows while the process runs
    moves: int = 0  # how often it has gone on to something else
    idle: float = 0.0  # seconds since then
    step: int = 0
    phase: str = ""
    limit: float = 0.0  # seconds that it may stay in this phase; 0: any
    waits: bool = False  # for other ranks, as far as its stack tells
    left: bool = False  # it is not watched any more
    failed: bool = False  # and that because of an error
    follows: bool = False  # which was that others are lost, not one of its own
    guilty: tuple[int, ...] = ()  # the ranks on whose account it ends the job

    def to_row(self) -> bytes:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {"idle": round(self.idle, 2), "phase": self.phase[:LONGEST_PHASE], "guilty": self.guilty[:8]}
        return json.dumps(list(values.values()), separators=(",", ":")).encode()

    @classmethod
    def from_row(cls, row: bytes) -> Self | None:
        """The beat; None for a row that is empty, or is being written."""
        names = [field.name for field in fields(cls)]
        try:
            values: dict[str, Any] = dict(zip(names, json.loads(row.rstrip(b"\0")), strict=True))
            return cls(**{**values, "guilty": tuple(values["guilty"])})
        except (ValueError, TypeError):
            return None


class Board(Protocol):
    """Rows of all ranks; no method waits for anyone."""

    reads_all: bool  # at no cost, on every rank

    def write(self, row: bytes) -> None: ...
    def read(self) -> dict[int, bytes]: ...
    def seconds_unanswered(self) -> float: ...
    def read_at(self) -> float:
        """What ranks had written by this moment, by time.monotonic, is in what `read` gives."""

    def refresh(self) -> None:
        """Have the rows read again soon."""

    def claim(self) -> bool:
        """Whether this rank may speak for those of its host that share the board, of which none does so far."""

    def close(self) -> None: ...


class MemoryBoard:
    """A board in a file that all ranks map; path: of an empty file, or of one that other ranks have made a board."""

    reads_all = True

    def __init__(self, path: str, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.truncate(self._descriptor, ROW_BYTES * world_size)
            self._memory = mmap.mmap(self._descriptor, ROW_BYTES * world_size)
        except (OSError, ValueError):
            os.close(self._descriptor)
            raise

    def write(self, row: bytes) -> None:
        begin = self._rank * ROW_BYTES
        self._memory[begin : begin + ROW_BYTES] = row[:ROW_BYTES].ljust(ROW_BYTES, b"\0")

    def read(self) -> dict[int, bytes]:
        rows = range(self._world_size)
        return {rank: self._memory[rank * ROW_BYTES : (rank + 1) * ROW_BYTES] for rank in rows}

    def seconds_unanswered(self) -> float:
        return 0.0

    def read_at(self) -> float:
        return time.monotonic()

    def refresh(self) -> None:
        """They are read when they are asked for."""

    def claim(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        self._memory.close()
        os.close(self._descriptor)


class StoreBoard:
    """A board in a key-value store of torch's, through a connection and a thread of its own.

    A request to a store whose process is stopped never returns, whatever its timeout, so nobody but that thread waits
    for one. Rank 0 reads all ranks, the others rank 0. host: this one's name. interval: seconds between two looks.
    """

    reads_all = False

    def __init__(self, store: Any, rank: int, world_size: int, *, host: str, interval: float) -> None:
        self._store = store
        self._rank = rank
        self._speaker = f"megalith/speaker/{host}"
        self._may_speak = True  # so every rank may where no store answers
        self._claims, self._is_answered = threading.Event(), threading.Event()
        self._watched = {other: _key(other) for other in (range(world_size) if rank == 0 else [0])}
        self._row = Beat().to_row()
        self._rows: dict[int, bytes] = {}
        self._answered = self._tried = time.monotonic()
        self._written = threading.Event()
        self._over = threading.Event()
        self._interval = interval
        self._thread = threading.Thread(target=self._serve, name="megalith-board", daemon=True)
        self._thread.start()

    def write(self, row: bytes) -> None:
        self._row = row
        self._written.set()

    def read(self) -> dict[int, bytes]:
        return self._rows

    def read_at(self) -> float:
        return self._tried

    def refresh(self) -> None:
        self._written.set()

    def claim(self) -> bool:
        self._claims.set()
        self._written.set()
        self._is_answered.wait(SECONDS_TO_CLAIM)
        return self._may_speak

    def seconds_unanswered(self) -> float:
        return time.monotonic() - self._answered

    def close(self) -> None:
        """Write the last row, if the store answers within a second."""
        self._over.set()
        self._written.set()
        self._thread.join(1.0)

    def _serve(self) -> None:
        while True:
            self._written.wait(self._interval)
            self._written.clear()
            over, began = self._over.is_set(), time.monotonic()
            claims = self._claims.is_set() and not self._is_answered.is_set()
            try:
                self._store.set(_key(self._rank), self._row.decode())
                # A rank that has not come so far has no row, for which a read would wait.
                missing = absent(self._store, [key for rank, key in self._watched.items() if rank not in self._rows])
                there = {rank: key for rank, key in self._watched.items() if key not in missing}
                self._rows = dict(zip(there, self._store.multi_get(list(there.values())), strict=True))
                if claims:
                    self._may_speak = self._store.add(self._speaker, 1) == 1
                self._answered = time.monotonic()
            except RuntimeError:  # torch's store is gone, or does not answer; seconds_unanswered tells
                pass
            self._tried = began  # also in vain: there is nothing newer
            if claims:
                self._is_answered.set()
            if over:
                return


def absent(store: Any, keys: Sequence[str]) -> set[str]:
    """Those of the keys that a store of torch's has not; by halves, so that a few of many take a few requests."""
    if not keys or store.check(list(keys)):
        return set()
    if len(keys) == 1:
        return set(keys)
    half = len(keys) // 2
    return absent(store, keys[:half]) | absent(store, keys[half:])


def _key(rank: int) -> str:
    return f"megalith/beat/{rank}"
