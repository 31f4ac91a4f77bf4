"""A disk that fails at a chosen operation, for the tests of what is left then."""

import errno
import os
from pathlib import Path

from megalith.files import Disk


class FailingDisk(Disk):
    """Counts what changes the disk, and fails at one of these operations; notes the names that files get."""

    def __init__(self, fails_at: int = 0) -> None:
        self.fails_at = fails_at
        self.operations = 0
        self.named: list[str] = []

    def _operate(self) -> None:
        self.operations += 1
        if self.operations == self.fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def create(self, path: Path) -> int:
        self._operate()
        return super().create(path)

    def write(self, descriptor: int, data: memoryview) -> int:
        self._operate()
        return super().write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        self._operate()
        super().sync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        self._operate()
        super().rename(source, target)
        self.named.append(target.name)

    def remove(self, path: Path) -> None:
        # Failing once is enough: a clean-up that fails too is another matter.
        super().remove(path)
