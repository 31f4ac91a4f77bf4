"""An .idx is believed only as far as the sizes of both files bear it out."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megalith.data.index_file import HEADER, OLD_HEADER, encode_index
from megalith.data.indexed import IndexedDataset, IndexedWriter, open_indexed

LENGTHS = [3, 4, 1, 0, 5, 2, 6]
DOCUMENTS = [0, 2, 3, 3, 7]
LENGTHS_AT = HEADER.size
OFFSETS_AT = LENGTHS_AT + 4 * len(LENGTHS)
DOCUMENTS_AT = OFFSETS_AT + 8 * len(LENGTHS)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A token file of 7 items in 4 documents."""
    with IndexedWriter(tmp_path / "corpus", "int32") as writer:
        writer.add_documents(LENGTHS, np.diff(DOCUMENTS), np.arange(sum(LENGTHS)))
    return tmp_path / "corpus"


def overwrite(path: Path, at: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(value)] = value
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"X", r"corpus\.idx: magic: expected MMIDIDX or TNTIDX, .* found b'XMIDIDX"),
        (9, struct.pack("<Q", 2), r"corpus\.idx: version: expected 1, found 2"),
        (17, b"\x09", r"dtype code: expected one of 1, 2, 3, 4, 5, 6, 7, 8, found 9"),
        (17, b"\x05", r"offset of item 1: expected 24 .*, found 12"),
        (18, struct.pack("<Q", 8), r"size: expected 170 bytes for the header's 8 items, 5 entries, found 158"),
        (18, struct.pack("<Q", 2**63), r"size: expected \d+ bytes for the header's 9223372036854775808 items"),
        (26, struct.pack("<Q", 2**64 - 1), r"size: expected \d+ bytes"),
        (LENGTHS_AT + 4, struct.pack("<i", -4), r"length of item 1: expected 0 or more tokens, found -4"),
        (LENGTHS_AT + 4, struct.pack("<i", 5), r"offset of item 2: expected 32 .*, found 28"),
        (LENGTHS_AT + 24, struct.pack("<i", 7), r"corpus\.bin: size: expected 88 bytes, by the lengths .* found 84"),
        (OFFSETS_AT, struct.pack("<q", 4), r"offset of item 0: expected 0 .*, found 4"),
        (OFFSETS_AT + 8, struct.pack("<q", -12), r"offset of item 1: expected 12 .*, found -12"),
        (DOCUMENTS_AT, struct.pack("<q", 1), r"first document's start: expected 0, found 1"),
        (DOCUMENTS_AT + 8, struct.pack("<q", 4), r"start of document 2: expected 4 or more, found 3"),
        (
            DOCUMENTS_AT + 32,
            struct.pack("<q", 5),
            r"end of the document index: expected 7.*found 5 \(Megatron-LM's merge",
        ),
    ],
)
def test_a_wrong_field_is_refused_by_name(prefix: Path, at: int, value: bytes, message: str) -> None:
    overwrite(prefix.with_suffix(".idx"), at, value)
    with pytest.raises(ValueError, match=message):
        open_indexed(prefix)


@pytest.mark.parametrize("cut", [0, 5, 20, 33, 60, 157])
def test_a_truncated_index_is_refused(prefix: Path, cut: int) -> None:
    os.truncate(prefix.with_suffix(".idx"), cut)
    with pytest.raises(ValueError, match=r"corpus\.idx: (magic|size): expected"):
        open_indexed(prefix)


@pytest.mark.parametrize("change", [-1, -4, 1, 4])
def test_tokens_of_another_size_are_refused(prefix: Path, change: int) -> None:
    os.truncate(prefix.with_suffix(".bin"), 84 + change)
    with pytest.raises(ValueError, match=rf"corpus\.bin: size: expected 84 bytes.*found {84 + change}"):
        open_indexed(prefix)


def test_a_document_index_without_entries_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus.bin").touch()
    (tmp_path / "corpus.idx").write_bytes(HEADER.pack(b"MMIDIDX\0\0", 1, 4, 0, 0))
    with pytest.raises(ValueError, match="entries of the document index: expected 1 or more, found 0"):
        open_indexed(tmp_path / "corpus")


def test_a_file_without_items_is_read(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "corpus", "uint16"):
        pass
    indexed = open_indexed(tmp_path / "corpus")
    assert (indexed.num_items, indexed.num_documents, indexed.num_tokens) == (0, 0, 0)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_only_regular_files_are_opened(prefix: Path, suffix: str) -> None:
    path = prefix.with_suffix(suffix)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=rf"corpus\{suffix}: kind: expected a regular file, found p"):
        open_indexed(prefix)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=rf"corpus\{suffix}: kind: expected a regular file, found d"):
        open_indexed(prefix)


@pytest.mark.parametrize(("name", "impl"), [("tiny_int32", "lazy"), ("tiny_int32", "cached"), ("lazy_int32", "mmap")])
def test_the_other_format_is_refused_where_one_is_asked_for(golden: Path, name: str, impl: str) -> None:
    with pytest.raises(ValueError, match=f"magic: expected .* for --data-impl {impl} .leave that out."):
        open_indexed(golden / name, impl)


def test_an_unknown_impl_names_the_known_ones(golden: Path) -> None:
    with pytest.raises(ValueError, match="data_impl='memory' is none of mmap, lazy, cached, infer"):
        open_indexed(golden / "tiny_int32", "memory")


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (8, 2, "version: expected 1, found 2"),
        (16, 11, "dtype code"),
        (24, 8, "bytes of a token: expected 4 for int32, found 8"),
        (32, 3, "size: expected"),
        (40, 2**62, "size: expected"),
        (OLD_HEADER.size + 8, 2, "shapes: expected one size for every item"),
        (OLD_HEADER.size + 48, 4, "data offsets: expected the running sum of the sizes"),
        (OLD_HEADER.size + 80, -1, "length of item 0: expected 0 to 2147483647, found -1"),
        (OLD_HEADER.size + 112, 3, "first document's start: expected 0, found 3"),
    ],
)
def test_a_wrong_field_of_the_older_format_is_refused(
    golden: Path, tmp_path: Path, at: int, value: int, message: str
) -> None:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"old{suffix}").write_bytes((golden / f"lazy_int32{suffix}").read_bytes())
    overwrite(tmp_path / "old.idx", at, struct.pack("<q", value))
    with pytest.raises(ValueError, match=message):
        open_indexed(tmp_path / "old")


def mutations(random: np.random.Generator) -> list[Callable[[bytearray], None]]:
    """Ways to damage a file in place."""

    def flip(content: bytearray) -> None:
        content[random.integers(len(content))] ^= 1 << int(random.integers(8))

    def replace(content: bytearray) -> None:
        at = int(random.integers(len(content)))
        size = int(random.integers(1, 16))
        content[at : at + size] = random.bytes(min(size, len(content) - at))

    def cut(content: bytearray) -> None:
        del content[random.integers(len(content)) :]

    def grow(content: bytearray) -> None:
        content += random.bytes(int(random.integers(1, 20)))

    def remove(content: bytearray) -> None:
        at = int(random.integers(len(content)))
        del content[at : at + int(random.integers(1, 12))]

    def repeat(content: bytearray) -> None:
        at = int(random.integers(len(content)))
        content[at:at] = content[at : at + int(random.integers(1, 12))]

    return [flip, replace, cut, grow, remove, repeat]


def refused_or_same(prefix: Path, original: IndexedDataset) -> bool:
    """Whether a damaged file is refused; if it is not, it must give the original's items."""
    try:
        damaged = open_indexed(prefix)
    except ValueError as error:
        assert str(prefix) in str(error)
        return True
    assert np.array_equal(damaged.lengths, original.lengths) and np.array_equal(damaged.offsets, original.offsets)
    assert damaged.dtype.itemsize == original.dtype.itemsize
    assert damaged.tokens.tobytes() == original.tokens.tobytes()
    # The one thing without redundancy: a document's start, between its neighbours.
    assert damaged.document_index[0] == 0 and damaged.document_index[-1] == damaged.num_items
    assert (np.diff(damaged.document_index) >= 0).all()
    return False


@pytest.mark.parametrize("name", ["tiny_uint16", "tiny_int32", "gpt_docs_uint16", "lazy_int32"])
def test_damaged_indices_are_refused_or_give_the_same(
    golden: Path, tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    original = open_indexed(golden / name)
    content = (golden / f"{name}.idx").read_bytes()
    prefix = tmp_path / name
    prefix.with_suffix(".bin").write_bytes((golden / f"{name}.bin").read_bytes())
    random = np.random.default_rng(len(content))
    num_cases = 10_000 if request.config.getoption("--slow") else 500
    ways = mutations(random)
    num_refused = 0
    for case in range(num_cases):
        damaged = bytearray(content)
        ways[case % len(ways)](damaged)
        prefix.with_suffix(".idx").write_bytes(damaged)
        num_refused += refused_or_same(prefix, original)
    assert num_refused > 0.8 * num_cases


def test_every_bit_that_has_redundancy_is_checked(golden: Path, tmp_path: Path) -> None:
    original = open_indexed(golden / "gpt_docs_uint16")
    content = (golden / "gpt_docs_uint16.idx").read_bytes()
    prefix = tmp_path / "corpus"
    prefix.with_suffix(".bin").write_bytes((golden / "gpt_docs_uint16.bin").read_bytes())
    starts = len(content) - 8 * (original.num_documents + 1)
    accepted = []
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        prefix.with_suffix(".idx").write_bytes(damaged)
        if not refused_or_same(prefix, original):
            accepted.append(bit // 8)
    assert all(starts + 8 <= byte < len(content) - 8 for byte in accepted), accepted


def test_a_large_index_is_written_in_parts(monkeypatch: pytest.MonkeyPatch, prefix: Path) -> None:
    monkeypatch.setattr("megalith.data.index_file.BLOCK", 2)
    parts = list(encode_index(np.dtype("<i4"), np.array(LENGTHS, np.int32), np.array(DOCUMENTS)))
    assert len(parts) == 1 + 4 + 4 + 3
    assert b"".join(parts) == prefix.with_suffix(".idx").read_bytes()
    assert open_indexed(prefix).lengths.tolist() == LENGTHS
    overwrite(prefix.with_suffix(".idx"), OFFSETS_AT + 40, struct.pack("<q", 4))
    with pytest.raises(ValueError, match="offset of item 5: expected 52"):
        open_indexed(prefix)
