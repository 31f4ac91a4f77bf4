"""What was found out about data files that are too large for every process of a job to look at.

A look that reads every byte or every item of a file is made once; what it gives is kept under what was looked at, the
file's size, inode and times of change among it. A process that is told another's findings takes those of the files that
it sees as the other saw them, and looks at all else itself: at files of its own host, or at what was changed since.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megalith.files import DISK, Disk, Location, Written, digest_of


def nothing() -> None:
    """For who need not know that something goes on."""


def silent(text: str) -> None:
    """For who has nothing to say to anybody."""


class Survey:
    """Findings about files, and who is to know of the survey while it lasts.

    told: findings of another process. moved: called whenever it has got on, so that nobody takes it for hung. say:
    called with what a person should know of a long wait.
    """

    def __init__(
        self,
        told: Mapping[str, Any] | None = None,
        *,
        moved: Callable[[], None] = nothing,
        say: Callable[[str], None] = silent,
    ) -> None:
        self.findings = dict(told or {})
        self.moved, self.say = moved, say

    def find(self, what: str, look: Callable[[], Any], *files: Location) -> Any:
        """What a look at files gives, a JSON value; the look is made if nobody has found it before.

        what: everything but the files that the result depends on.
        """
        key = "; ".join([what, *map(seen, files)])
        if key not in self.findings:
            self.findings[key] = look()
            self.moved()
        return self.findings[key]

    def digest(self, file: Path, *, disk: Disk = DISK) -> Written:
        """Size and SHA-256 of a file; OSError if it cannot be read."""
        return Written(*self.find("size and SHA-256", lambda: _digest(file, disk), file))


def _digest(path: Path, disk: Disk) -> list[Any]:
    found = digest_of(path, disk=disk)
    return [found.size, found.digest]


def seen(path: Location) -> str:
    """The file of that name as it is now: any other content shows, unless somebody has set out to hide it."""
    try:
        status = os.stat(path)
    except OSError as error:
        return f"{path} ({error.strerror})"
    changed = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    return f"{path} ({status.st_size} bytes, inode {status.st_ino}, changed {changed})"
