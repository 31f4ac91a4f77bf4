"""A file of embedded passages: their ids and one vector each, mapped into memory; written whole, verified when opened.

    8 bytes   MAGIC
    8 bytes   size of the header, little-endian
    header    JSON: count, width, dtype, block, digests, made_from
    32 bytes  SHA-256 of the header
    zeros     up to a multiple of 64
    ids       int64 [count]
    vectors   float16 or float32 [count, width]

Rows are digested in blocks of that many, ids and vectors of a block together, so a file can be made of others whose
digests are known. Nothing in it is executed, and no number of it is believed before it has been checked.

Shape letters: N rows, D width of the embeddings.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.data.index_file import map_file, refuse
from megalith.files import DISK, Disk, Location, digest_of_bytes, write_parts

MAGIC = b"MGLTHVEC"
ALIGNMENT = 64
DIGEST_BYTES = 32
LARGEST_HEADER = 64 << 20
MOST_ROWS, LARGEST_WIDTH = 2**40, 2**20
DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class Embeddings:
    """An opened file. made_from: what the vectors depend on, as the maker said. block: rows of a digest."""

    path: Path
    ids: NDArray[np.int64]  # N
    vectors: NDArray[Any]  # ND
    made_from: Mapping[str, Any]
    block: int
    digests: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


def write_block(
    path: Location, ids_N: NDArray[np.int64], vectors_ND: NDArray[Any], made_from: Mapping[str, Any], *, disk: Disk
) -> None:
    """Write a file of one block; whole or not at all."""
    digest = _digest(ids_N, vectors_ND)
    _write(path, [(ids_N, vectors_ND)], [digest], block=len(ids_N), made_from=made_from, disk=disk)


def write_joined(
    path: Location, parts: Sequence[Embeddings], made_from: Mapping[str, Any], *, disk: Disk = DISK
) -> None:
    """Write the rows of several files of one block into one; whole or not at all.

    All but the last have the same number of rows. Raises ValueError for an id that stands there twice.
    """
    ids = np.concatenate([part.ids for part in parts])
    distinct, counts = np.unique(ids, return_counts=True)
    if len(distinct) < len(ids):
        twice = int(distinct[counts > 1][0])
        raise ValueError(f"{path}: the passage {twice} was embedded twice; every id of the evidence must be its own")
    contents = [(part.ids, part.vectors) for part in parts]
    digests = [digest for part in parts for digest in part.digests]
    _write(path, contents, digests, block=len(parts[0]), made_from=made_from, disk=disk)


def _write(
    path: Location,
    contents: Sequence[tuple[NDArray[np.int64], NDArray[Any]]],
    digests: Sequence[str],
    *,
    block: int,
    made_from: Mapping[str, Any],
    disk: Disk,
) -> None:
    vectors = contents[0][1]
    header = json.dumps(
        {
            "count": sum(len(ids) for ids, _ in contents),
            "width": vectors.shape[1],
            "dtype": vectors.dtype.name,
            "block": block,
            "digests": list(digests),
            "made_from": dict(made_from),
        }
    ).encode()
    front = MAGIC + len(header).to_bytes(8, "little") + header + hashlib.sha256(header).digest()
    bodies = [np.ascontiguousarray(ids).data.cast("B") for ids, _ in contents]
    bodies += [np.ascontiguousarray(rows).data.cast("B") for _, rows in contents]
    write_parts(path, [front + bytes(-len(front) % ALIGNMENT), *bodies], disk=disk)


def open_embeddings(path: Location) -> Embeddings:
    """The embeddings of a file, mapped read-only, every bit as it was written.

    Raises ValueError naming the file, what was expected and what was found.
    """
    file = Path(path)
    if not file.exists():
        raise ValueError(f"{file}: no file of embeddings; megalith index makes one")
    content = map_file(file)
    header, begin = _read_header(file, content)
    count, width, block = (_count(file, header, *field) for field in FIELDS)
    dtype, digests = header.get("dtype"), header.get("digests")
    if dtype not in DTYPES:
        refuse(file, "dtype", " or ".join(DTYPES), str(dtype)[:40])
    if not isinstance(digests, list) or len(digests) != -(-count // block):
        refuse(file, "digests", f"a list of {-(-count // block)}", f"{str(digests)[:40]}")
    made_from = header.get("made_from")
    if not isinstance(made_from, dict):
        refuse(file, "made_from", "an object", str(made_from)[:40])
    kind = np.dtype(str(dtype)).newbyteorder("<")
    size = begin + 8 * count + kind.itemsize * count * width
    if len(content) != size:
        refuse(file, "size", f"{size} bytes for {count} vectors of {width}", len(content))
    ids = np.frombuffer(content, "<i8", count, begin)
    vectors = np.frombuffer(content, kind, count * width, begin + 8 * count).reshape(count, width)
    for number, digest in enumerate(digests):
        rows = slice(number * block, (number + 1) * block)
        if digest != _digest(ids[rows], vectors[rows]):
            refuse(file, f"rows {rows.start} to {min(rows.stop, count) - 1}", "what was written", "other bytes")
    if len(np.unique(ids)) < count:
        refuse(file, "ids", "each once", "one twice")
    return Embeddings(file, ids, vectors, made_from, block, tuple(digests))


# The header's numbers, and the largest value of each.
FIELDS = (("count", MOST_ROWS), ("width", LARGEST_WIDTH), ("block", MOST_ROWS))


def _read_header(file: Path, content: Any) -> tuple[dict[str, Any], int]:
    """The header, and where the ids begin."""
    front = bytes(content[:16])
    if len(front) < 16 or front[:8] != MAGIC:
        refuse(file, "first bytes", f"{MAGIC!r}, of a file of embeddings", front[:8])
    size = int.from_bytes(front[8:], "little")
    if size > min(LARGEST_HEADER, len(content)):
        refuse(file, "size of the header", f"at most {min(LARGEST_HEADER, len(content))}", size)
    text = bytes(content[16 : 16 + size])
    if bytes(content[16 + size : 16 + size + DIGEST_BYTES]) != hashlib.sha256(text).digest():
        refuse(file, "header", "what was written", "other bytes")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        refuse(file, "header", "JSON", text[:40])
    if not isinstance(header, dict):
        refuse(file, "header", "an object", str(header)[:40])
    front_size = 16 + size + DIGEST_BYTES
    return header, front_size + -front_size % ALIGNMENT


def _count(file: Path, header: Mapping[str, Any], name: str, largest: int) -> int:
    value = header.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= largest:
        refuse(file, name, f"1 to {largest}", str(value)[:40])
    return value


def _digest(ids_N: NDArray[np.int64], vectors_ND: NDArray[Any]) -> str:
    ids, vectors = np.ascontiguousarray(ids_N), np.ascontiguousarray(vectors_ND)
    return digest_of_bytes(digest_of_bytes(ids.data.cast("B")) + digest_of_bytes(vectors.data.cast("B")))
