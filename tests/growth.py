"""What a process holds, read from /proc at many steps of a training, and whether any of it grows.

Descriptors, threads, children and entries of shared memory must not grow at all once a run is warm: what stands open at
every reading of the second half must have stood open in the first. What is there for a moment only (a heartbeat's file)
is not at every reading. Memory is noisy, so its growth is a slope: the median over all pairs of readings (Theil and
Sen), which no single jump can move.
"""

import json
import os
import statistics
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import megalith.train
from megalith.job import Job
from megalith.keeper import Keeper
from megalith.monitor.events import StepDone
from megalith.monitor.watch import Watch
from tests.processes import LEAKED

COUNTED = ("descriptors", "threads", "children", "shared")
MOST_GROWTH = 0.01  # of the resident memory, in a thousand steps


@dataclass(frozen=True)
class Reading:
    """What a process holds after a step."""

    step: int
    descriptors: int
    threads: int
    children: int  # zombies included
    shared: int  # entries of /dev/shm that are nobody else's and were not there at the start
    resident: int  # bytes


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) - 1  # one is that of the list itself


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def num_children() -> int:
    """Living and dead ones that nobody has waited for."""
    me, found = os.getpid(), 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            found += int(Path(f"/proc/{name}/stat").read_bytes().rpartition(b") ")[2].split()[1]) == me
    return found


def shared_entries() -> set[str]:
    """Of files; what other tests beside this process leak on purpose is not in it."""
    files = [entry for entry in os.scandir("/dev/shm") if entry.is_file(follow_symlinks=False)]
    own = f"{LEAKED}{os.getpid()}-"
    return {entry.path for entry in files if not entry.name.startswith(LEAKED) or entry.name.startswith(own)}


def own_shared(before: set[str]) -> int:
    """Entries that were not there before and that no process but this has open."""
    new = shared_entries() - before
    return len(new - open_elsewhere()) if new else 0


def open_elsewhere() -> set[str]:
    """The files that other processes have open."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        if int(name) != os.getpid():
            with suppress(OSError):
                found |= {os.readlink(entry.path) for entry in os.scandir(f"/proc/{name}/fd")}
    return found


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def read_each(interval: int, to: Path) -> None:
    """From now on, write down what this process holds after every interval-th step, no checkpoint being written."""
    before, take_step, look = shared_entries(), megalith.train.take_step, Watch.look
    looked = threading.Event()
    descriptor = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def looking(watch: Watch, elapsed: float) -> None:
        look(watch, elapsed)
        looked.set()

    def reading(job: Job, keeper: Keeper) -> StepDone:
        if job.progress.step % interval == 0:
            assert looked.wait(60)  # with the first look the interpreter's own watchdog begins, a thread
            keeper.settle()
            counts = (num_descriptors(), num_threads(), num_children(), own_shared(before))
            found = Reading(job.progress.step, *counts, resident_bytes())
            os.write(descriptor, f"{json.dumps(asdict(found))}\n".encode())
        return take_step(job, keeper)

    setattr(Watch, "look", looking)  # noqa: B010 - mypy forbids to assign a method
    megalith.train.take_step = reading


def readings_in(path: Path) -> list[Reading]:
    return [Reading(**json.loads(line)) for line in path.read_text().splitlines()]


def slope(readings: Sequence[Reading]) -> float:
    """Bytes of resident memory that a step adds: the median over all pairs of readings."""
    pairs = combinations(readings, 2)
    return statistics.median((b.resident - a.resident) / (b.step - a.step) for a, b in pairs)


def growth(readings: Sequence[Reading]) -> float:
    """Share by which the resident memory grows in a thousand steps, from the second half of the readings."""
    late = readings[len(readings) // 2 :]
    return 1000 * slope(late) / statistics.median(reading.resident for reading in late)


def growing(readings: Sequence[Reading], *, warm: int, memory: bool = True) -> Iterator[str]:
    """What grows, by name. warm: the first step of the first half; memory: is judged, too."""
    late = [reading for reading in readings if reading.step >= warm]
    middle = len(late) // 2
    for name in COUNTED:
        first, second = (min(getattr(reading, name) for reading in half) for half in (late[:middle], late[middle:]))
        if second > first:
            yield name
    if memory and growth(readings) >= MOST_GROWTH:
        yield "resident"
