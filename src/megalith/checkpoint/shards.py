"""One rank's file of tensors, in the safetensors format: written from start to end, read in slices.

The format is a length (8 bytes, little-endian), a JSON header that gives each tensor's number type, shape and place,
and the elements without gaps (https://github.com/huggingface/safetensors). Megalith writes it itself, because every
byte must pass through a `Disk` and into a digest, and reads it itself, because a damaged file must raise an error: the
library maps it into memory, where a truncated file or a failing disk ends the process by SIGBUS.
"""

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalith.checkpoint.pieces import DTYPES, TENSOR_NAME, TORCH_DTYPES, Place
from megalith.files import Disk, Written, naming, write_parts

LENGTH_BYTES = 8
HEADER_LIMIT = 64 << 20  # bytes
METADATA = "__metadata__"  # the one entry of a header that is no tensor
ALIGNMENT = 8  # bytes; the header is padded with blanks so that the elements start at a multiple
BLOCK = 4 << 20  # bytes read at a time
SEEK = 1 << 20  # bytes: of rows longer than this only the wanted part is read, shorter ones are read whole


class DamagedError(ValueError):
    """A file of a checkpoint that is not what was written; the message names it."""


def shard_size(sizes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Bytes of the file that would hold tensors of these types and shapes."""
    header, data = _header_for(sizes)
    return len(header) + data


def write_shard(
    path: Path, tensors: Mapping[str, Tensor], *, disk: Disk, metadata: Mapping[str, str] | None = None
) -> Written:
    """Write the tensors, sorted by name, as a safetensors file. Host memory: one tensor of another device at a time.

    metadata: words for the header, for other readers than ours.
    """
    sizes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    header, _ = _header_for(sizes, metadata)

    def parts() -> Iterator[bytes | memoryview]:
        yield header
        for name in sorted(tensors):
            yield _elements(tensors[name])

    return write_parts(path, parts(), disk=disk)


def _elements(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _header_for(
    sizes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, int]:
    """The length and header of a file, and the bytes of the elements behind them."""
    entries: dict[str, Any] = {} if metadata is None else {METADATA: dict(metadata)}
    end = 0
    for name in sorted(sizes):
        dtype, shape = sizes[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    if len(text) > HEADER_LIMIT:
        raise ValueError(f"{len(sizes)} tensors need a header of {len(text)} bytes, more than {HEADER_LIMIT}")
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, end


@dataclass(frozen=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte in the file


class ShardReader:
    """An open file of tensors whose header was found to be sound."""

    def __init__(self, path: Path, descriptor: int, disk: Disk) -> None:
        self._path, self._descriptor, self._disk = path, descriptor, disk
        self._entries = self._read_header(regular_size(path, descriptor))
        self._block = bytearray(0)

    def kind(self, name: str) -> tuple[str, tuple[int, ...]] | None:
        """Number type and shape of a tensor; None if the file has none of that name."""
        entry = self._entries.get(name)
        return None if entry is None else (DTYPES[entry.dtype], entry.shape)

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def fill(self, name: str, place: Place, target: Tensor) -> None:
        """Copy a rectangle of a tensor into target, in place.

        place counts from the first element of the stored tensor; target has its extent, on any device. Memory: one
        block. Raises OSError, or DamagedError if the file has become shorter.
        """
        entry = self._entries[name]
        assert target.shape == place.extent and target.dtype == entry.dtype, f"{name}: checked before"
        self._fill(entry.dtype, entry.shape, place, entry.start, target)

    def _fill(self, dtype: torch.dtype, shape: tuple[int, ...], place: Place, start: int, target: Tensor) -> None:
        if not shape:
            target.copy_(self._read(dtype, start, (1,)).reshape(()))
            return
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        inner = Place(place.offset[1:], place.extent[1:])
        first, end = place.offset[0], place.offset[0] + place.extent[0]
        if row_bytes > BLOCK or (inner.extent != shape[1:] and row_bytes > SEEK):
            for row in range(first, end):
                self._fill(dtype, shape[1:], inner, start + row * row_bytes, target[row - first])
            return
        step = max(1, BLOCK // row_bytes)
        wanted = inner.slices((0,) * len(inner.offset))
        for row in range(first, end, step):
            rows = min(step, end - row)
            read = self._read(dtype, start + row * row_bytes, (rows, *shape[1:]))
            target[row - first : row - first + rows].copy_(read[(slice(None), *wanted)])

    def _read(self, dtype: torch.dtype, start: int, shape: tuple[int, ...]) -> Tensor:
        """Elements from a byte on; they are overwritten by the next read."""
        size = math.prod(shape) * dtype.itemsize
        if len(self._block) < size:
            self._block = bytearray(size)
        _read_exactly(self._path, self._descriptor, memoryview(self._block)[:size], start, self._disk)
        return torch.frombuffer(self._block, dtype=dtype, count=math.prod(shape)).view(shape)

    def _read_header(self, file_size: int) -> dict[str, _Entry]:
        if file_size < LENGTH_BYTES:
            raise DamagedError(f"{self._path}: {file_size} bytes is too short for a safetensors file")
        prefix = bytearray(LENGTH_BYTES)
        _read_exactly(self._path, self._descriptor, memoryview(prefix), 0, self._disk)
        length = int.from_bytes(prefix, "little")
        if length > min(file_size - LENGTH_BYTES, HEADER_LIMIT):
            raise DamagedError(f"{self._path}: a header of {length} bytes in a file of {file_size}")
        text = bytearray(length)
        _read_exactly(self._path, self._descriptor, memoryview(text), LENGTH_BYTES, self._disk)
        data_start = LENGTH_BYTES + length
        return _parse_header(self._path, bytes(text), data_start, file_size - data_start)


@contextmanager
def open_shard(path: Path, *, disk: Disk) -> Iterator[ShardReader]:
    """A reader of a file of tensors. Raises OSError, or DamagedError if it is no sound safetensors file."""
    descriptor = disk.open(path)
    try:
        yield ShardReader(path, descriptor, disk)
    finally:
        disk.close(descriptor)


def regular_size(path: Path, descriptor: int) -> int:
    """Bytes of an open file; raises DamagedError if it is a directory, a pipe or a device."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise DamagedError(f"{path} is not a regular file")
    return status.st_size


def read_file(path: Path, limit: int, *, disk: Disk) -> bytes:
    """The bytes of a regular file of at most limit bytes. Raises OSError, or DamagedError if it is another thing."""
    descriptor = disk.open(path)
    try:
        size = regular_size(path, descriptor)
        if size > limit:
            raise DamagedError(f"{path} has {size} bytes, more than {limit}")
        data = bytearray(size)
        _read_exactly(path, descriptor, memoryview(data), 0, disk)
        return bytes(data)
    finally:
        disk.close(descriptor)


def _read_exactly(path: Path, descriptor: int, buffer: memoryview, start: int, disk: Disk) -> None:
    while buffer:
        with naming(path):
            count = disk.read(descriptor, buffer, start)
        if count == 0:
            raise DamagedError(f"{path} ends at byte {start}, {len(buffer)} bytes too early")
        buffer, start = buffer[count:], start + count


def _parse_header(path: Path, text: bytes, data_start: int, data_size: int) -> dict[str, _Entry]:
    """The tensors that a header lists; DamagedError unless they fill the rest of the file without gap or overlap."""
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: the header is not JSON: {error}") from error
    if not isinstance(listed, dict):
        raise DamagedError(f"{path}: the header is not a JSON object")
    entries = {}
    spans = []
    for name, fields in listed.items():
        if name == METADATA and isinstance(fields, dict):
            continue  # words of whoever wrote the file; ours has none
        if TENSOR_NAME.fullmatch(name) is None:
            raise DamagedError(f"{path}: the header lists a tensor {name[:100]!r}, which no checkpoint contains")
        dtype, shape, start, end = _parse_entry(path, name, fields)
        if end - start != math.prod(shape) * dtype.itemsize:
            raise DamagedError(f"{path}: {name} of shape {shape} and {dtype} does not fit its {end - start} bytes")
        entries[name] = _Entry(dtype, shape, data_start + start)
        spans.append((start, end))
    reached = 0
    for start, end in sorted(spans):
        if start != reached:
            raise DamagedError(f"{path}: a gap or overlap at byte {data_start + reached}")
        reached = end
    if reached != data_size:
        raise DamagedError(f"{path}: the tensors take {reached} bytes, the file has {data_size} for them")
    return entries


def _parse_entry(path: Path, name: str, fields: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    sound = (
        isinstance(fields, dict)
        and fields.keys() == {"dtype", "shape", "data_offsets"}
        and fields["dtype"] in DTYPES.values()
        and _are_counts(fields["shape"])
        and _are_counts(fields["data_offsets"])
        and len(fields["data_offsets"]) == 2
    )
    if not sound:
        raise DamagedError(f"{path}: the header's entry for {name} is not one of safetensors")
    start, end = fields["data_offsets"]
    return TORCH_DTYPES[fields["dtype"]], tuple(fields["shape"]), start, end


def _are_counts(values: Any) -> bool:
    """Whether values is a short list of numbers that can count elements or bytes of a file."""
    return (
        isinstance(values, list)
        and len(values) <= 16
        and all(type(value) is int and 0 <= value < 1 << 62 for value in values)
    )
