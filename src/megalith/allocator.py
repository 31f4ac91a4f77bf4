"""The host's memory allocator, told to keep what is given back.

A training step takes and gives back the same large buffers again and again. By default the C library returns each to
the kernel, which hands it out page by page, zeroed, at the next step. Kept, they are there already.
"""

import ctypes
import os

# Of mallopt(3) in glibc.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4
_NEVER = -1


def keep_freed_memory() -> bool:
    """Let malloc keep freed memory for its next use, for this process and for good; whether that could be done.

    It is left alone where another allocator is preloaded, where the environment sets malloc's own variables, and where
    the C library is not glibc.
    """
    chosen = ("LD_PRELOAD", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    if any(os.environ.get(name) for name in chosen):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _NEVER))
