"""Files are whole or absent, whatever fails."""

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalith.files import (
    Disk,
    Written,
    digest_of,
    digest_of_bytes,
    make_directories,
    open_whole,
    sync_directory,
    write_parts,
    write_whole,
)


class FailingDisk(Disk):
    """Raises an error at the n-th call of the named operation, and takes at most `portion` bytes per write."""

    def __init__(self, operation: str = "", call: int = 1, code: int = errno.EIO, portion: int = 1 << 40) -> None:
        self.operation, self.calls_left, self.code, self.portion = operation, call, code, portion

    def _count(self, operation: str) -> None:
        if operation == self.operation:
            self.calls_left -= 1
            if self.calls_left == 0:
                raise OSError(self.code, os.strerror(self.code))

    def create(self, path: Path) -> int:
        self._count("create")
        return super().create(path)

    def open(self, path: Path) -> int:
        self._count("open")
        return super().open(path)

    def write(self, descriptor: int, data: memoryview) -> int:
        self._count("write")
        return super().write(descriptor, data[: self.portion])

    def sync(self, descriptor: int) -> None:
        self._count("sync")
        super().sync(descriptor)

    def close(self, descriptor: int) -> None:
        super().close(descriptor)
        self._count("close")

    def rename(self, source: Path, target: Path) -> None:
        self._count("rename")
        super().rename(source, target)


def test_written_bytes_are_read_back_and_digested(tmp_path: Path) -> None:
    data = np.arange(100_000, dtype=np.int64)
    written = write_whole(tmp_path / "a", data.tobytes(), disk=FailingDisk(portion=999))
    assert (tmp_path / "a").read_bytes() == data.tobytes()
    assert written == Written(800_000, hashlib.sha256(data.tobytes()).hexdigest()) == digest_of(tmp_path / "a")
    assert written.digest == digest_of_bytes(data.tobytes())


def test_parts_stand_one_after_the_other(tmp_path: Path) -> None:
    written = write_parts(tmp_path / "a", (bytes([number]) * number for number in range(4)))
    assert (tmp_path / "a").read_bytes() == b"\x01\x02\x02\x03\x03\x03"
    assert written == digest_of(tmp_path / "a")


def test_arrays_of_any_shape_are_parts(tmp_path: Path) -> None:
    arrays: list[np.ndarray[Any, Any]] = [np.zeros((0, 3)), np.ones((2, 1, 2), np.float32), np.array(1.0)]
    written = write_parts(tmp_path / "a", [array.data for array in arrays])
    assert written == Written(24, digest_of_bytes(b"".join(array.tobytes() for array in arrays)))


def test_text_is_utf_8_with_unchanged_line_ends(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "é\r\n\n")
    with open_whole(tmp_path / "b", "w") as file:
        file.write("é\r\n\n")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b"\xc3\xa9\r\n\n"


def test_a_streamed_file_appears_only_at_the_end(tmp_path: Path) -> None:
    with open_whole(tmp_path / "a") as file:
        for number in range(5):
            file.write(np.full(1 << 18, number, dtype=np.uint16).data)
        assert not (tmp_path / "a").exists()
    assert np.array_equal(np.fromfile(tmp_path / "a", np.uint16), np.repeat(np.arange(5, dtype=np.uint16), 1 << 18))
    assert os.listdir(tmp_path) == ["a"]


def test_a_failing_block_leaves_what_was_there(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), open_whole(tmp_path / "a") as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("operation", ["create", "write", "sync", "close", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_failing_disk_leaves_what_was_there(tmp_path: Path, operation: str, code: int) -> None:
    write_whole(tmp_path / "a", "old")
    with pytest.raises(OSError) as raised:
        write_whole(tmp_path / "a", "new", disk=FailingDisk(operation, code=code))
    assert raised.value.errno == code
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_write_error_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: '.*\.a\..*\.tmp'"):
        write_whole(tmp_path / "a", "new", disk=FailingDisk("write", code=errno.ENOSPC))


def test_a_name_is_reported_written_only_when_its_directory_is_synced(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        write_whole(tmp_path / "a", "new", disk=FailingDisk("sync", call=2))
    with pytest.raises(OSError):
        sync_directory(tmp_path, disk=FailingDisk("open"))


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for operation in ("create", "write", "sync", "close", "rename"):
        with pytest.raises(OSError):
            write_whole(tmp_path / "a", "new", disk=FailingDisk(operation))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_link_is_replaced_and_never_written_through(tmp_path: Path) -> None:
    write_whole(tmp_path / "target", "precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "target").read_text() == "precious"
    (tmp_path / "other").symlink_to(tmp_path / "target")
    with pytest.raises(OSError):
        digest_of(tmp_path / "other")


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mode='rb' must be"):
        open_whole(tmp_path / "a", "rb")  # type: ignore[call-overload]


def test_directories_are_made_once_and_never_writable_for_everybody(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_directories(tmp_path / "a" / "b")
        make_directories(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o775
    write_whole(tmp_path / "file", "")
    with pytest.raises(OSError):
        make_directories(tmp_path / "file" / "b")
