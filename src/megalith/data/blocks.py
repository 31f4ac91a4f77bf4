"""Input files of any size cut into blocks, which `documents.py` makes documents of, in other processes.

`read_blocks` only finds ends of lines (or rows, paragraphs, files), which is fast, and hands out blocks of about 1 MiB.
A block knows where it comes from. Offsets count the uncompressed bytes of a file, lines begin at 1.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from megalith.data.input_files import ByteStream, Source, open_stream
from megalith.files import Written, digest_of

if TYPE_CHECKING:
    import pyarrow as pa

Seen: TypeAlias = dict[str, Written]  # what a source was, by name
READ_SIZE = 1 << 20  # bytes per read, and the size of a usual block
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
TEXT_DOCUMENTS = ("file", "paragraph", "line")
WHITE = b" \t\r\n"  # what a blank line consists of
NEVER = rb"(?!)"  # matches nowhere
ENDS = {  # what ends a record of each form
    "jsonl": rb"\n",
    "line": rb"\n",
    "paragraph": rb"\n[ \t\r]*\n",
    "file": NEVER,
}


@dataclass(frozen=True)
class Part:
    """A stretch of one source inside a block.

    form: jsonl, line, paragraph, file, row, or fault. line and offset: where it begins (for rows: the number of the
    first row, from 1). size: its bytes in the block. count: its rows. reason: what is wrong, for a fault.
    """

    source: str
    form: str
    line: int
    offset: int
    size: int = 0
    count: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Block:
    """Some parts, one after the other, and their bytes; num_read: bytes of all input files read up to its end."""

    parts: tuple[Part, ...]
    content: bytes
    num_read: int


@dataclass(frozen=True)
class DocumentRules:
    """How documents are taken from files.

    keys: the fields (JSON) or columns (parquet) that hold text; plain text has one. text_documents: what is a document
    in plain text, one of TEXT_DOCUMENTS. max_bytes: of one document as it stands in the file.
    """

    keys: tuple[str, ...]
    text_documents: str = "file"
    max_bytes: int = 1 << 28


def read_blocks(sources: Sequence[Source], rules: DocumentRules, *, seen: Seen | None = None) -> Iterator[Block]:
    """The sources in order, in blocks of about READ_SIZE bytes that end where a document ends.

    seen: gets the size and digest of each source that was read to its end, by name; in place.

    A block is larger only where a document is: memory stays below READ_SIZE + rules.max_bytes. Small files share
    blocks. Raises ValueError for a source that cannot be read to its end.
    """
    held: list[tuple[Part, bytes]] = []
    size = 0
    before = 0  # bytes of the sources that are done
    for source in sources:
        reader = _read_parquet if source.format == "parquet" else _read_stream
        num_read = 0
        try:
            for part, content, num_read in reader(source, rules, {} if seen is None else seen):
                held.append((part, content))
                size += len(content)
                # A read cut at the end of a document is a little smaller than the read.
                if 2 * size >= READ_SIZE:
                    yield _join(held, before + num_read)
                    held, size = [], 0
        except ValueError:
            # What was read before the fault comes before it.
            yield _join(held, before + num_read)
            raise
        before += num_read if source.size is None else source.size
    if held:
        yield _join(held, before)


def _join(held: Sequence[tuple[Part, bytes]], num_read: int) -> Block:
    return Block(tuple(part for part, _ in held), b"".join(content for _, content in held), num_read)


def _read_stream(source: Source, rules: DocumentRules, seen: Seen) -> Iterator[tuple[Part, bytes, int]]:
    """The parts of a source of JSON lines or text, their bytes, and how much of the file is read."""
    form = "jsonl" if source.format == "jsonl" else rules.text_documents
    has_content = False
    with open_stream(source) as (stream, file):
        for line, offset, content in _cut(stream, re.compile(ENDS[form]), rules.max_bytes):
            if content is None:
                reason = f"is longer than {rules.max_bytes} bytes (--max-document-mb)"
                if form == "file":
                    reason += "; --text-documents paragraph or line makes several documents of a file"
                has_content = True
                yield Part(source.name, "fault", line, offset, reason=reason), b"", file.num_read
                continue
            has_content = has_content or bool(content.strip(WHITE))
            yield Part(source.name, form, line, offset, len(content)), content, file.num_read
        if not has_content:
            reason = "the file is empty or holds nothing but blank lines"
            yield Part(source.name, "fault", 1, 0, reason=reason), b"", file.num_read
        seen[source.name] = file.written


def _cut(stream: ByteStream, end: re.Pattern[bytes], max_bytes: int) -> Iterator[tuple[int, int, bytes | None]]:
    """A stream in pieces that hold whole records: line, offset and bytes; None for a record that is too long.

    end matches what ends a record. A byte order mark at the start is left out.
    """
    last_end = re.compile(b"(?s:.*)" + end.pattern)
    line, offset = 1, 0
    held = bytearray(stream.read(READ_SIZE))
    if held.startswith(BYTE_ORDER_MARK):
        del held[:3]
        offset = 3
    searched = 0  # bytes of held that are known to hold no end
    skipping = False
    while True:
        # One byte again, for an end may lie across two reads.
        found = (end.search if skipping else last_end.match)(held, max(searched - 1, 0))
        if found:
            content = bytes(held[: found.end()])
            if not skipping:
                yield line, offset, content
        elif len(held) > max_bytes or skipping:
            if not skipping:
                yield line, offset, None
            # All but a possible first byte of an end is done with.
            content = bytes(held[:-1])
        else:
            content = b""
        line, offset = line + content.count(b"\n"), offset + len(content)
        del held[: len(content)]
        was_skipping, skipping = skipping, not found and (skipping or bool(content))
        if found and was_skipping:
            searched = 0  # only the first end has been looked for
            continue
        searched = len(held)
        read = stream.read(READ_SIZE)
        if not read:
            break
        held += read
    if held and not skipping:
        yield line, offset, bytes(held)


def _read_parquet(source: Source, rules: DocumentRules, seen: Seen) -> Iterator[tuple[Part, bytes, int]]:
    """The rows of a parquet file, a batch of about READ_SIZE bytes at a time, and about how much of it is read."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(
            f"{source.name}: reading parquet needs the package pyarrow, which is not installed; "
            "pip install 'megalith[data]' brings it"
        ) from error
    row = 1
    try:
        with pq.ParquetFile(source.name, pre_buffer=False) as file:
            _check_columns(source, file.schema_arrow, rules.keys)
            num_rows = file.metadata.num_rows
            if num_rows == 0:
                yield Part(source.name, "fault", 1, 0, reason="the file has no rows"), b"", 0
            for batch in file.iter_batches(_rows_at_once(file.metadata), columns=list(rules.keys), use_threads=False):
                content = b"".join(_pack_column(batch.column(key)) for key in rules.keys)
                done = (source.size or 0) * (row + batch.num_rows - 1) // num_rows
                yield Part(source.name, "row", row, 0, len(content), batch.num_rows), content, done
                row += batch.num_rows
        seen[source.name] = digest_of(Path(source.name).resolve())
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{source.name}: not a readable parquet file, from row {row} on ({error!s:.200})") from error


def _check_columns(source: Source, schema: "pa.Schema", keys: Sequence[str]) -> None:
    import pyarrow as pa

    for key in keys:
        if key not in schema.names:
            raise ValueError(f"{source.name}: has no column {key}; it has {', '.join(schema.names)} (--json-keys)")
        kind = schema.field(key).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if str(kind) not in ("string", "large_string", "string_view"):
            raise ValueError(f"{source.name}: column {key} holds {kind}, not text (--json-keys)")


def _rows_at_once(metadata: Any) -> int:
    """How many rows of a parquet file hold about READ_SIZE bytes."""
    num_bytes = sum(int(metadata.row_group(number).total_byte_size) for number in range(metadata.num_row_groups))
    return max(1, READ_SIZE * int(metadata.num_rows) // max(num_bytes, 1))


def _pack_column(column: "pa.Array") -> bytes:
    """A column of text as bytes: the length of each row's text (int64, -1 for null), then the texts."""
    import pyarrow as pa

    texts = column.cast(pa.large_string())
    _, ends, content = texts.buffers()
    bounds = np.frombuffer(ends, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    lengths = np.where(texts.is_valid().to_numpy(zero_copy_only=False), np.diff(bounds), -1)
    return lengths.tobytes() + (content[bounds[0] : bounds[-1]].to_pybytes() if content is not None else b"")
