"""Arrays kept beside the data: built once however many processes start, and again when they do not fit any more.

A small JSON file beside the arrays records what they were made from and the digest of each, and whatever disagrees is
rebuilt. Arrays without that record, as Megatron-LM leaves them, are rebuilt too: their bytes stay the same if they were
right. A build is deterministic and a file takes its name in one step, so a race can only cost time; a lock keeps it
from doing that. The lock is the kernel's: it ends with its owner, so whoever finds it held waits for a process that
lives, however long that takes, and whoever gets it builds.
"""

import errno
import fcntl
import io
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from megalith.data.survey import Survey
from megalith.files import (
    DISK,
    TEMPORARY_SUFFIX,
    Disk,
    Location,
    Written,
    digest_of_bytes,
    open_at_once,
    write_parts,
    write_whole,
)

LARGEST_RECORD = 64 << 10  # bytes of the JSON file
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0  # seconds between two looks at what another process builds
SECONDS_UNTIL_TOLD = 60.0  # of waiting for it; then after twice as long each time
SPARE_BYTES = 1 << 20  # wanted on the disk beyond the arrays

UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}

# Gives the arrays by name, each when it is asked for, in the order in which they are written.
Build: TypeAlias = Callable[[], Iterator[tuple[str, NDArray[Any]]]]


class _UnfitError(Exception):
    """The stored arrays are not what is needed; says why."""


@dataclass(frozen=True)
class Wanted:
    """Arrays that are asked for, and the files that keep them.

    noun: what they are, for errors. made_from: all that they depend on, fit for JSON. paths: of each array. num_bytes:
    that they will take, as far as that is known before. notes: more for the record, of which nothing depends.
    """

    noun: str
    made_from: Mapping[str, Any]
    paths: Mapping[str, Path]
    record: Path
    lock: Path
    num_bytes: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)
    disk: Disk = DISK


@dataclass(frozen=True)
class Kept:
    """The arrays, mapped read-only from their files, and how they were come by."""

    arrays: dict[str, NDArray[Any]]
    rebuilt_because: str  # empty if they were only loaded, by this process and by whoever told of its findings
    seconds: dict[str, float]  # of each array, if built: building and saving; wait: for another process; load


def folder_for(prefix: Location, made_from: Mapping[str, Any], cache_path: Location | None) -> Path:
    """Where arrays made of the token file with this prefix are kept: beside it, or in a cache directory.

    There each set has a folder of its own: many data sets may share that directory, also under equal names.
    """
    prefix = Path(prefix)
    if cache_path is None:
        return prefix.parent
    directory = Path(cache_path) / f"{prefix.name}-{digest_of_bytes(json.dumps(made_from))[:16]}"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def load_or_build(wanted: Wanted, build: Build, survey: Survey) -> Kept:
    """The arrays, from their files if these were made from what is asked for; else built, written and then loaded.

    Bytes that the survey knows are not read again. A process that finds another one building waits for it and says so.
    Raises ValueError if the directory cannot be written, OSError naming need and free space if the disk is full.
    """
    kept = _wait_or_build(wanted, build, survey)
    # Who is told is told of the building, too.
    reason, made = survey.find(
        "how they were made",
        lambda: [kept.rebuilt_because, {name: kept.seconds[name] for name in wanted.paths if name in kept.seconds}],
        wanted.record,
    )
    return Kept(kept.arrays, reason, {**made, **kept.seconds})


def _wait_or_build(wanted: Wanted, build: Build, survey: Survey) -> Kept:
    started = time.monotonic()
    pause, until_told = FIRST_PAUSE, SECONDS_UNTIL_TOLD
    while True:
        asked = time.monotonic()
        try:
            arrays = _load(wanted, survey)
            return Kept(arrays, "", {"wait": asked - started, "load": time.monotonic() - asked})
        except _UnfitError as unfit:
            reason = str(unfit)
        with _lock(wanted.lock, wanted.noun) as owned:
            if owned:
                return _build_or_load(wanted, build, reason, survey, wait=time.monotonic() - started)
        if (waited := time.monotonic() - started) >= until_told:
            survey.say(
                f"{wanted.lock}: {_owner(wanted.lock)} is building {wanted.noun}; waited for it for {waited:.0f} s; "
                "if it hangs, end it, and this process builds them"
            )
            until_told *= 2
        # The kernel says that the other one lives, and its own watch ends it should it hang.
        survey.moved()
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _load(wanted: Wanted, survey: Survey) -> dict[str, NDArray[Any]]:
    """The stored arrays, mapped read-only; _UnfitError unless made from what is asked for, every byte as written."""
    written = _recorded_files(wanted)
    for name, path in wanted.paths.items():
        try:
            found = survey.digest(path, disk=wanted.disk)
        except OSError as error:
            raise _UnfitError(f"{path} cannot be read ({error.strerror})") from error
        if found != written[name]:
            raise _UnfitError(f"{path} is damaged")
    try:
        # Not np.load, which takes what is no array for an archive or a pickle.
        return {name: np.lib.format.open_memmap(path, "r").view(np.ndarray) for name, path in wanted.paths.items()}
    except (ValueError, OverflowError) as error:
        # As recorded, yet no array that fits its file: whoever wrote that is not believed either.
        raise _UnfitError(f"they are no arrays ({error!s:.80})") from error


def _recorded_files(wanted: Wanted) -> dict[str, Written]:
    """What the record says of the arrays; _UnfitError unless they were made from what is asked for."""
    try:
        with open(open_at_once(wanted.record), "rb") as file:
            text = file.read(LARGEST_RECORD)
        record = json.loads(text)
    except FileNotFoundError as error:
        found = any(path.exists() for path in wanted.paths.values())
        raise _UnfitError("nothing says what they were made from" if found else "there were none") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _UnfitError(f"{wanted.record} cannot be read") from error
    if not isinstance(record, dict) or record.get("made_from") != wanted.made_from:
        raise _UnfitError("they were made from other data or settings")
    try:
        files = record["files"]
        return {name: Written(files[name]["size"], files[name]["sha256"]) for name in wanted.paths}
    except (KeyError, TypeError) as error:
        raise _UnfitError(f"{wanted.record} is damaged") from error


def _build_or_load(wanted: Wanted, build: Build, reason: str, survey: Survey, *, wait: float) -> Kept:
    """Build the arrays, unless another process has done so since; only for the owner of the lock."""
    seconds = {"wait": wait}
    try:
        asked = time.monotonic()
        arrays = _load(wanted, survey)
        reason = ""
    except _UnfitError:
        seconds |= _build(wanted, build, survey)
        asked = time.monotonic()
        try:
            arrays = _load(wanted, survey)
        except _UnfitError as unfit:
            raise OSError(errno.EIO, f"{wanted.noun} were written but {unfit}", str(wanted.record)) from unfit
    return Kept(arrays, reason, {**seconds, "load": time.monotonic() - asked})


def _build(wanted: Wanted, build: Build, survey: Survey) -> dict[str, float]:
    """Write the arrays, then the record; give the seconds each took."""
    with _said_what_is_missing(wanted):
        _remove_remains(wanted)
        if wanted.disk.free_bytes(wanted.record.parent) < wanted.num_bytes + SPARE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(wanted.record.parent))
        seconds, files = {}, {}
        started = time.monotonic()
        for name, array in build():
            written = _write_array(wanted.paths[name], array, wanted.disk)
            files[name] = {"size": written.size, "sha256": written.digest}
            seconds[name] = time.monotonic() - started
            survey.moved()
            started = time.monotonic()
        record = {"made_from": wanted.made_from, **wanted.notes, "files": files}
        write_whole(wanted.record, json.dumps(record, indent=1) + "\n", disk=wanted.disk)
    return seconds


def _write_array(path: Path, array: NDArray[Any], disk: Disk) -> Written:
    """The bytes that numpy.save would write."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return write_parts(path, [header.getvalue(), array.data if array.size else b""], disk=disk)


def _remove_remains(wanted: Wanted) -> None:
    """Remove the record first, so that nobody believes a half-replaced set, and what a killed builder left."""
    if wanted.record.exists():
        wanted.disk.remove(wanted.record)
    for path in (*wanted.paths.values(), wanted.record):
        for remains in path.parent.glob(f".{path.name}.*{TEMPORARY_SUFFIX}"):
            wanted.disk.remove(remains)


@contextmanager
def _said_what_is_missing(wanted: Wanted) -> Iterator[None]:
    """Add to a failure to write what would have been needed."""
    directory = wanted.record.parent
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            free = wanted.disk.free_bytes(directory)
            need = f"{wanted.noun} need {wanted.num_bytes + SPARE_BYTES} bytes in {directory}, {free} are free"
            raise OSError(error.errno, f"{error.strerror}: {need}", error.filename) from error
        if error.errno in UNWRITABLE:
            raise _unwritable(directory, wanted.noun, error) from error
        raise


def _unwritable(directory: Path, noun: str, error: OSError) -> ValueError:
    return ValueError(
        f"{noun} cannot be written to {directory} ({error.strerror}); give --data-cache-path a directory that can"
    )


@contextmanager
def _lock(path: Path, noun: str) -> Iterator[bool]:
    """Whether this process alone holds the lock; it ends with the block or the process.

    Where the file system has no locks everyone holds it, and builds the same files.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in UNWRITABLE:
            raise _unwritable(path.parent, noun, error) from error
        raise
    owned = False
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owned = _is_still(path, descriptor)
        except BlockingIOError:
            owned = False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            owned = True
        if owned:
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield owned
    finally:
        # Removed while still held: whoever opened it meanwhile sees that it is gone, and opens the next one.
        if owned:
            with suppress(FileNotFoundError):
                os.unlink(path)
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one under that name; its last owner may have removed it in between."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _owner(lock: Path) -> str:
    try:
        return repr(lock.read_bytes()[:200].decode(errors="replace"))
    except OSError:
        return "another process"
