"""What stands in an .idx file: the table of a token file's items and documents, checked before any use.

A token file (.bin) is the items' tokens one after the other, nothing else. Its .idx says the type of a token, the
length and place of every item, and at which item every document starts. Two formats are read: the one Megatron-LM calls
mmap (magic MMIDIDX, also written) and its older one, lazy and cached (magic TNTIDX). The idea of both readers: nothing
is believed that the sizes of the two files do not bear out, and nothing is allocated by a size that only a header says.

The start of a document inside the index is the one thing that has no redundancy: another number between its neighbours
cannot be told from the right one.
"""

import mmap
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from megalith.data.survey import Survey
from megalith.files import open_at_once

DType: TypeAlias = np.dtype[Any]

# Code 6 was written for Python's float: 8 bytes a token; its writer counted offsets in 4, so such a file is refused.
DTYPES: dict[int, DType] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f8"),
    8: np.dtype("<u2"),
}
CODES = {str(dtype): code for code, dtype in DTYPES.items()}  # the higher code where two share a type: 7 for float64

MAGIC = b"MMIDIDX\x00\x00"
OLD_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, items N, entries of the document index M
OLD_HEADER = struct.Struct("<8sQQQQQQ")  # magic, version, dtype code, bytes a token, items N, sizes S, document index D
BLOCK = 1 << 20  # items checked or written at once
MAX_LENGTH = np.iinfo(np.int32).max  # tokens of an item


@dataclass(frozen=True)
class Index:
    """Where the items and documents of a token file are."""

    dtype: DType
    lengths: NDArray[np.int32]  # tokens of each item
    offsets: NDArray[np.int64]  # byte of the .bin at which each item starts
    document_index: NDArray[np.int64]  # item at which each document starts, then the number of items


def read_index(
    path: Path,
    content: mmap.mmap | bytes,
    *,
    impl: str,
    bin_path: Path,
    bin_size: int,
    merged: bool = False,
    survey: Survey | None = None,
) -> Index:
    """The checked content of an .idx; the arrays are views of it, unless it is of the old format.

    content: of the file, as `map_file` gives it. impl: mmap, lazy, cached (the latter two are one format) or infer.
    bin_size: bytes of the .bin it belongs to. merged: the document index may end before the last item, as Megatron-LM's
    merge leaves it. survey: items and documents that it knows to be sound are not looked at again. Raises ValueError
    with the file, the field, what was expected and what was found.
    """
    formats = {"mmap": MAGIC, "lazy": OLD_MAGIC, "cached": OLD_MAGIC}
    if impl not in {"infer", *formats}:
        raise ValueError(f"data_impl={impl!r} is none of mmap, lazy, cached, infer")
    found = bytes(content[: len(MAGIC)])
    old = found.startswith(OLD_MAGIC) if impl == "infer" else impl != "mmap"
    expected = OLD_MAGIC if old else MAGIC
    if not found.startswith(expected):
        wanted = (
            "MMIDIDX or TNTIDX, each with two zero bytes"
            if impl == "infer"
            else f"{expected!r} for --data-impl {impl} (leave that out)"
        )
        refuse(path, "magic", wanted, repr(found))
    index = (_read_old if old else _read_mmap)(path, content)

    def check() -> None:
        _check_items(path, index, bin_path, bin_size)
        _check_documents(path, index.document_index, len(index.lengths), merged=merged)

    (survey or Survey()).find(f"sound items and documents, merged: {merged}", check, path, bin_path)
    return index


def map_file(path: Path) -> mmap.mmap | bytes:
    """A regular file's bytes, mapped read-only."""
    descriptor = open_at_once(path)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            refuse(path, "kind", "a regular file", stat.filemode(status.st_mode))
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) if status.st_size else b""
    finally:
        os.close(descriptor)


def check_mapped(path: Path, content: mmap.mmap | bytes) -> None:
    """Raise ValueError if a mapped file has become shorter: who reads what is gone is ended by SIGBUS.

    It costs a system call on the descriptor that the map keeps.
    """
    size = content.size() if isinstance(content, mmap.mmap) else 0
    if size < len(content):
        raise ValueError(
            f"{path}: was cut short while it was read: it had {len(content)} bytes when it was opened and has {size}. "
            "Restore it and give the same command again; write other data under another name"
        )


def refuse(path: Path, field: str, expected: object, found: object) -> NoReturn:
    """Raise the ValueError for a file that cannot be what it should be."""
    raise ValueError(f"{path}: {field}: expected {expected}, found {found}")


def encode_index(dtype: DType, lengths: NDArray[np.int32], document_index: NDArray[np.int64]) -> Iterator[bytes]:
    """The bytes of an .idx of the mmap format, in parts of bounded size; lengths and document_index as in Index."""
    yield HEADER.pack(MAGIC, VERSION, CODES[str(dtype)], len(lengths), len(document_index))
    for begin in range(0, len(lengths), BLOCK):
        yield lengths[begin : begin + BLOCK].astype("<i4", copy=False).tobytes()
    start = 0
    for begin in range(0, len(lengths), BLOCK):
        sizes = lengths[begin : begin + BLOCK].astype(np.int64) * dtype.itemsize
        ends = np.cumsum(sizes) + start
        yield (ends - sizes).astype("<i8", copy=False).tobytes()
        start = int(ends[-1])
    for begin in range(0, len(document_index), BLOCK):
        yield document_index[begin : begin + BLOCK].astype("<i8", copy=False).tobytes()


def _read_mmap(path: Path, content: mmap.mmap | bytes) -> Index:
    if len(content) < HEADER.size:
        refuse(path, "size", f"at least {HEADER.size} bytes", len(content))
    _, version, code, num_items, num_entries = HEADER.unpack_from(content)
    _check_version(path, version)
    dtype = _dtype(path, code)
    _check_size(
        path, HEADER.size + 12 * num_items + 8 * num_entries, content, f"{num_items} items, {num_entries} entries"
    )
    at = HEADER.size
    lengths = np.frombuffer(content, "<i4", num_items, at)
    offsets = np.frombuffer(content, "<i8", num_items, at + 4 * num_items)
    documents = np.frombuffer(content, "<i8", num_entries, at + 12 * num_items)
    return Index(dtype, lengths, offsets, documents)


def _read_old(path: Path, content: mmap.mmap | bytes) -> Index:
    """The TNTIDX format: int64 throughout, offsets in tokens, and a shape for every item, which must be one number."""
    if len(content) < OLD_HEADER.size:
        refuse(path, "size", f"at least {OLD_HEADER.size} bytes", len(content))
    _, version, code, itemsize, num_items, num_sizes, num_entries = OLD_HEADER.unpack_from(content)
    _check_version(path, version)
    dtype = _dtype(path, code)
    if itemsize != dtype.itemsize:
        refuse(path, "bytes of a token", f"{dtype.itemsize} for {dtype}", itemsize)
    described = f"{num_items} items, {num_sizes} sizes, {num_entries} entries"
    _check_size(path, OLD_HEADER.size + 8 * (2 * (num_items + 1) + num_sizes + num_entries), content, described)
    values = np.frombuffer(content, "<i8", offset=OLD_HEADER.size)
    dim_offsets, starts, sizes, documents = np.split(values, np.cumsum([num_items + 1, num_items + 1, num_sizes]))
    if num_sizes != num_items or not np.array_equal(dim_offsets, np.arange(num_items + 1)):
        refuse(path, "shapes", "one size for every item", f"{num_sizes} sizes for {num_items} items")
    too_long = (sizes < 0) | (sizes > MAX_LENGTH)
    if too_long.any():
        item = int(too_long.argmax())
        refuse(path, f"length of item {item}", f"0 to {MAX_LENGTH}", int(sizes[item]))
    if starts[0] != 0 or (np.diff(starts) != sizes).any():
        refuse(path, "data offsets", "the running sum of the sizes", "others")
    return Index(dtype, sizes.astype(np.int32), starts[:-1] * dtype.itemsize, documents)


def _check_version(path: Path, version: int) -> None:
    if version != VERSION:
        refuse(path, "version", VERSION, version)


def _dtype(path: Path, code: int) -> DType:
    if code not in DTYPES:
        refuse(path, "dtype code", f"one of {', '.join(map(str, DTYPES))}", code)
    return DTYPES[code]


def _check_size(path: Path, expected: int, content: mmap.mmap | bytes, described: str) -> None:
    if len(content) != expected:
        refuse(path, "size", f"{expected} bytes for the header's {described}", len(content))


def _check_items(path: Path, index: Index, bin_path: Path, bin_size: int) -> None:
    """The items must follow each other without a gap from the .bin's first byte to its last."""
    start = 0
    for begin in range(0, len(index.lengths), BLOCK):
        lengths = index.lengths[begin : begin + BLOCK].astype(np.int64)
        if lengths.min() < 0:
            item = int((lengths < 0).argmax())
            refuse(path, f"length of item {begin + item}", "0 or more tokens", int(lengths[item]))
        sizes = lengths * index.dtype.itemsize
        ends = np.cumsum(sizes) + start
        wrong = index.offsets[begin : begin + BLOCK] != ends - sizes
        if wrong.any():
            item = int(wrong.argmax())
            expected = f"{int(ends[item] - sizes[item])} (the end of the item before it)"
            refuse(path, f"offset of item {begin + item}", expected, int(index.offsets[begin + item]))
        start = int(ends[-1])
        if start > bin_size:  # checked in every block, so that the sum cannot overflow
            break
    if start != bin_size:
        refuse(bin_path, "size", f"{start} bytes, by the lengths in {path.name}", bin_size)


def _check_documents(path: Path, documents: NDArray[np.int64], num_items: int, *, merged: bool) -> None:
    """The document index must rise from 0 to the number of items; merged: or to less."""
    if not len(documents):
        refuse(path, "entries of the document index", "1 or more", 0)
    if documents[0] != 0:
        refuse(path, "first document's start", 0, int(documents[0]))
    for begin in range(0, len(documents) - 1, BLOCK):
        entries = documents[begin : begin + BLOCK + 1]
        falling = entries[1:] < entries[:-1]
        if falling.any():
            entry = int(falling.argmax()) + 1
            refuse(path, f"start of document {begin + entry}", f"{entries[entry - 1]} or more", int(entries[entry]))
    if documents[-1] > num_items or (documents[-1] < num_items and not merged):
        found = f"{int(documents[-1])} (Megatron-LM's merge leaves it so; merge with IndexedWriter instead)"
        refuse(path, "end of the document index", f"{num_items}, the number of items", found)
