"""How much memory the run holds: the CUDA allocator's figures on a GPU, the process's on the CPU."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PROCESS_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class MemoryUse:
    """Bytes. Of a CUDA device: held by tensors; taken from the driver. Of a process: resident; address space."""

    allocated: int
    max_allocated: int
    reserved: int
    max_reserved: int
    num_allocations: int | None = None  # live blocks of the CUDA allocator


def memory_use(device: "torch.device") -> MemoryUse | None:
    """What this process holds now on a device, and the most so far; None where the system does not say."""
    if device.type == "cuda":
        return cuda_memory(device)
    try:
        return process_memory(PROCESS_STATUS.read_text(encoding="utf-8"))
    except OSError:  # it is not Linux, or no file can be opened any more
        return None


def cuda_memory(device: "torch.device") -> MemoryUse:
    import torch

    return MemoryUse(
        allocated=torch.cuda.memory_allocated(device),
        max_allocated=torch.cuda.max_memory_allocated(device),
        reserved=torch.cuda.memory_reserved(device),
        max_reserved=torch.cuda.max_memory_reserved(device),
        num_allocations=torch.cuda.memory_stats(device).get("allocation.all.current"),
    )


def process_memory(status: str) -> MemoryUse | None:
    """The figures in a Linux process's status file: resident set and its peak, address space and its peak."""
    kibibytes = {}
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            kibibytes[name] = int(value.removesuffix(" kB"))
    names = ("VmRSS", "VmHWM", "VmSize", "VmPeak")
    if not all(name in kibibytes for name in names):
        return None
    return MemoryUse(*(1024 * kibibytes[name] for name in names))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no more memory: Python's own, and torch's of a host or of a device.

    A thread that cannot be started lacks its stack, or a number of a process.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # With a reason behind it, a library that cannot be mapped lacks a permission.
    return str(error).endswith("failed to map segment from shared object") or any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "can't start new thread")
    )
