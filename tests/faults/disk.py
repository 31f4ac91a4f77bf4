"""The disk under a fault: every operation of `megalith.files.Disk` is counted, and may kill, fail, lie or be recorded.

The class itself is changed, in a forked child only, so that whoever holds a disk holds this one. Operations are counted
for each thread apart, for the order between threads is not the same in two runs: lane "save" is the thread that writes
checkpoints, "main" the training. A number in a lane names the same operation in every run.
"""

import errno
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megalith.files import Disk

Moment = Literal["before", "after"]
LANES = ("main", "save")
SAVE_THREAD = "checkpoint"  # how the saver's thread is named


class Operation(NamedTuple):
    """One call of a disk. number: its place in its lane."""

    lane: str
    number: int
    name: str
    path: str
    source: str = ""  # of a rename
    data: bytes = b""  # of a write, where it is recorded
    time: int = 0  # nanoseconds of the machine's clock, when it was done


class Point(NamedTuple):
    """Where a fault strikes."""

    rank: int
    lane: str
    number: int
    moment: Moment = "before"


Act = Callable[[Moment, Operation], None]


@dataclass
class Wire:
    """Puts a function before and after every operation of every disk of this process."""

    act: Act
    keeps_data: bool = False
    # Changes what reaches the medium while the writer believes otherwise.
    alter: Callable[[Operation, bytes], bytes] | None = None
    counts: Counter[str] = field(default_factory=Counter)
    paths: dict[int, str] = field(default_factory=dict)

    def install(self) -> None:
        """For the rest of this process's life."""
        for name in ("create", "open"):
            setattr(Disk, name, self._opening(name, getattr(Disk, name)))
        for name in ("read", "sync", "close"):
            setattr(Disk, name, self._on_descriptor(name, getattr(Disk, name)))
        for name in ("remove", "make_directory", "remove_directory"):
            setattr(Disk, name, self._on_path(name, getattr(Disk, name)))
        setattr(Disk, "write", self._writing(Disk.write))  # noqa: B010 - mypy forbids to assign a method
        setattr(Disk, "rename", self._renaming(Disk.rename))  # noqa: B010

    def _begin(self, name: str, path: str, source: str = "", data: bytes = b"") -> Operation:
        lane = "save" if threading.current_thread().name.startswith(SAVE_THREAD) else "main"
        operation = Operation(lane, self.counts[lane], name, path, source, data)
        self.counts[lane] += 1
        self.act("before", operation)
        return operation

    def _end(self, operation: Operation) -> None:
        self.act("after", operation._replace(time=time.monotonic_ns()))

    def _opening(self, name: str, original: Callable[..., int]) -> Callable[..., int]:
        def opening(disk: Disk, path: Path) -> int:
            operation = self._begin(name, str(path))
            descriptor = original(disk, path)
            self.paths[descriptor] = str(path)
            self._end(operation)
            return descriptor

        return opening

    def _on_descriptor(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def on_descriptor(disk: Disk, descriptor: int, *arguments: Any) -> Any:
            if name == "close":
                # Before it is closed: from then on another thread may get the same descriptor.
                path = self.paths.pop(descriptor)
                # A close that fails has closed all the same.
                original(disk, descriptor)
                self._end(self._begin(name, path))
                return None
            operation = self._begin(name, self.paths[descriptor])
            value = original(disk, descriptor, *arguments)
            self._end(operation)
            return value

        return on_descriptor

    def _on_path(self, name: str, original: Callable[..., None]) -> Callable[..., None]:
        def on_path(disk: Disk, path: Path) -> None:
            operation = self._begin(name, str(path))
            original(disk, path)
            self._end(operation)

        return on_path

    def _writing(self, original: Callable[..., int]) -> Callable[..., int]:
        def writing(disk: Disk, descriptor: int, data: memoryview) -> int:
            operation = self._begin("write", self.paths[descriptor], data=bytes(data) if self.keeps_data else b"")
            written = data if self.alter is None else memoryview(self.alter(operation, bytes(data)))
            count = original(disk, descriptor, written)
            if self.keeps_data:
                operation = operation._replace(data=operation.data[:count])
            self._end(operation)
            return count

        return writing

    def _renaming(self, original: Callable[..., None]) -> Callable[..., None]:
        def renaming(disk: Disk, source: Path, target: Path) -> None:
            operation = self._begin("rename", str(target), source=str(source))
            original(disk, source, target)
            self._end(operation)

        return renaming


# What is done on a rank before the command starts: given its number.
Disturbance = Callable[[int], None]


def undisturbed(rank: int) -> None:
    """Nothing."""


def recording(folder: Path, *, keeps_data: bool = False) -> Disturbance:
    """Writes down what the disk has done, for `recorded`."""

    def on_rank(rank: int) -> None:
        def act(moment: Moment, operation: Operation) -> None:
            if moment == "after":
                note_operation(folder, rank, operation)

        Wire(act, keeps_data).install()

    return on_rank


def note_operation(folder: Path, rank: int, operation: Operation) -> None:
    """Write an operation of a rank down, for `recorded`."""
    line = json.dumps([*operation[:5], operation.data.hex(), operation.time or time.monotonic_ns()])
    to = os.open(folder / f"operations-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.write(to, f"{line}\n".encode())
    os.close(to)


def recorded(folder: Path, rank: int) -> list[Operation]:
    """What the disk of a rank has done, in that order."""
    lines = (folder / f"operations-{rank}").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        Operation(lane, number, name, path, source, bytes.fromhex(data), at)
        for lane, number, name, path, source, data, at in rows
    ]


def killing(point: Point, number: signal.Signals = signal.SIGKILL) -> Disturbance:
    """Kills the rank at that point, as kill -9 does, or sends it another signal."""

    def act(moment: Moment, operation: Operation) -> None:
        if (operation.lane, operation.number, moment) == point[1:]:
            os.kill(os.getpid(), number)

    return lambda rank: Wire(act).install() if rank == point.rank else None


def failing(point: Point, code: int = errno.EIO, *, count: int = 1, struck: Path | None = None) -> Disturbance:
    """Lets that many operations of the lane do nothing but raise, from the point on; then all is well again.

    struck: a file that then holds the path of the first of them; operations of "main" are not always in the same order.
    """

    def act(moment: Moment, operation: Operation) -> None:
        is_struck = operation.lane == point.lane and point.number <= operation.number < point.number + count
        if is_struck and moment == "before":
            if struck is not None and not struck.exists():
                struck.write_text(operation.path)
            raise OSError(code, os.strerror(code), operation.path)

    return lambda rank: Wire(act).install() if rank == point.rank else None


def lying(point: Point, bit: int) -> Disturbance:
    """Lets one write turn a bit of what it writes, and say that all is well."""

    def alter(operation: Operation, data: bytes) -> bytes:
        if (operation.lane, operation.number) != (point.lane, point.number):
            return data
        place = bit % (8 * len(data))
        return data[: place // 8] + bytes([data[place // 8] ^ (1 << place % 8)]) + data[place // 8 + 1 :]

    return lambda rank: Wire(lambda moment, operation: None, alter=alter).install() if rank == point.rank else None


def shortening(size: Callable[[int], int]) -> Disturbance:
    """Lets every write take at most so many bytes of what it is given, at least one."""

    def alter(operation: Operation, data: bytes) -> bytes:
        return data[: max(1, size(len(data)))]

    return lambda rank: Wire(lambda moment, operation: None, alter=alter).install()


def slow(seconds: float, *, rank: int | None = None) -> Disturbance:
    """Lets every operation of the lane "save" take longer, on one rank or on all."""

    def act(moment: Moment, operation: Operation) -> None:
        if moment == "before" and operation.lane == "save":
            time.sleep(seconds)

    return lambda number: Wire(act).install() if rank in (None, number) else None
