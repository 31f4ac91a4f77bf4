"""The files that text is read from: which they are, what is in them, and their content as one stream of bytes.

What a file holds is told by its name, how it is compressed by its first bytes. A file is read from start to end in
small reads, so memory does not depend on its size, however far it expands.
"""

import glob
import gzip
import hashlib
import json
import os
import stat
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from megalith.files import Written

STANDARD_INPUT = "-"
FORMATS = ("jsonl", "text", "parquet")
SUFFIXES = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}  # first bytes, by suffix
PARQUET_MAGIC = b"PAR1"
LONGEST_MAGIC = 4
LONGEST_LINE_SEEN = 1 << 20  # bytes, of a file that may not be what it is named
# 4 KiB of zstd expand to at most 128 MiB: a block of that size takes 4 bytes.
ZSTD_READ_SIZE = 1 << 12


@dataclass(frozen=True)
class Source:
    """One input: its name as shown, what it holds (one of FORMATS), its size in bytes (None: not known)."""

    name: str
    format: str
    size: int | None

    @property
    def is_standard_input(self) -> bool:
        return self.name == STANDARD_INPUT


class ByteStream(Protocol):
    """What `open_stream` gives."""

    def read(self, size: int, /) -> bytes:
        """The next size bytes, fewer only at the end."""


def find_sources(
    inputs: Sequence[str], input_format: str = "auto", *, flag: str = "--input", otherwise: str = "jsonl"
) -> list[Source]:
    """The files that a flag names, in the given order; the matches of a pattern (* ? [ **) in that of their names.

    input_format: one of FORMATS, or auto: by suffix, `otherwise` where the suffix says nothing. Raises ValueError, with
    all faults at once, for what is not a regular file that can be read.
    """
    sources: list[Source] = []
    faults: list[str] = []
    for given in inputs:
        names = [given]
        if glob.has_magic(given) and not os.path.lexists(given):
            names = sorted(glob.glob(given, recursive=True))
            if not names:
                faults.append(f"{flag} {given}: no file matches this pattern")
        for name in names:
            fault = None if name == STANDARD_INPUT else _file_fault(name)
            if fault:
                faults.append(f"{flag} {name}: {fault}")
                continue
            size = None if name == STANDARD_INPUT else os.stat(name).st_size
            form = _format_of(name, otherwise) if input_format == "auto" else input_format
            if input_format == "auto" and form == "text" and size and _begins_as_json(name):
                rule = "is taken for plain text and begins with a line of JSON"
                faults.append(f"{flag} {name}: {rule}; say which with --input-format jsonl or text")
            sources.append(Source(name, form, size))
    if sum(source.is_standard_input for source in sources) > 1:
        faults.append(f"{flag} -: standard input can be read only once")
    if not inputs:
        faults.append(f"{flag}: needs at least one file, a pattern, or - for standard input")
    faults += [
        f"{flag} -: parquet cannot be read from standard input, it has to be a file"
        for source in sources
        if source.is_standard_input and source.format == "parquet"
    ]
    if faults:
        raise ValueError("\n".join(faults))
    return sources


def _file_fault(name: str) -> str | None:
    """Why a path cannot be an input; None if it can."""
    try:
        mode = os.stat(name).st_mode
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if stat.S_ISDIR(mode):
        return f"is a directory; name its files, as in '{name.rstrip('/')}/*.jsonl'"
    if stat.S_ISFIFO(mode):
        return "is a pipe; send it to standard input and give - instead"
    if not stat.S_ISREG(mode):
        return "is a device or socket, not a file"
    if not os.access(name, os.R_OK):
        return "cannot be read (Permission denied)"
    return None


def _format_of(name: str, otherwise: str) -> str:
    path = Path(name)
    if path.suffix.lower() in COMPRESSIONS:
        path = path.with_suffix("")
    return SUFFIXES.get(path.suffix.lower(), otherwise)


def _begins_as_json(name: str) -> bool:
    """Whether the first line of an uncompressed file that is not blank is a JSON object."""
    with open(name, "rb") as file:
        line = file.read(LONGEST_LINE_SEEN).lstrip().split(b"\n", 1)[0]
    try:
        return line.startswith(b"{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


@contextmanager
def open_stream(source: Source) -> Iterator[tuple[ByteStream, "CountedFile"]]:
    """The uncompressed bytes of a source, and the file below, which says how far it has been read.

    Every fault of the file or its compression is a ValueError that names the source.
    """
    file: IO[bytes] = sys.stdin.buffer if source.is_standard_input else _open(source.name)
    try:
        below = CountedFile(file, source.name)
        yield _decompressed(below, source), below
    finally:
        if not source.is_standard_input:
            file.close()


def _open(name: str) -> IO[bytes]:
    try:
        return open(name, "rb")
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror})") from error


class CountedFile:
    """A file's bytes as they are, counted and digested; the first few can be looked at before they are read."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file = file
        self._name = name
        self._ahead = b""
        self._sha256 = hashlib.sha256()
        self.num_read = 0
        self.magic = self._ahead = self._read(LONGEST_MAGIC)

    def read(self, size: int, /) -> bytes:
        content = self._ahead[:size]
        self._ahead = self._ahead[size:]
        if len(content) < size:
            content += self._read(size - len(content))
        self.num_read += len(content)
        return content

    def _read(self, size: int) -> bytes:
        try:
            content = self._file.read(size)
        except OSError as error:
            raise ValueError(f"{self._name}: cannot be read ({error.strerror})") from error
        self._sha256.update(content)
        return content

    @property
    def written(self) -> Written:
        """Size and digest of the file, once it is read to its end."""
        return Written(self.num_read, self._sha256.hexdigest())


def _decompressed(file: CountedFile, source: Source) -> ByteStream:
    suffix = Path(source.name).suffix.lower()
    if suffix in COMPRESSIONS and file.magic and not file.magic.startswith(COMPRESSIONS[suffix]):
        raise ValueError(f"{source.name}: is named {suffix} but does not begin like such a file; rename or repair it")
    if file.magic.startswith(COMPRESSIONS[".gz"]):
        return _GzipStream(file, source.name)
    if file.magic.startswith(COMPRESSIONS[".zst"]):
        return _ZstdStream(file, source.name)
    if file.magic == PARQUET_MAGIC:
        raise ValueError(f"{source.name}: is a parquet file; name it .parquet or give --input-format parquet")
    return file


class _GzipStream:
    def __init__(self, file: CountedFile, name: str) -> None:
        # GzipFile asks its file for no more than `read`.
        self._stream = gzip.GzipFile(fileobj=file, mode="rb")  # type: ignore[call-overload]
        self._name = name
        self._num_read = 0

    def read(self, size: int, /) -> bytes:
        try:
            content: bytes = self._stream.read(size)
        except EOFError as error:
            raise ValueError(
                f"{self._name}: the gzip file ends early, after {self._num_read} bytes of text or more; it was cut off"
            ) from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{self._name}: the gzip file is damaged ({error}), after {self._num_read} bytes of text or more"
            ) from error
        self._num_read += len(content)
        return content


class _ZstdStream:
    """The content of all frames of a zstandard file; unlike the library's reader, it notices one that was cut off."""

    def __init__(self, file: CountedFile, name: str) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(
                f"{name}: reading zstandard needs the package zstandard, which is not installed; "
                "pip install 'megalith[data]' brings it"
            ) from error
        self._error = zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new_frame()
        self._file = file
        self._name = name
        self._num_read = 0
        self._inside = True  # a frame has begun and not ended
        self._ahead = bytearray()

    def read(self, size: int, /) -> bytes:
        while len(self._ahead) < size:
            compressed = self._file.read(ZSTD_READ_SIZE)
            if not compressed:
                if self._inside:
                    raise ValueError(
                        f"{self._name}: the zstandard file ends early, after {self._num_read} bytes of text or more; "
                        "it was cut off"
                    )
                break
            self._decompress(compressed)
        content = bytes(self._ahead[:size])
        del self._ahead[:size]
        self._num_read += len(content)
        return content

    def _decompress(self, compressed: bytes) -> None:
        try:
            while compressed:
                self._inside = True
                self._ahead += self._frame.decompress(compressed)
                compressed = b""
                if self._frame.eof:
                    compressed = self._frame.unused_data
                    self._frame = self._new_frame()
                    self._inside = False
        except self._error as error:
            raise ValueError(
                f"{self._name}: the zstandard file is damaged ({error}), after {self._num_read} bytes of text or more"
            ) from error
