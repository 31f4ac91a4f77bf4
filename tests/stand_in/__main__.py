"""Megalith's command beside a CUDA device that is not there: python -m tests.stand_in LIBRARY COMMAND ...

LIBRARY: device.cpp, compiled. The last line on stderr says how often the host waited for the device.
"""

import ctypes
import sys

if __name__ == "__main__":
    library, *words = sys.argv[1:]
    # As if it were not installed: its kernels need the device.
    sys.modules["triton"] = None  # type: ignore[assignment]
    ctypes.CDLL(library)  # before torch, which asks once what devices there are

    from tests.stand_in import tensors

    with tensors.stand_in():
        from megalith.cli import main

        status = main(words)
    print(f"waits: {tensors.waits}", file=sys.stderr)
    sys.exit(status)
