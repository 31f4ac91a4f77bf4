"""The descriptors of a process: the three standard ones are open, and there are as many as the system allows.

Where a standard one is closed, the next file that is opened takes its number, and what is said on it would be written
into that file.
"""

import errno
import os
import resource
import sys
from contextlib import suppress

STANDARD = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))  # by descriptor: its stream in sys, and how it is opened


def open_standard_streams() -> set[str]:
    """Let each standard stream that is closed read nothing and write nowhere; give their names: stdin, stdout, stderr.

    To be called before anything is opened. Processes that are started later inherit them.
    """
    closed = set()
    for descriptor, (name, mode) in enumerate(STANDARD):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            assert nowhere == descriptor
            os.set_inheritable(nowhere, True)
            closed.add(name)
        if getattr(sys, name) is None:
            stream = os.fdopen(descriptor, mode, encoding="utf-8", errors="backslashreplace", closefd=False)
            setattr(sys, name, stream)
    return closed


def allow_most_descriptors() -> None:
    """Raise the limit of open files of this process, and of those that it starts, as far as it may by itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def descriptor_remedy(said: str) -> str | None:
    """What to do, as sentences, if an error says that no more files can be opened; None if it says something else.

    said: in the system's words, which libraries repeat in theirs.
    """
    if os.strerror(errno.ENFILE) in said:
        return "The machine has as many files open as it may (fs.file-max). End what leaves files open, or raise that."
    if os.strerror(errno.EMFILE) in said:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"This process may have {limit} files open at once (ulimit -n). Raise the limit, as with ulimit -n 4096."
    return None
