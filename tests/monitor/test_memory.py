"""Memory figures come from the system, and mean what they say."""

import mmap
from pathlib import Path

import pytest
import torch

from megalith.monitor import memory
from megalith.monitor.memory import MemoryUse, memory_use, process_memory


def test_the_process_is_measured_by_its_resident_set_and_address_space() -> None:
    status = "Name:\tpython\nVmPeak:\t  400 kB\nVmSize:\t  300 kB\nVmHWM:\t  200 kB\nVmRSS:\t  100 kB\nThreads:\t1\n"
    assert process_memory(status) == MemoryUse(100 << 10, 200 << 10, 300 << 10, 400 << 10)


def test_a_system_that_does_not_say_gives_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_memory("Name:\tpython\n") is None
    monkeypatch.setattr(memory, "PROCESS_STATUS", tmp_path / "absent")
    assert memory_use(torch.device("cpu")) is None


@pytest.mark.skipif(not memory.PROCESS_STATUS.exists(), reason="only Linux has /proc")
def test_memory_that_is_used_is_seen() -> None:
    before = memory_use(torch.device("cpu"))
    # Straight from the kernel: the allocator may have memory left from earlier tests.
    with mmap.mmap(-1, 64 << 20) as held:
        held.write(b"x" * (64 << 20))
        after = memory_use(torch.device("cpu"))
    assert before is not None and after is not None
    assert after.allocated - before.allocated > 48 << 20
    assert after.max_allocated >= after.allocated > 0 and after.max_reserved >= after.reserved >= after.allocated
