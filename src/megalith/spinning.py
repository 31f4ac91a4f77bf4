"""How long a thread of torch's that waits for others looks for them before it sleeps.

Of itself libgomp (OpenMP) looks 300,000 times, some 3 ms: a slice of time, which a busy machine takes from those that
are waited for, so that two threads may be a twentieth as fast as one. Less costs nothing where each thread has a core
and the gap between two operations is bridged; where it is not, every wait is a call to the kernel.
"""

import os
import time
from pathlib import Path

SPINS, SPINS_BESIDE_OTHERS = 10_000, 1_000  # 0.1 ms and 0.01 ms
BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # variables, of which either settles it
LOOKS, SECONDS_BETWEEN = 4, 0.005
KERNEL_STATISTICS = Path("/proc/stat")


def spin_shortly() -> None:
    """Settle it for this process and those that it starts, unless the user has; before torch is imported."""
    if not any(name in os.environ for name in BY_USER):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS_BESIDE_OTHERS if others_run() else SPINS)


def others_run() -> bool:
    """Whether something else computes on this machine at each of a few looks; False where the system does not say."""
    for look in range(LOOKS):
        if look:
            time.sleep(SECONDS_BETWEEN)
        if num_running() < 2:
            return False
    return True


def num_running() -> int:
    """Threads of all processes that run or wait for a core, this one among them; 0 if it is not known."""
    try:
        lines = KERNEL_STATISTICS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("procs_running ")), 0)
