"""Documents from files: which files, how they are cut, and by what place a fault is named."""

import gzip
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import megalith.data.blocks
import megalith.data.documents
from megalith.data.blocks import DocumentRules, read_blocks
from megalith.data.documents import Fault, parse_block
from megalith.data.input_files import find_sources

RULES = DocumentRules(("text",))


def read(*names: object, rules: DocumentRules = RULES, input_format: str = "auto") -> list[tuple[str, ...] | Fault]:
    """All documents and faults of some inputs."""
    sources = find_sources([str(name) for name in names], input_format)
    return [document for block in read_blocks(sources, rules) for document in parse_block(block, rules)]


def good(*texts: str) -> list[tuple[str, ...]]:
    return [(text,) for text in texts]


def jsonl(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


@pytest.fixture(params=[1, 3, 7, 64, 1 << 20])
def read_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Reads so small that every place where an input can be cut is tried."""
    size: int = request.param
    monkeypatch.setattr(megalith.data.blocks, "READ_SIZE", size)
    return size


@pytest.mark.usefixtures("read_size")
def test_json_lines_are_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        jsonl("one", "two\nlines", "", "\u4e2d \U0001f600") + b'\r\n \n{"text": "last", "n": 1}'
    )
    assert read(tmp_path / "a.jsonl") == good("one", "two\nlines", "", "\u4e2d \U0001f600", "last")


ODD_LINES = [
    '{"text": "a\\ud83d"}',
    '{"text": "\\ud83d\\ude00"}',
    '{"text": "a", "text": "b"}',
    '{"text": NaN}',
    '{"text": "a", "n": NaN}',
    '{"text": "a", "n": 123456789012345678901234567890}',
    '{"text": null}',
    '{"text": ["a"]}',
    '{"other": "a"}',
    '["text"]',
    '"text"',
    '{"text": "a"} x',
    '{"text": "tab\there"}',
    '{"text": "' + "a" * 1000 + '"',
    "[" * 5000,
    '{"text": "a", "deep": ' + "[" * 600 + "]" * 600 + "}",
]


@pytest.mark.parametrize("line", ODD_LINES, ids=range(len(ODD_LINES)))
def test_the_fast_parser_and_the_standard_one_agree_on_every_line(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n")
    assert megalith.data.documents.fast_json is not None
    fast = [str(found) for found in read(tmp_path / "a.jsonl")]
    monkeypatch.setattr(megalith.data.documents, "fast_json", None)
    assert fast == [str(found) for found in read(tmp_path / "a.jsonl")]


@pytest.mark.usefixtures("read_size")
def test_text_is_a_document_by_file_paragraph_or_line(tmp_path: Path) -> None:
    text = "\n\nA first\nparagraph.\n\n  \t\n  indented\r\n\r\nlast \u4e2d"
    (tmp_path / "a.txt").write_bytes(text.encode())
    by = {kind: DocumentRules(("text",), kind) for kind in ("file", "paragraph", "line")}
    assert read(tmp_path / "a.txt", rules=by["file"]) == good(text)
    assert read(tmp_path / "a.txt", rules=by["paragraph"]) == good("A first\nparagraph.", "  indented", "last \u4e2d")
    assert read(tmp_path / "a.txt", rules=by["line"]) == good("A first", "paragraph.", "  indented", "last \u4e2d")


@given(
    st.lists(st.text(st.sampled_from("ab\u4e2d \n\r\t"), max_size=12), max_size=12),
    st.integers(1, 40),
    st.sampled_from(["paragraph", "line"]),
)
@settings(max_examples=200, deadline=None)
def test_where_text_is_cut_does_not_depend_on_the_size_of_reads(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str], read_size: int, kind: str
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_bytes("\n".join(parts).encode())
    rules = DocumentRules(("text",), kind)
    expected = read(path, rules=rules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megalith.data.blocks, "READ_SIZE", read_size)
        assert read(path, rules=rules) == expected


def zstd_frames(content: bytes) -> bytes:
    """Two frames, as a tool that works in parallel writes them."""
    half = len(content) // 2
    compress = zstandard.ZstdCompressor().compress
    return compress(content[:half]) + compress(content[half:])


def gzip_members(content: bytes) -> bytes:
    return gzip.compress(content[:5]) + gzip.compress(content[5:])


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip_members), (".zst", zstd_frames)])
@pytest.mark.usefixtures("read_size")
def test_compressed_files_are_read_through_all_their_parts(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(jsonl("one", "two", "three" * 100)))
    assert read(path) == good("one", "two", "three" * 100)


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstd_frames)])
def test_a_compressed_file_that_was_cut_off_is_refused(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    whole = compress(jsonl(*(str(n) for n in range(1000))))
    for size in (len(whole) - 1, len(whole) // 2, 20):
        path.write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=rf"a.jsonl{suffix}: the \w+ file ends early, after \d+ bytes of text or more"
        ):
            read(path)


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.ZstdCompressor(write_checksum=True).compress)]
)
def test_a_damaged_compressed_file_is_refused(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    content = bytearray(compress(jsonl(*(str(n * n) for n in range(1000)))))
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a.jsonl{suffix}: the \w+ file is damaged"):
        read(path)


def test_a_name_that_promises_compression_has_to_keep_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(jsonl("plain"))
    with pytest.raises(ValueError, match=r"is named .gz but does not begin like such a file"):
        read(tmp_path / "a.jsonl.gz")


def test_compression_is_seen_by_content(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(jsonl("x")))
    assert read(tmp_path / "a.jsonl") == good("x")


def test_a_byte_order_mark_at_the_start_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl("x"))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfx\n")
    assert read(tmp_path / "a.jsonl", tmp_path / "a.txt") == good("x", "x\n")


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> None:
    pq.write_table(pa.table(columns), path, **options)


def test_parquet_rows_are_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megalith.data.blocks, "READ_SIZE", 64)
    texts = ["one", "", "\u4e2d\u6587", "x" * 500] * 5
    kinds = {
        "string": pa.array(texts),
        "large": pa.array(texts, pa.large_string()),
        "categories": pa.array(texts).dictionary_encode(),
    }
    for name, column in kinds.items():
        write_parquet(tmp_path / f"{name}.parquet", {"text": column, "n": list(range(20))}, row_group_size=7)
        assert read(tmp_path / f"{name}.parquet") == good(*texts)


def test_json_lines_that_are_named_as_text_are_not_taken_for_text(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"\n" + jsonl("one", "two"))
    with pytest.raises(ValueError, match="begins with a line of JSON; say which with --input-format jsonl or text"):
        find_sources([str(path)])
    assert read(path, input_format="jsonl") == good("one", "two")
    path.write_text("{ no json")
    assert read(path) == good("{ no json")
    path.write_text('{"a":' * 50_000)
    assert len(read(path)) == 1


def test_several_keys_give_several_texts(tmp_path: Path) -> None:
    rules = DocumentRules(("title", "text"))
    (tmp_path / "a.jsonl").write_text('{"text": "b", "title": "A"}\n')
    write_parquet(tmp_path / "b.parquet", {"text": ["d", "f"], "title": ["C", "E"]})
    assert read(tmp_path / "a.jsonl", tmp_path / "b.parquet", rules=rules) == [("A", "b"), ("C", "d"), ("E", "f")]


def test_faults_of_parquet_are_named_by_row(tmp_path: Path) -> None:
    bad_text = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff")]
    )
    write_parquet(tmp_path / "a.parquet", {"text": ["x", None, "y"]})
    write_parquet(tmp_path / "b.parquet", {"text": bad_text})
    first, fault, last, other = read(tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert (first, last) == (("x",), ("y",))
    assert str(fault) == f"{tmp_path}/a.parquet, row 2: the value of 'text' must be text, but is null"
    assert str(other) == f"{tmp_path}/b.parquet, row 1: is not UTF-8: byte 0xff, 1 bytes after its start"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["x"]}, r"has no column text; it has body \(--json-keys\)"),
        ({"text": [1]}, r"column text holds int64, not text"),
        ({"text": [b"x"]}, r"column text holds binary, not text"),
    ],
)
def test_parquet_without_a_text_column_is_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.parquet")


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"text": [str(n) for n in range(1000)]})
    whole = (tmp_path / "a.parquet").read_bytes()
    for content in (whole[:-10], b"PAR1", b"", whole[: len(whole) // 2] + bytes(50) + whole[len(whole) // 2 + 50 :]):
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"a.parquet: not a readable parquet file"):
            read(tmp_path / "a.parquet")


@pytest.mark.parametrize("missing", ["pyarrow", "zstandard"])
def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    name = {"pyarrow": "a.parquet", "zstandard": "a.jsonl.zst"}[missing]
    write_parquet(tmp_path / "a.parquet", {"text": ["x"]})
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(jsonl("x")))
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        ValueError, match=rf"needs the package {missing}, which is not installed; pip install 'megalith\[data\]'"
    ):
        read(tmp_path / name)


BAD_LINES = {
    b"{": "is not JSON: Expecting property name",
    b'{"text": "a\x00"}': "is not JSON: Invalid control character",
    b"[1]": "must be a JSON object, but is a list",
    b"null": "must be a JSON object, but is null",
    b'{"txt": 1}': r"has no key 'text' \(--json-keys\); its keys: 'txt'",
    b"{}": r"has no key 'text' \(--json-keys\); its keys: none",
    b'{"text": 5}': "the value of 'text' must be text, but is a number",
    b'{"text": null}': "the value of 'text' must be text, but is null",
    b'{"text": ["a"]}': "the value of 'text' must be text, but is a list",
    b'{"text": "a\xff"}': "is not UTF-8: byte 0xff, 11 bytes after its start",
    b'{"text": "\xed\xa0\x80"}': "is not UTF-8: byte 0xed",
    b'{"text": "\\ud800 alone"}': r"holds \\ud800, half a surrogate pair",
    b"[" * 100_000: "brackets nested too deeply",
    b"1" * 5000: "is not usable JSON: Exceeds the limit",
}


@pytest.mark.parametrize("line", BAD_LINES)
@pytest.mark.usefixtures("read_size")
def test_a_bad_line_is_named_by_file_line_and_offset(tmp_path: Path, line: bytes) -> None:
    before = jsonl("one", "\u4e2d") + b"\n"
    (tmp_path / "a.jsonl").write_bytes(before + line + b"\n" + jsonl("after"))
    first, second, fault, after = read(tmp_path / "a.jsonl")
    assert [first, second, after] == good("one", "\u4e2d", "after")
    assert isinstance(fault, Fault)
    assert (fault.source, fault.line, fault.offset) == (str(tmp_path / "a.jsonl"), 4, len(before))
    with pytest.raises(ValueError, match=BAD_LINES[line]):
        raise ValueError(str(fault))


def test_many_bad_lines_cost_no_more_than_that_many_good_ones(tmp_path: Path) -> None:
    lines = [b"\n" if number % 3 == 0 else b"x\n" for number in range(100_000)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    began = time.process_time()
    faults = read(tmp_path / "a.jsonl")
    assert time.process_time() - began < 30  # each looked for from the start takes a quarter of an hour
    offsets = [0, *accumulate(map(len, lines))]
    expected = [(number + 1, offsets[number]) for number, line in enumerate(lines) if line != b"\n"]
    assert [(fault.line, fault.offset) for fault in faults if isinstance(fault, Fault)] == expected


@pytest.mark.usefixtures("read_size")
def test_a_paragraph_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\nlines\n\n\nbad \xe4\n\nagain")
    rules = DocumentRules(("text",), "paragraph")
    first, fault, last = read(tmp_path / "a.txt", rules=rules)
    assert [first, last] == good("good\nlines", "again")
    assert isinstance(fault, Fault)
    assert fault.offset in (12, 13)  # with or without the blank line before it, which belongs to no paragraph
    assert "byte 0xe4" in fault.reason


def test_a_whole_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("text in UTF-16".encode("utf-16"))
    (fault,) = read(tmp_path / "a.txt")
    assert str(fault) == f"{tmp_path}/a.txt, line 1, byte offset 0: is not UTF-8: byte 0xff, 0 bytes after its start"


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", b""), ("a.txt", b" \n\n"), ("a.jsonl", b"\r\n\n"), ("a.txt", b"")]
)
def test_a_file_without_documents_is_a_fault(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    (fault,) = read(tmp_path / name)
    assert str(fault) == f"{tmp_path}/{name}, line 1, byte offset 0: the file is empty or holds nothing but blank lines"


def test_a_parquet_file_without_rows_is_a_fault(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"text": pa.array([], pa.string())})
    (fault,) = read(tmp_path / "a.parquet")
    assert isinstance(fault, Fault)
    assert fault.reason == "the file has no rows"


@pytest.mark.usefixtures("read_size")
def test_a_line_that_is_too_long_is_a_fault_and_the_next_one_is_read(tmp_path: Path) -> None:
    rules = DocumentRules(("text",), max_bytes=200)
    before = jsonl("one")
    (tmp_path / "a.jsonl").write_bytes(before + jsonl("x" * 5000) + jsonl("two") + jsonl("y" * 300) + jsonl("three"))
    documents = read(tmp_path / "a.jsonl", rules=rules)
    assert [d for d in documents if not isinstance(d, Fault)] == good("one", "two", "three")
    faults = [d for d in documents if isinstance(d, Fault)]
    assert [(fault.line, fault.offset) for fault in faults] == [
        (2, len(before)),
        (4, len(before + jsonl("x" * 5000) + jsonl("two"))),
    ]
    assert all("is longer than 200 bytes (--max-document-mb)" in fault.reason for fault in faults)


@pytest.mark.usefixtures("read_size")
def test_a_file_that_is_too_long_for_a_document_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"line\n" * 1000)
    (fault,) = read(tmp_path / "a.txt", rules=DocumentRules(("text",), max_bytes=2000))
    assert "--text-documents paragraph or line makes several documents of a file" in str(fault)


class Endless(io.RawIOBase):
    """A line without end, as a decompressor may give it."""

    name = "endless"

    def read(self, size: int = -1, /) -> bytes:
        return b"x" * size


def test_a_line_without_end_takes_bounded_memory() -> None:
    cut: Iterator[Any] = megalith.data.blocks._cut(Endless(), re.compile(rb"\n"), 1 << 24)
    assert next(cut) == (1, 0, None)


def test_small_files_share_blocks_and_large_ones_do_not_fill_the_memory(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"small{number:02}.jsonl").write_bytes(jsonl(str(number)))
    (tmp_path / "large.jsonl").write_bytes(jsonl(*("x" * 1000 for _ in range(5000))))
    small = list(read_blocks(find_sources([str(tmp_path / "small*.jsonl")]), RULES))
    assert [len(block.parts) for block in small] == [50]
    large = list(read_blocks(find_sources([str(tmp_path / "large.jsonl")]), RULES))
    assert len(large) == 5
    assert max(len(block.content) for block in large) < 2 << 20
    assert large[-1].num_read == (tmp_path / "large.jsonl").stat().st_size


def test_patterns_name_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        (tmp_path / name).write_bytes(jsonl(name))
    assert read(tmp_path / "*.jsonl") == good("a.jsonl", "b.jsonl")
    assert read(tmp_path / "**/*.jsonl") == good("a.jsonl", "b.jsonl", "sub/c.jsonl")
    assert read(tmp_path / "sub/c.jsonl", tmp_path / "[ab].jsonl") == good("sub/c.jsonl", "a.jsonl", "b.jsonl")


def test_a_name_that_looks_like_a_pattern_is_a_name_if_it_exists(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_bytes(jsonl("odd"))
    assert read(tmp_path / "a[1].jsonl") == good("odd")


def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(gzip.compress(jsonl("from", "a pipe")))

    monkeypatch.setattr(sys, "stdin", Stdin)
    assert read("-") == good("from", "a pipe")


def test_all_inputs_that_cannot_be_read_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    names = ["missing.jsonl", "none*.jsonl", "folder", "pipe", "loop"]
    with pytest.raises(ValueError) as caught:
        find_sources([*(str(tmp_path / name) for name in names), "/dev/zero", "-", "-"])
    faults = str(caught.value).splitlines()
    assert [fault.rpartition("/")[2] if "folder" not in fault else fault for fault in faults[:2]] == [
        "missing.jsonl: cannot be read (No such file or directory)",
        "none*.jsonl: no file matches this pattern",
    ]
    assert faults[2].endswith(f"folder: is a directory; name its files, as in '{tmp_path}/folder/*.jsonl'")
    assert faults[3].endswith("pipe: is a pipe; send it to standard input and give - instead")
    assert "loop: cannot be read (Too many levels of symbolic links)" in faults[4]
    assert faults[5] == "--input /dev/zero: is a device or socket, not a file"
    assert faults[6] == "--input -: standard input can be read only once"


def test_no_input_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="--input: needs at least one file"):
        find_sources([])


def test_the_format_is_told_by_the_name_unless_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "corpus").write_bytes(jsonl("no suffix"))
    (tmp_path / "notes.log").write_bytes(b"plain")
    write_parquet(tmp_path / "table", {"text": ["x"]})
    assert read(tmp_path / "corpus") == good("no suffix")
    assert read(tmp_path / "notes.log", input_format="text") == good("plain")
    assert read(tmp_path / "table", input_format="parquet") == good("x")
    with pytest.raises(ValueError, match=r"is a parquet file; name it .parquet or give --input-format parquet"):
        read(tmp_path / "table")


@pytest.mark.parametrize(("version", "is_used"), [("3.9.14", False), ("3.9.15", True), ("3.10.0", True), ("4.0", True)])
def test_an_orjson_that_nested_lists_crash_is_not_used(
    version: str, is_used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "orjson", SimpleNamespace(__version__=version, loads=json.loads))
    assert megalith.data.documents._orjson() is (json.loads if is_used else None)
    monkeypatch.setitem(sys.modules, "orjson", None)
    assert megalith.data.documents._orjson() is None
