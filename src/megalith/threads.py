"""The threads that torch computes with, in a process that was forked from one in which they had run.

A fork copies the pool of the OpenMP library but not its threads: the first operation that the child shares out among
them waits for ever. So such a child computes with one thread; one that is started by exec or spawn is not concerned.
"""

import os
from pathlib import Path

import torch

_FORKED_WITHOUT_EXEC = 0x40  # PF_FORKNOEXEC of linux/sched.h
_FLAGS = 6  # place among the fields of /proc/PID/stat that follow the name, see proc(5)


def is_forked() -> bool:
    """Whether this process is a copy of another that has run no program of its own since; False if nobody knows."""
    try:
        fields = Path(f"/proc/{os.getpid()}/stat").read_bytes().rpartition(b") ")[2].split()
    except OSError:
        return False
    return bool(int(fields[_FLAGS]) & _FORKED_WITHOUT_EXEC)


def leave_threads_of_parent() -> int:
    """Compute with one thread from now on if this process is forked; how many it would have been, 0 if that was one."""
    inherited = torch.get_num_threads()
    if inherited == 1 or not is_forked():
        return 0
    torch.set_num_threads(1)
    return inherited
