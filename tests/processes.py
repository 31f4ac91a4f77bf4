"""What real processes leave behind and listen on, seen through /proc."""

import ctypes
import os
import socket
import time
from pathlib import Path
from typing import NamedTuple

LEAKED = "megalith-leak-"  # begins what a test leaves in shared memory on purpose; then the number of its process
MARK = "MEGALITH_TEST_MARK"  # a variable by whose value the processes of a test are known, children included


def marked(value: str) -> list[int]:
    """The living processes that were started with this mark."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            state = (entry / "stat").read_bytes().rpartition(b") ")[2][:1]
        except OSError:  # it has ended, or is another user's
            continue
        if f"{MARK}={value}".encode() in environment and state not in (b"Z", b"X"):
            found.append(int(entry.name))
    return found


def seconds_until_gone(value: str, *, limit: float = 30.0) -> float:
    """How long it takes until no process has the mark; AssertionError if that takes too long."""
    began = time.monotonic()
    while left := marked(value):
        assert time.monotonic() - began < limit, f"processes {left} are still there"
        time.sleep(0.02)
    return time.monotonic() - began


class Listener(NamedTuple):
    """A socket that waits for connections."""

    pid: int
    address: str

    @property
    def is_local(self) -> bool:
        return self.address.startswith("127.") or self.address in ("::1", "::ffff:127.0.0.1")


def listeners(pids: list[int]) -> list[Listener]:
    """The TCP sockets on which these processes listen."""
    owners = {}
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(descriptor)
            except OSError:
                continue
            if target.startswith("socket:["):
                owners[target[8:-1]] = pid
    found = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in owners:
                words = bytes.fromhex(fields[1].split(":")[0])
                # Each word of four bytes is printed as a number of this machine.
                address = b"".join(words[place : place + 4][::-1] for place in range(0, len(words), 4))
                found.append(Listener(owners[fields[9]], socket.inet_ntop(family, address)))
    return found


def shared_memory() -> set[str]:
    """The names in the folder of shared memory, and of torch's sockets and stores in the temporary one.

    Without the folders and files of tests, of which others may run beside this process.
    """
    of_tests = ("megalith-test-", "megalith-faults-", LEAKED)
    names = {f"/dev/shm/{name}" for name in os.listdir("/dev/shm") if not name.startswith(of_tests)}
    return names | {f"/tmp/{name}" for name in os.listdir("/tmp") if name.startswith(("torch", "megalith", "pymp"))}


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def give_up_privileges() -> None:
    """From now on what permissions forbid is forbidden to this process, even if it is root's; not to be undone.

    Its user stays, so it may still read what only root may.
    """
    # From linux/capability.h: version 3, and two words each of effective, permitted and inheritable ones.
    header, none = _CapabilityHeader(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(ctypes.byref(header), ctypes.byref(none)):
        raise OSError(ctypes.get_errno(), "capset failed")


def permissions_hold(folder: Path) -> bool:
    """Whether a child that has given up its privileges is stopped by permissions, tried in a folder."""
    (folder / "closed").mkdir(mode=0o555)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            give_up_privileges()
            (folder / "closed" / "inside").mkdir()
        except PermissionError:
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1] == 0
