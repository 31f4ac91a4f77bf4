"""Files that are whole or absent: the only way by which Megalith writes what must not be lost.

A file is written under a temporary name beside its place, synced, renamed into place, and the directory synced. Whoever
finds the name finds the whole content, whatever was killed when. Every operation on the disk goes through a `Disk`, so
that a test can hand in one that fails, kills the process, or records, at any operation. POSIX file systems only.
"""

import errno
import fcntl
import hashlib
import io
import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias, overload

Location: TypeAlias = str | os.PathLike[str]
Bytes: TypeAlias = bytes | bytearray | memoryview

READ_SIZE = 8 << 20  # bytes per read when a file is digested
BUFFER_SIZE = 1 << 20  # bytes gathered before a streaming writer calls the disk
TEMPORARY_SUFFIX = ".tmp"
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})  # the errors of a disk or a quota that is full


def open_at_once(path: Location) -> int:
    """A descriptor open for reading, also of a named pipe, for whose writer open() would wait."""
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


class Disk:
    """The operations through which files reach the disk; stateless, each raises OSError. Tests subclass it."""

    def create(self, path: Path) -> int:
        """A descriptor of a new file, open for writing; never follows a link or reuses a file.

        Not everybody can write to it, whatever the umask.
        """
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o664)

    def open(self, path: Path) -> int:
        """A descriptor of an existing regular file or directory, open for reading; never follows a link at its end."""
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write a part of data, at least one byte; give how many."""
        return os.write(descriptor, data)

    def read(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        """Fill a part of buffer from the file's byte offset on; give how many bytes, 0 at the end."""
        return os.preadv(descriptor, [buffer], offset)

    def sync(self, descriptor: int) -> None:
        """Return when the file or directory is on the medium."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give source the name target, in one step; a file of that name is replaced, a directory only if empty."""
        os.rename(source, target)

    def remove(self, path: Path) -> None:
        """Remove a file or link."""
        os.unlink(path)

    def make_directory(self, path: Path) -> None:
        """Make a directory that not everybody can write to, whatever the umask."""
        os.mkdir(path, 0o775)

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory."""
        os.rmdir(path)

    def lock(self, descriptor: int) -> None:
        """Take the lock of a file or directory until it is closed; BlockingIOError if another process has it."""
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def free_bytes(self, path: Path) -> int:
        """Bytes that may still be written to the file system of path; sys.maxsize if it does not say."""
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize if status.f_blocks else sys.maxsize


DISK = Disk()


@dataclass(frozen=True)
class Written:
    """What reached a file: its size in bytes and the SHA-256 of the bytes handed to the disk, in hexadecimal."""

    size: int
    digest: str


class _DigestedFile(io.RawIOBase):
    """A new file that is written from start to end, through a disk, and digested on the way."""

    def __init__(self, path: Path, descriptor: int, disk: Disk) -> None:
        self._path = path
        self._descriptor = descriptor
        self._disk = disk
        self._size = 0
        self._sha256 = hashlib.sha256()

    @property
    def written(self) -> Written:
        return Written(self._size, self._sha256.hexdigest())

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any, /) -> int:
        """Write all of data (the disk itself may take it in parts); the error names the file."""
        view = memoryview(data)
        if not view.nbytes:
            return 0  # an empty view of several dimensions cannot be cast
        rest = view.cast("B")
        self._sha256.update(rest)
        size = len(rest)
        while rest:
            rest = rest[self._named(self._disk.write, rest) :]
        self._size += size
        return size

    def sync(self) -> None:
        self._named(self._disk.sync)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._named(self._disk.close)

    def _named(self, operation: Any, *arguments: Any) -> Any:
        with naming(self._path):
            return operation(self._descriptor, *arguments)


@contextmanager
def naming(path: Location) -> Iterator[None]:
    """Let an OSError about a descriptor say which file it is about."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_whole(path: Location, data: Bytes | str, *, disk: Disk = DISK) -> Written:
    """Put data (text as UTF-8) under the name path, replacing what was there; whole or not at all."""
    return write_parts(path, [data.encode() if isinstance(data, str) else data], disk=disk)


def write_parts(path: Location, parts: Iterable[Bytes], *, disk: Disk = DISK) -> Written:
    """Put the parts, one after the other, under the name path; whole or not at all. Memory: one part at a time."""
    with _replaced(Path(path), disk) as file:
        for part in parts:
            file.write(part)
    return file.written


@overload
def open_whole(
    path: Location, mode: Literal["wb"] = "wb", *, disk: Disk = DISK
) -> AbstractContextManager[IO[bytes]]: ...
@overload
def open_whole(path: Location, mode: Literal["w"], *, disk: Disk = DISK) -> AbstractContextManager[IO[str]]: ...
def open_whole(path: Location, mode: str = "wb", *, disk: Disk = DISK) -> AbstractContextManager[IO[Any]]:
    """A buffered file to write from start to end; it gets the name path when the `with` block ends without an error.

    mode is "wb", or "w" for UTF-8 text with unchanged line ends. The file cannot be read or sought and has no
    descriptor, so arrays are written by `file.write(array.data)`. If the block raises, nothing is left and what was
    there stays.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f'mode={mode!r} must be "wb" (bytes) or "w" (text)')
    return _opened(Path(path), text=mode == "w", disk=disk)


@contextmanager
def _opened(path: Path, *, text: bool, disk: Disk) -> Iterator[IO[Any]]:
    with _replaced(path, disk) as file:
        buffered = io.BufferedWriter(file, BUFFER_SIZE)
        if not text:
            yield buffered
            buffered.flush()
            return
        encoded = io.TextIOWrapper(buffered, encoding="utf-8", newline="")
        yield encoded
        encoded.flush()


@contextmanager
def _replaced(path: Path, disk: Disk) -> Iterator[_DigestedFile]:
    """A new file beside path that takes its name at the end, or is removed if the block or a step of the end fails."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    file = _DigestedFile(temporary, disk.create(temporary), disk)
    renamed = False
    try:
        yield file
        file.sync()
        file.close()
        disk.rename(temporary, path)
        renamed = True
        sync_directory(path.parent, disk=disk)
    finally:
        # Whatever failed is on its way up already; a failing clean-up must not take its place.
        if not renamed:
            with suppress(OSError):
                file.close()
            with suppress(OSError):
                disk.remove(temporary)


def name_at_the_end(path: Location) -> Path:
    """What a file will be called that is written under a temporary name; any other path as it is."""
    written = Path(path)
    if written.suffix == TEMPORARY_SUFFIX and written.name.startswith(".") and written.name.count(".") > 2:
        return written.with_name(written.name[1:].rsplit(".", 2)[0])
    return written


def open_directory(path: Location, *, disk: Disk) -> int:
    """A descriptor of a directory, to sync or to lock it; one that a user names may be a link, and is followed."""
    return disk.open(Path(os.path.realpath(path) if os.path.islink(path) else path))


def sync_directory(path: Location, *, disk: Disk = DISK) -> None:
    """Return when the names in a directory are on the medium; without it a rename may be undone by a power loss."""
    descriptor = open_directory(path, disk=disk)
    try:
        disk.sync(descriptor)
    finally:
        disk.close(descriptor)


def make_directories(path: Location, *, disk: Disk = DISK) -> None:
    """Make a directory and those above it that are missing, so that they are on the medium; it may exist."""
    missing = []
    directory = Path(path)
    while not directory.is_dir():
        missing.append(directory)
        directory = directory.parent
    for directory in reversed(missing):
        # Another rank may make it at the same time.
        with suppress(FileExistsError):
            disk.make_directory(directory)
        sync_directory(directory.parent, disk=disk)


def digest_of(path: Location, *, disk: Disk = DISK) -> Written:
    """Size and SHA-256 of a file as it lies on the disk."""
    sha256 = hashlib.sha256()
    buffer = memoryview(bytearray(READ_SIZE))
    size = 0
    descriptor = disk.open(Path(path))
    try:
        with naming(path):
            while num_read := disk.read(descriptor, buffer, size):
                sha256.update(buffer[:num_read])
                size += num_read
    finally:
        disk.close(descriptor)
    return Written(size, sha256.hexdigest())


def digest_of_bytes(data: Bytes | str) -> str:
    """SHA-256 of data (text as UTF-8) in hexadecimal."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()
