"""Documents of the blocks that `blocks.py` cuts input files into.

A fault is named by file, line and byte offset wherever it is found.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from megalith.data.blocks import ENDS, WHITE, Block, DocumentRules, Part

LEAST_ORJSON = (3, 9, 15)  # in those before a line of nested lists ends the process (CVE-2024-27454)


def _orjson() -> Callable[[str], Any] | None:
    """The parser that comes with the extra `data`; None without it, or if it is too old."""
    try:
        import orjson
    except ImportError:
        return None
    numbers = tuple(int(number) for number in re.findall(r"\d+", orjson.__version__)[:3])
    return orjson.loads if numbers >= LEAST_ORJSON else None


fast_json = _orjson()

BLANK_LINES = re.compile(r"\A(?:[ \t\r]*\n)+")


# How what is wrong with a document begins, where it is not text at all or no JSON object.
NO_UTF8 = "is not UTF-8"
NO_JSON = ("is not JSON", "must be a JSON object")


@dataclass(frozen=True)
class Fault:
    """A document that cannot be used, or a source without any."""

    source: str
    line: int
    offset: int
    reason: str
    unit: str = "line"

    def __str__(self) -> str:
        place = f"row {self.line}" if self.unit == "row" else f"line {self.line}, byte offset {self.offset}"
        return f"{self.source}, {place}: {self.reason}"


def parse_block(block: Block, rules: DocumentRules) -> Iterator[tuple[str, ...] | Fault]:
    """The documents of a block, each as its texts in the order of rules.keys, or a fault in a document's place."""
    begin = 0
    for part in block.parts:
        content = block.content[begin : begin + part.size]
        begin += part.size
        if part.form == "fault":
            yield Fault(part.source, part.line, part.offset, part.reason)
        elif part.form == "row":
            yield from _parse_rows(part, content, rules)
        else:
            yield from _parse_records(part, content, rules)


def _parse_records(part: Part, content: bytes, rules: DocumentRules) -> Iterator[tuple[str, ...] | Fault]:
    end = re.compile(ENDS[part.form])
    parse = PARSERS[part.form]
    records: Sequence[str | bytes]
    try:
        text = content.decode()
        records = text.split("\n") if end.pattern == b"\n" else re.split(end.pattern.decode(), text)
    except UnicodeDecodeError:
        # Record by record, to find those that are not UTF-8.
        records = end.split(content)
    may_be_long = len(content) > rules.max_bytes
    places, passed = _places(part, content, end), 0  # looked for as far as there are faults, once however many
    for number, record in enumerate(records):
        if not (record.strip(WHITE) if isinstance(record, bytes) else record.strip(WHITE.decode())):
            continue
        try:
            if may_be_long and len(record if isinstance(record, bytes) else record.encode()) > rules.max_bytes:
                raise _BadDocumentError(f"is longer than {rules.max_bytes} bytes (--max-document-mb)")
            yield parse(_decode(record), rules.keys)
        except _BadDocumentError as fault:
            line, offset = next(islice(places, number - passed, None))
            passed = number + 1
            yield Fault(part.source, line, offset, str(fault))


class _BadDocumentError(ValueError):
    """What is wrong with one document."""


def _decode(record: str | bytes) -> str:
    if isinstance(record, str):
        return record
    try:
        return record.decode()
    except UnicodeDecodeError as error:
        byte = record[error.start]
        raise _BadDocumentError(f"{NO_UTF8}: byte 0x{byte:02x}, {error.start} bytes after its start") from error


def _places(part: Part, content: bytes, end: re.Pattern[bytes]) -> Iterator[tuple[int, int]]:
    """The line and the byte offset at which each record begins."""
    line, begin = part.line, 0
    yield line, part.offset
    for found in end.finditer(content):
        line, begin = line + content.count(b"\n", begin, found.end()), found.end()
        yield line, part.offset + begin


def _parse_json(line: str, keys: Sequence[str]) -> tuple[str, ...]:
    if fast_json is not None:
        # What it refuses is looked at again below: the standard library's parser decides, and says why.
        with suppress(ValueError):
            document = fast_json(line)
            if isinstance(document, dict) and all(isinstance(document.get(key), str) for key in keys):
                return tuple(document[key] for key in keys)
    try:
        document = json.loads(line)
    except json.JSONDecodeError as error:
        raise _BadDocumentError(f"is not JSON: {error.msg} (character {error.colno})") from error
    except RecursionError as error:
        raise _BadDocumentError("is not usable JSON: brackets nested too deeply") from error
    except ValueError as error:
        raise _BadDocumentError(f"is not usable JSON: {error}") from error
    if not isinstance(document, dict):
        raise _BadDocumentError(f"must be a JSON object, but is {_kind(document)}")
    texts = []
    for key in keys:
        if key not in document:
            has = ", ".join(repr(name)[:40] for name in list(document)[:10]) or "none"
            raise _BadDocumentError(f"has no key {key!r} (--json-keys); its keys: {has}")
        text = document[key]
        if not isinstance(text, str):
            raise _BadDocumentError(f"the value of {key!r} must be text, but is {_kind(text)}")
        texts.append(text)
    if "\\u" in line:
        _check_surrogates(texts)
    return tuple(texts)


def _check_surrogates(texts: Sequence[str]) -> None:
    """Escapes in JSON can spell half a surrogate pair, which is no character."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = ord(text[error.start])
            raise _BadDocumentError(f"holds \\u{half:04x}, half a surrogate pair, which is not a character") from error


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _parse_file(text: str, keys: Sequence[str]) -> tuple[str, ...]:
    return (text,)


def _parse_paragraph(text: str, keys: Sequence[str]) -> tuple[str, ...]:
    """A paragraph without the blank lines around it; the first line keeps its indentation."""
    return (BLANK_LINES.sub("", text.rstrip(WHITE.decode())),)


def _parse_line(text: str, keys: Sequence[str]) -> tuple[str, ...]:
    return (text.rstrip("\r"),)


PARSERS = {"jsonl": _parse_json, "file": _parse_file, "paragraph": _parse_paragraph, "line": _parse_line}


def _parse_rows(part: Part, content: bytes, rules: DocumentRules) -> Iterator[tuple[str, ...] | Fault]:
    """The rows that `_pack_column` packed, one column after the other."""
    columns: list[list[bytes | None]] = []
    begin = 0
    for _ in rules.keys:
        lengths = np.frombuffer(content, np.int64, part.count, begin).tolist()
        begin += 8 * part.count
        texts: list[bytes | None] = []
        for length in lengths:
            texts.append(None if length < 0 else content[begin : begin + length])
            begin += max(length, 0)
        columns.append(texts)
    for number, row in enumerate(zip(*columns, strict=True)):
        try:
            yield tuple(_row_text(text, key, rules) for text, key in zip(row, rules.keys, strict=True))
        except _BadDocumentError as fault:
            yield Fault(part.source, part.line + number, 0, str(fault), unit="row")


def _row_text(text: bytes | None, key: str, rules: DocumentRules) -> str:
    if text is None:
        raise _BadDocumentError(f"the value of {key!r} must be text, but is null")
    if len(text) > rules.max_bytes:
        raise _BadDocumentError(f"{key!r} is longer than {rules.max_bytes} bytes (--max-document-mb)")
    return _decode(text)
