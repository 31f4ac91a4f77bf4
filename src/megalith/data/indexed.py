"""Token files: PREFIX.bin holds the tokens, PREFIX.idx says where which item and document is.

The format is Megatron-LM's, byte for byte. A file is mapped, not read, so that opening costs a check of its index and
many processes share one copy; a writer streams, so that memory grows by 12 bytes an item and not by the tokens.
"""

import difflib
import os
from array import array
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megalith.data.index_file import CODES, MAX_LENGTH, DType, check_mapped, encode_index, map_file, read_index
from megalith.data.survey import Survey
from megalith.files import DISK, Disk, Location, open_whole, sync_directory

COPY_SIZE = 64 << 20  # bytes copied or warmed up at once
LARGEST_UINT16_VOCABULARY = 65500  # from here on Megatron-LM takes int32


class IndexedDataset:
    """A token file, mapped read-only. Every number of its index has been checked when it is made, or before.

    prefix: the path without .bin and .idx. survey: what is known of the files already. dtype: of a token. lengths
    (int32) and offsets (int64, bytes) of each item; document_index (int64): the item at which each document starts,
    then the number of items. tokens: the whole .bin.
    Raises ValueError naming the file, the field, what was expected and what was found.
    """

    def __init__(
        self, prefix: Location, *, impl: str = "infer", merged: bool = False, survey: Survey | None = None
    ) -> None:
        self.prefix = find_prefix(prefix)
        self.bin_path, self.idx_path = bin_path(self.prefix), idx_path(self.prefix)
        content = map_file(self.bin_path)
        index_content = map_file(self.idx_path)
        index = read_index(
            self.idx_path,
            index_content,
            impl=impl,
            bin_path=self.bin_path,
            bin_size=len(content),
            merged=merged,
            survey=survey,
        )
        self._mapped = ((self.bin_path, content), (self.idx_path, index_content))
        self.dtype = index.dtype
        self.lengths = index.lengths
        self.offsets = index.offsets
        self.document_index = index.document_index
        self.tokens: NDArray[Any] = np.frombuffer(content, index.dtype)

    @property
    def num_items(self) -> int:
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        return len(self.document_index) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def check_sizes(self) -> None:
        """Raise ValueError if one of the two files has become shorter; to be called before each batch is read."""
        for path, content in self._mapped:
            check_mapped(path, content)

    def read(self, item: int, start: int = 0, count: int | None = None) -> NDArray[Any]:
        """count tokens of an item from its token start on (None: all that follow), as a read-only view of the file."""
        if not 0 <= item < self.num_items:
            raise ValueError(f"item {item} of {self.prefix}: there are {self.num_items}, counted from 0")
        length = int(self.lengths[item])
        if count is None:
            count = length - start
        if start < 0 or count < 0 or start + count > length:
            raise ValueError(f"tokens {start} to {start + count} of item {item} of {self.prefix}: it has {length}")
        begin = int(self.offsets[item]) // self.dtype.itemsize + start
        return self.tokens[begin : begin + count]

    def warm_up(self) -> None:
        """Read both files once from start to end, so that they lie in the operating system's cache."""
        for path in (self.idx_path, self.bin_path):
            buffer = bytearray(COPY_SIZE)
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def open_indexed(
    prefix: Location, impl: str = "infer", *, merged: bool = False, survey: Survey | None = None
) -> IndexedDataset:
    """The token file with this prefix; impl: mmap, lazy, cached, or infer by the index's first bytes.

    lazy and cached only name the old format here: all files are read through a memory map. merged: a document index
    that ends before the last item will do, for who takes items for documents. survey: as in `read_index`.
    """
    return IndexedDataset(prefix, impl=impl, merged=merged, survey=survey)


def best_dtype(vocab_size: int | None) -> DType:
    """The smallest of the two types Megatron-LM writes that holds every id of a vocabulary; int32 if it is unknown."""
    return np.dtype("<u2" if vocab_size is not None and vocab_size < LARGEST_UINT16_VOCABULARY else "<i4")


def bin_path(prefix: Location) -> Path:
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: Location) -> Path:
    return Path(f"{os.fspath(prefix)}.idx")


def find_prefix(prefix: Location) -> Path:
    """The prefix whose .bin and .idx both exist; prefix may also name one of the two files.

    Raises ValueError that says which file is missing and lists prefixes of that directory with similar names.
    """
    text = os.fspath(prefix)
    candidates = [text, text[:-4]] if text.endswith((".bin", ".idx")) else [text]
    for candidate in candidates:
        if idx_path(candidate).exists() and bin_path(candidate).exists():
            return Path(candidate)
    asked = candidates[-1]
    missing = " and ".join(str(path) for path in (bin_path(asked), idx_path(asked)) if not path.exists())
    raise ValueError(f"no token file with the prefix {text}: {missing} not found; {_similar_prefixes(Path(asked))}")


def _similar_prefixes(prefix: Path) -> str:
    directory = prefix.parent
    if not directory.is_dir():
        return f"there is no directory {directory}"
    known = sorted(path.name[:-4] for path in directory.glob("*.idx") if path.with_suffix(".bin").exists())
    nearest = difflib.get_close_matches(prefix.name, known, n=5, cutoff=0.3) or known[:5]
    return f"{directory} has {', '.join(nearest) if nearest else 'no token files'}"


class IndexedWriter:
    """Writes a token file; it appears under its name when the `with` block ends without an error, .bin first.

    So an .idx never lies there without the .bin that it describes. If the block raises, nothing is left. An existing
    token file is refused unless overwrite is set. prefix: the path without .bin and .idx; its directory must exist.
    """

    def __init__(
        self, prefix: Location, dtype: DType | type | str, *, overwrite: bool = False, disk: Disk = DISK
    ) -> None:
        self.prefix = Path(prefix)
        self.dtype: DType = np.dtype(dtype).newbyteorder("<")
        if str(self.dtype) not in CODES:
            raise ValueError(f"dtype={self.dtype} cannot be written; the format knows {', '.join(CODES)}")
        self.num_tokens = 0
        self.largest_token: int | None = None  # so far; None before the first, and for floats
        self._lengths = array("i")
        self._document_ends = array("q", [0])
        self._overwrite = overwrite
        self._disk = disk
        self._files = ExitStack()
        self._tokens: IO[bytes] | None = None

    @property
    def num_items(self) -> int:
        return len(self._lengths)

    @property
    def num_documents(self) -> int:
        return len(self._document_ends) - 1

    def __enter__(self) -> Self:
        existing = [path for path in (bin_path(self.prefix), idx_path(self.prefix)) if path.exists()]
        if existing and not self._overwrite:
            raise ValueError(f"{existing[0]} exists already; remove it or choose another prefix")
        self._tokens = self._files.enter_context(open_whole(bin_path(self.prefix), "wb", disk=self._disk))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tokens = None
        if error is None:
            self._commit()
        else:
            self._files.__exit__(kind, error, trace)

    def add_document(self, items: Sequence[ArrayLike]) -> None:
        """Append a document; each item is a sequence of token ids, possibly empty."""
        arrays = [np.asarray(item) for item in items if np.size(item)]
        tokens = np.concatenate(arrays) if arrays else np.empty(0, self.dtype)
        self.add_documents([np.size(item) for item in items], [len(items)], tokens)

    def add_documents(self, item_lengths: ArrayLike, items_per_document: ArrayLike, tokens: ArrayLike) -> None:
        """Append many documents at once: all their tokens in one array, the length of each item, the items of each."""
        lengths, counts, ids = np.asarray(item_lengths), np.asarray(items_per_document), np.asarray(tokens)
        if (len(lengths) and lengths.min() < 0) or lengths.sum() != len(ids):
            raise ValueError(f"item_lengths must be 0 or more and add up to the {len(ids)} tokens, not {lengths.sum()}")
        if (len(counts) and counts.min() < 0) or counts.sum() != len(lengths):
            raise ValueError(f"items_per_document must add up to the {len(lengths)} items, not {counts.sum()}")
        if len(lengths) and lengths.max() > MAX_LENGTH:
            raise ValueError(f"an item of {lengths.max()} tokens: the format allows {MAX_LENGTH}; split the document")
        self._write(self._as_tokens(ids, lengths, counts))
        self._append(lengths, np.cumsum(counts))

    def merge(self, prefix: Location) -> None:
        """Append a whole token file of the same dtype, its documents as they are."""
        other = open_indexed(prefix)
        if other.dtype != self.dtype:
            raise ValueError(f"{other.prefix} has tokens of {other.dtype}, {self.prefix} of {self.dtype}: cannot merge")
        step = COPY_SIZE // self.dtype.itemsize
        for begin in range(0, other.num_tokens, step):
            self._write(other.tokens[begin : begin + step])
        self._append(other.lengths, other.document_index[1:])

    def _append(self, lengths: NDArray[Any], document_ends: NDArray[Any]) -> None:
        """Record items, and documents by the number of these items that stand before each one's end."""
        items_before = len(self._lengths)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self._document_ends.frombytes((document_ends + items_before).astype(np.int64).tobytes())

    def _write(self, tokens: NDArray[Any]) -> None:
        if self._tokens is None:
            raise ValueError(f"the writer of {self.prefix} is not open; use it in a `with` block")
        self._tokens.write(np.ascontiguousarray(tokens).data.cast("B") if len(tokens) else b"")
        self.num_tokens += len(tokens)
        if len(tokens) and self.dtype.kind in "iu":
            self.largest_token = max(int(tokens.max()), self.largest_token or 0)

    def _as_tokens(self, ids: NDArray[Any], lengths: NDArray[Any], counts: NDArray[Any]) -> NDArray[Any]:
        """The ids in the file's dtype; ValueError with the place of the first one that does not fit."""
        if ids.dtype == self.dtype or not len(ids) or self.dtype.kind == "f":
            return ids.astype(self.dtype, copy=False)
        if ids.dtype.kind not in "iu":
            raise ValueError(f"tokens of {ids.dtype} cannot be written as {self.dtype}; give integers")
        limits = np.iinfo(self.dtype)
        if int(ids.min()) < limits.min or int(ids.max()) > limits.max:
            place = int(((ids < limits.min) | (ids > limits.max)).argmax())
            item = int(np.searchsorted(np.cumsum(lengths), place, side="right"))
            document = self.num_documents + int(np.searchsorted(np.cumsum(counts), item, side="right"))
            position = place - int(lengths[:item].sum())
            raise ValueError(
                f"token {ids[place]} at position {position} of item {self.num_items + item} (document {document}) does "
                f"not fit {self.dtype} ({limits.min} to {limits.max}); write {self.prefix} with a larger dtype"
            )
        return ids.astype(self.dtype)

    def _commit(self) -> None:
        """Put both files in place, the .idx last; leave nothing if that fails."""
        lengths = np.array(self._lengths, np.int32)
        documents = np.array(self._document_ends, np.int64)
        index_path = idx_path(self.prefix)
        finished = False
        try:
            with self._files, open_whole(index_path, "wb", disk=self._disk) as file:
                for part in encode_index(self.dtype, lengths, documents):
                    file.write(part)
                file.flush()  # a full disk shows here, before anything has its name
                if index_path.exists():
                    self._disk.remove(index_path)
                    sync_directory(index_path.parent, disk=self._disk)
                self._files.close()  # gives the .bin its name
            finished = True
        finally:
            if not finished and not index_path.exists():
                with suppress(OSError):
                    self._disk.remove(bin_path(self.prefix))
