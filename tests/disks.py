"""Disks that do something at each of their operations: fail, kill the process, or keep a record."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from megalith.files import Disk

Moment = Literal["before", "after"]
# Called with the moment, the operation's name and the path that it is about.
Hook = Callable[[Moment, str, Path], None]


class HookedDisk(Disk):
    """Calls a hook before and after every operation."""

    def __init__(self, hook: Hook) -> None:
        self.hook = hook
        self.paths: dict[int, Path] = {}

    def create(self, path: Path) -> int:
        self.hook("before", "create", path)
        descriptor = super().create(path)
        self.paths[descriptor] = path
        self.hook("after", "create", path)
        return descriptor

    def open(self, path: Path) -> int:
        self.hook("before", "open", path)
        descriptor = super().open(path)
        self.paths[descriptor] = path
        self.hook("after", "open", path)
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        self.hook("before", "write", self.paths[descriptor])
        count = super().write(descriptor, data)
        self.hook("after", "write", self.paths[descriptor])
        return count

    def read(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        self.hook("before", "read", self.paths[descriptor])
        count = super().read(descriptor, buffer, offset)
        self.hook("after", "read", self.paths[descriptor])
        return count

    def sync(self, descriptor: int) -> None:
        self.hook("before", "sync", self.paths[descriptor])
        super().sync(descriptor)
        self.hook("after", "sync", self.paths[descriptor])

    def close(self, descriptor: int) -> None:
        # A close that fails has closed all the same.
        super().close(descriptor)
        path = self.paths.pop(descriptor)
        self.hook("before", "close", path)
        self.hook("after", "close", path)

    def rename(self, source: Path, target: Path) -> None:
        self.hook("before", "rename", target)
        super().rename(source, target)
        self.hook("after", "rename", target)

    def remove(self, path: Path) -> None:
        self.hook("before", "remove", path)
        super().remove(path)
        self.hook("after", "remove", path)

    def make_directory(self, path: Path) -> None:
        self.hook("before", "make_directory", path)
        super().make_directory(path)
        self.hook("after", "make_directory", path)

    def remove_directory(self, path: Path) -> None:
        self.hook("before", "remove_directory", path)
        super().remove_directory(path)
        self.hook("after", "remove_directory", path)


def recording_disk(record: list[tuple[Moment, str, Path]]) -> HookedDisk:
    """A disk that writes down what it does."""
    return HookedDisk(lambda moment, operation, path: record.append((moment, operation, path)))


def killing_disk(number: int) -> HookedDisk:
    """A disk that kills the process at the number-th moment, counted from 0."""
    moments = iter(range(number + 1))

    def hook(moment: Moment, operation: str, path: Path) -> None:
        if next(moments, None) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return HookedDisk(hook)


def failing_disk(number: int, code: int = errno.EIO, *, lasting: bool = False) -> HookedDisk:
    """A disk whose number-th operation, counted from 0, does nothing but raise; with lasting all after it too."""
    count = 0

    def hook(moment: Moment, operation: str, path: Path) -> None:
        nonlocal count
        if moment == "before":
            count += 1
            if count - 1 == number or (lasting and count - 1 > number):
                raise OSError(code, os.strerror(code), str(path))

    return HookedDisk(hook)
