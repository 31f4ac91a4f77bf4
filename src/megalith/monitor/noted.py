"""The disk of a run, on which every operation is progress: a slow disk is no hanging rank, one that never returns is.

What it waits for now can be asked by any thread, so that the watch can name it.
"""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megalith.files import Disk
from megalith.monitor.ledger import Ledger


@dataclass(frozen=True)
class Held:
    """An operation of the disk that has not returned yet. number: no other one's."""

    number: int
    what: str  # "sync of /run/checkpoints/..."


class NotedDisk(Disk):
    """Counts each operation, as it begins and as it ends, as a move of the ledger; any number of threads use it."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._numbers = itertools.count(1)
        self._paths: dict[int, Path] = {}  # of descriptors
        self._held: dict[int, Held] = {}  # of threads

    @property
    def held(self) -> Held | None:
        """The operation that has begun first of those that have not returned."""
        return min(list(self._held.values()), key=lambda held: held.number, default=None)

    @contextmanager
    def _noted(self, name: str, place: Path | int) -> Iterator[None]:
        path = self._paths.get(place, "a file") if isinstance(place, int) else place
        self._ledger.move()
        self._held[threading.get_ident()] = Held(next(self._numbers), f"{name} of {path}")
        try:
            yield
        finally:
            del self._held[threading.get_ident()]
            self._ledger.move()

    def create(self, path: Path) -> int:
        with self._noted("create", path):
            descriptor = super().create(path)
        self._paths[descriptor] = path
        return descriptor

    def open(self, path: Path) -> int:
        with self._noted("open", path):
            descriptor = super().open(path)
        self._paths[descriptor] = path
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        with self._noted("write", descriptor):
            return super().write(descriptor, data)

    def read(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        with self._noted("read", descriptor):
            return super().read(descriptor, buffer, offset)

    def sync(self, descriptor: int) -> None:
        with self._noted("sync", descriptor):
            super().sync(descriptor)

    def close(self, descriptor: int) -> None:
        with self._noted("close", descriptor):
            # Before it is closed: from then on another thread may get the same descriptor.
            self._paths.pop(descriptor, None)
            super().close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        with self._noted("rename", target):
            super().rename(source, target)

    def remove(self, path: Path) -> None:
        with self._noted("remove", path):
            super().remove(path)

    def make_directory(self, path: Path) -> None:
        with self._noted("make_directory", path):
            super().make_directory(path)

    def remove_directory(self, path: Path) -> None:
        with self._noted("remove_directory", path):
            super().remove_directory(path)

    def lock(self, descriptor: int) -> None:
        with self._noted("lock", descriptor):
            super().lock(descriptor)

    def free_bytes(self, path: Path) -> int:
        with self._noted("look for room", path):
            return super().free_bytes(path)
