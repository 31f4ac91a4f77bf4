"""Everything about a token file that can be wrong, by one pass over its bytes: for `megalith verify`."""

import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.data.indexed import IndexedDataset
from megalith.data.record import Record, identify, read_record
from megalith.files import Location

BLOCK = 4 << 20  # bytes digested at once: they stay in the processor's cache for the look at the tokens


@dataclass
class TokenFile:
    """What was found out about a token file; sound if it has no faults. num_bytes: of both files.

    largest_token and sha256 (of the .bin) are None if the index is damaged; has_record: whether digests were recorded.
    """

    prefix: Path
    faults: list[str] = field(default_factory=list)
    has_record: bool = False
    dtype: str = ""
    documents: int = 0
    items: int = 0
    tokens: int = 0
    empty_documents: int = 0
    largest_token: int | None = None
    sha256: str | None = None
    num_bytes: int = 0
    seconds: float = 0.0


def inspect(prefix: Location, *, vocab_size: int | None = None) -> TokenFile:
    """Read a token file whole and hold it against its index, its record and a vocabulary.

    vocab_size: ids from 0 to vocab_size - 1 are allowed; None: those of the recorded tokenizer, if there is a record.
    What is wrong is told in the result; ValueError only if there is no token file of this prefix.
    """
    started = time.monotonic()
    found = TokenFile(Path(prefix))
    record: Record | None = None
    try:
        record = read_record(prefix)
        found.has_record = record is not None
    except ValueError as error:
        found.faults.append(str(error))
    try:
        indexed = IndexedDataset(prefix)
    except ValueError as error:
        found.faults.append(str(error))
        return found
    found.dtype, found.documents, found.items = str(indexed.dtype), indexed.num_documents, indexed.num_items
    found.tokens, found.empty_documents = indexed.num_tokens, num_empty(indexed)
    found.num_bytes = indexed.tokens.nbytes + indexed.idx_path.stat().st_size
    if record is not None:
        try:
            identify(indexed.prefix, record)
        except ValueError as error:
            found.faults.append(str(error))
        vocab_size = record.vocab_size if vocab_size is None else vocab_size
    _read_tokens(indexed, found, vocab_size)
    if record is not None:
        found.faults += _against_record(indexed, found, record)
    found.seconds = time.monotonic() - started
    return found


def num_empty(indexed: IndexedDataset) -> int:
    """Documents without a token."""
    ends = np.concatenate([indexed.offsets, [indexed.tokens.nbytes]])[indexed.document_index]
    return int((np.diff(ends) == 0).sum())


def _against_record(indexed: IndexedDataset, found: TokenFile, record: Record) -> Iterator[str]:
    name = record.path.name
    if found.sha256 != record.files[".bin"].digest:
        expected = f"expected {record.files['.bin'].digest}, by {name}, found {found.sha256}"
        yield f"{indexed.bin_path}: SHA-256: {expected}: it was changed, or is of another corpus"
    elif found.largest_token != record.largest_token:
        yield f"{record.path}: largest token: expected {found.largest_token}, as it is, found {record.largest_token}"


def _read_tokens(indexed: IndexedDataset, found: TokenFile, vocab_size: int | None) -> None:
    """Digest the .bin and find its largest token and the first outside of the vocabulary; in place."""
    tokens, sha256 = indexed.tokens, hashlib.sha256()
    integers = indexed.dtype.kind in "iu"
    limit = int(np.iinfo(indexed.dtype).max) + 1 if integers else 0
    if vocab_size is not None:
        limit = min(limit, vocab_size)
    num_bad, first_bad = 0, -1
    step = BLOCK // indexed.dtype.itemsize
    with ThreadPoolExecutor(1, thread_name_prefix="digest") as pool:
        digested: Future[None] | None = None
        for begin in range(0, len(tokens), step):
            block = tokens[begin : begin + step]
            if digested is not None:
                digested.result()
            digested = pool.submit(sha256.update, block.data.cast("B"))
            if not integers:
                continue
            # Seen without its sign a negative id is an enormous one.
            unsigned = block.view(f"u{block.dtype.itemsize}")
            if int(unsigned.max()) >= limit:
                bad = unsigned >= limit
                num_bad += int(bad.sum())
                first_bad = begin + int(bad.argmax()) if first_bad < 0 else first_bad
            found.largest_token = max(int(block.max()), found.largest_token or 0)
    found.sha256 = sha256.hexdigest()
    if num_bad:
        found.faults.append(_bad_token(indexed, first_bad, num_bad, limit))


def _bad_token(indexed: IndexedDataset, place: int, num_bad: int, limit: int) -> str:
    item, position = item_at(indexed.offsets, place * indexed.dtype.itemsize)
    document = int(np.searchsorted(indexed.document_index, item, side="right")) - 1
    where = f"position {position // indexed.dtype.itemsize} of document {document}"
    if indexed.num_items != indexed.num_documents:
        where += f" (in its item {item - int(indexed.document_index[document])})"
    more = f"; {num_bad - 1} more tokens are not" if num_bad > 1 else ""
    token = f"{indexed.bin_path}: token {indexed.tokens[place]} at {where}"
    return f"{token} is not in the vocabulary (0 to {limit - 1}){more}"


def item_at(offsets: NDArray[Any], byte: int) -> tuple[int, int]:
    """The item, never an empty one, in which a byte of the .bin lies, and its place there."""
    item = int(np.searchsorted(offsets, byte, side="right")) - 1
    return item, byte - int(offsets[item])
