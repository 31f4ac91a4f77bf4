"""Index maps kept beside the data: built once however many processes start, and again when they do not fit any more.

The file names are Megatron-LM's and say nothing of the data. So a small JSON file beside the three arrays records what
they were made from and the digest of each, and whatever disagrees is rebuilt. Arrays without that record, as
Megatron-LM leaves them, are rebuilt too: their bytes stay the same if they were right. A build is deterministic and a
file takes its name in one step, so a race can only cost time; a lock keeps it from doing that. The lock is the
kernel's: it ends with its owner.
"""

import errno
import fcntl
import hashlib
import io
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.data.index_maps import (
    EpochPlan,
    IndexMaps,
    locate_samples,
    plan_epochs,
    shuffle_documents,
    shuffle_samples,
)
from megalith.files import (
    DISK,
    TEMPORARY_SUFFIX,
    Disk,
    Location,
    Written,
    digest_of,
    digest_of_bytes,
    write_parts,
    write_whole,
)

ARRAYS = ("doc_idx", "sample_idx", "shuffle_idx")
FORMAT = 1
LARGEST_RECORD = 64 << 10  # bytes of the JSON file
POLL_SECONDS = 0.05
SPARE_BYTES = 1 << 20  # wanted on the disk beyond the arrays
BLOCK = 1 << 20  # lengths digested at once

UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass(frozen=True)
class IndexMapsReport:
    """What happened when index maps were asked for, for whoever prints it."""

    paths: dict[str, Path]  # of each of ARRAYS
    rebuilt_because: str  # empty if they were only loaded
    seconds: dict[str, float]  # of each of ARRAYS, if built here: building and saving; wait: for another process; load
    plan: EpochPlan
    num_documents: int  # per epoch
    sequence_length: int


class _UnfitError(Exception):
    """The stored maps are not what is needed; says why."""


@dataclass(frozen=True)
class _Request:
    """What is asked for, and the files that hold it."""

    documents: range
    lengths: NDArray[np.int32]
    sequence_length: int
    seed: int
    plan: EpochPlan
    made_from: dict[str, Any]
    paths: dict[str, Path]
    record: Path
    lock: Path
    disk: Disk


def load_or_build_index_maps(
    prefix: Location,
    part: str,
    *,
    documents: range,
    lengths: NDArray[np.int32],
    num_samples: int,
    sequence_length: int,
    seed: int,
    cache_path: Location | None = None,
    wait_seconds: float = 600.0,
    disk: Disk = DISK,
) -> tuple[IndexMaps, IndexMapsReport]:
    """The maps for a part (train, valid or test) of the token file with this prefix, mapped from their files.

    documents: consecutive items of the part; lengths: of all items. cache_path: a directory for the files instead of
    the data's own, each set in a folder of its own named after what it is made from. A process that finds another one
    building waits for it, at most wait_seconds, then raises TimeoutError naming it. Raises ValueError if the documents
    have no token or the directory cannot be written, OSError naming need and free space if the disk is full.
    """
    if not 0 <= documents.start <= documents.stop <= len(lengths):
        raise ValueError(f"documents {documents.start} to {documents.stop} are not all among the {len(lengths)} items")
    tokens_per_epoch = int(lengths[documents.start : documents.stop].sum(dtype=np.int64))
    plan = plan_epochs(tokens_per_epoch, num_samples=num_samples, sequence_length=sequence_length)
    made_from = {
        "format": FORMAT,
        "documents": [documents.start, documents.stop],
        "lengths_sha256": _digest_of_lengths(lengths[documents.start : documents.stop]),
        "num_samples": num_samples,
        "sequence_length": sequence_length,
        "seed": seed,
    }
    paths, record, lock = _files(prefix, part, made_from, cache_path)
    request = _Request(documents, lengths, sequence_length, seed, plan, made_from, paths, record, lock, disk)
    started = time.monotonic()
    while True:
        asked = time.monotonic()
        try:
            maps = _load(request)
            return maps, _report(request, "", {"wait": asked - started, "load": time.monotonic() - asked})
        except _UnfitError as unfit:
            reason = str(unfit)
        with _lock(request.lock) as owned:
            if owned:
                return _build_or_load(request, reason, wait=time.monotonic() - started)
        if time.monotonic() - started > wait_seconds:
            raise TimeoutError(
                f"{request.lock}: {_owner(request.lock)} has been building index maps for {wait_seconds:g} s; if it "
                "hangs, end it, and this build will go on"
            )
        time.sleep(POLL_SECONDS)


def _files(
    prefix: Location, part: str, made_from: dict[str, Any], cache_path: Location | None
) -> tuple[dict[str, Path], Path, Path]:
    """Where the arrays, the record of what they were made from and the lock are."""
    prefix = Path(prefix)
    directory = prefix.parent
    if cache_path is not None:
        # Many data sets may share this directory, also under equal names.
        directory = Path(cache_path) / f"{prefix.name}-{digest_of_bytes(json.dumps(made_from))[:16]}"
        directory.mkdir(parents=True, exist_ok=True)
    sizes = f"{made_from['num_samples']}ns_{made_from['sequence_length']}sl_{made_from['seed']}s"
    base = f"{prefix.name}_{part}_indexmap_{sizes}"
    paths = {name: directory / f"{base}_{name}.npy" for name in ARRAYS}
    return paths, directory / f"{base}_made_from.json", directory / f"{base}.lock"


def _digest_of_lengths(lengths: NDArray[np.int32]) -> str:
    sha256 = hashlib.sha256()
    for begin in range(0, len(lengths), BLOCK):
        sha256.update(lengths[begin : begin + BLOCK].astype("<i4").tobytes())
    return sha256.hexdigest()


def _report(request: _Request, reason: str, seconds: dict[str, float]) -> IndexMapsReport:
    return IndexMapsReport(
        request.paths, reason, seconds, request.plan, len(request.documents), request.sequence_length
    )


def _load(request: _Request) -> IndexMaps:
    """The stored maps, mapped read-only; _UnfitError unless made from what is asked for, every byte as written."""
    written = _recorded_files(request)
    for name, path in request.paths.items():
        try:
            found = digest_of(path, disk=request.disk)
        except OSError as error:
            raise _UnfitError(f"{path} cannot be read ({error.strerror})") from error
        if found != written[name]:
            raise _UnfitError(f"{path} is damaged")
    doc_idx, sample_idx, shuffle_idx = (
        np.load(request.paths[name], mmap_mode="r", allow_pickle=False).view(np.ndarray) for name in ARRAYS
    )
    return IndexMaps(doc_idx, sample_idx, shuffle_idx, request.plan, request.sequence_length)


def _recorded_files(request: _Request) -> dict[str, Written]:
    """What the record says of the arrays; _UnfitError unless they were made from what is asked for."""
    try:
        with open(request.record, "rb") as file:
            text = file.read(LARGEST_RECORD)
        record = json.loads(text)
    except FileNotFoundError as error:
        raise _UnfitError(
            "nothing says what they were made from" if _any_exists(request) else "there were none"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise _UnfitError(f"{request.record} cannot be read") from error
    if not isinstance(record, dict) or record.get("made_from") != request.made_from:
        raise _UnfitError("they were made from other data or settings")
    try:
        files = record["files"]
        return {name: Written(files[name]["size"], files[name]["sha256"]) for name in ARRAYS}
    except (KeyError, TypeError) as error:
        raise _UnfitError(f"{request.record} is damaged") from error


def _any_exists(request: _Request) -> bool:
    return any(path.exists() for path in request.paths.values())


def _build_or_load(request: _Request, reason: str, *, wait: float) -> tuple[IndexMaps, IndexMapsReport]:
    """Build the maps, unless another process has done so since; only for the owner of the lock."""
    seconds = {"wait": wait}
    try:
        asked = time.monotonic()
        maps = _load(request)
        reason = ""
    except _UnfitError:
        seconds |= _build(request)
        asked = time.monotonic()
        try:
            maps = _load(request)
        except _UnfitError as unfit:
            raise OSError(errno.EIO, f"index maps were written but {unfit}", str(request.record)) from unfit
    return maps, _report(request, reason, {**seconds, "load": time.monotonic() - asked})


def _build(request: _Request) -> dict[str, float]:
    """Write the three arrays, then the record; give the seconds each took."""
    plan = request.plan
    num_bytes = 4 * plan.epochs * len(request.documents) + (8 + 8) * (plan.samples + 1) + SPARE_BYTES
    with _said_what_is_missing(request, num_bytes):
        _remove_remains(request)
        if request.disk.free_bytes(request.record.parent) < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(request.record.parent))
        random = np.random.RandomState(request.seed)
        seconds, files = {}, {}
        started = time.monotonic()
        documents = np.arange(request.documents.start, request.documents.stop, dtype=np.int32)
        doc_idx = shuffle_documents(documents, plan, random)
        for name in ARRAYS:
            array: NDArray[Any] = doc_idx
            if name == "sample_idx":
                array = locate_samples(doc_idx, request.lengths, plan, request.sequence_length)
            elif name == "shuffle_idx":
                array = shuffle_samples(plan, random)
            written = _write_array(request.paths[name], array, request.disk)
            files[name] = {"size": written.size, "sha256": written.digest}
            seconds[name] = time.monotonic() - started
            started = time.monotonic()
        record = {"made_from": request.made_from, "epochs": plan.epochs, "files": files}
        write_whole(request.record, json.dumps(record, indent=1) + "\n", disk=request.disk)
    return seconds


def _write_array(path: Path, array: NDArray[Any], disk: Disk) -> Written:
    """The bytes that numpy.save would write."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return write_parts(path, [header.getvalue(), array.data if array.size else b""], disk=disk)


def _remove_remains(request: _Request) -> None:
    """Remove the record first, so that nobody believes a half-replaced set, and what a killed builder left."""
    if request.record.exists():
        request.disk.remove(request.record)
    for path in (*request.paths.values(), request.record):
        for remains in path.parent.glob(f".{path.name}.*{TEMPORARY_SUFFIX}"):
            request.disk.remove(remains)


@contextmanager
def _said_what_is_missing(request: _Request, num_bytes: int) -> Iterator[None]:
    """Add to a failure to write what would have been needed."""
    directory = request.record.parent
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            free = request.disk.free_bytes(directory)
            need = f"index maps need {num_bytes} bytes in {directory}, {free} are free"
            raise OSError(error.errno, f"{error.strerror}: {need}", error.filename) from error
        if error.errno in UNWRITABLE:
            raise _unwritable(directory, error) from error
        raise


def _unwritable(directory: Path, error: OSError) -> ValueError:
    return ValueError(
        f"index maps cannot be written to {directory} ({error.strerror}); give --data-cache-path a directory that can"
    )


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Whether this process alone holds the lock; it ends with the block or the process.

    Where the file system has no locks everyone holds it, and builds the same files.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in UNWRITABLE:
            raise _unwritable(path.parent, error) from error
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
