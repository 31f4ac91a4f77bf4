"""The record beside a token file: what differs from it is named, and a changed record is refused at every byte."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalith.data.index_file import HEADER
from megalith.data.indexed import IndexedWriter
from megalith.data.inspect import inspect
from megalith.data.prepare import PrepareConfig, prepare
from megalith.data.record import check_tokenizer, identify, read_record, record_path, same_file
from megalith.data.tokenizer import load_tokenizer
from megalith.files import digest_of_bytes

LINES = "".join(json.dumps({"text": f"document {number} " + "x" * number}) + "\n" for number in range(20))


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A token file as preprocessing leaves it."""
    (tmp_path / "in.jsonl").write_text(LINES)
    config = PrepareConfig(
        input=(str(tmp_path / "in.jsonl"),),
        output_prefix=str(tmp_path / "out"),
        tokenizer_type="ByteLevelTokenizer",
        append_eod=True,
        workers=1,
    )
    return prepare(config, quiet=True).sets[0].prefix


def test_the_record_holds_what_the_files_are(prefix: Path) -> None:
    record = read_record(prefix)
    assert record is not None and (record.largest_token, record.vocab_size) == (256, 257)
    identity = identify(prefix, record, vocab_size=257)
    assert (identity["name"], identity["bin_size"]) == ("out_text_document", Path(f"{prefix}.bin").stat().st_size)
    found = inspect(prefix)
    assert not found.faults and found.has_record
    assert (found.documents, found.largest_token, found.sha256) == (20, 256, identity["bin_sha256"])


def test_a_flipped_bit_anywhere_in_a_record_is_refused_or_makes_it_no_record(prefix: Path) -> None:
    path = record_path(prefix)
    whole = path.read_bytes()
    ignored = 0
    for byte in [*range(40), *range(40, len(whole), 7), *range(len(whole) - 70, len(whole))]:
        for bit in (0, 5):
            path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1 << bit]) + whole[byte + 1 :])
            try:
                ignored += read_record(prefix) is None
            except ValueError as error:
                assert str(error).startswith(f"{path}: content: expected what was written"), error
            else:
                assert byte < len('{\n "megalith": '), f"bit {bit} of byte {byte} was not noticed"
    assert ignored == 2 * len('{\n "megalith": ')


@pytest.mark.parametrize("change", [{"files": []}, {"files": None}, {"largest_token": float("inf")}])
def test_a_record_with_a_fitting_digest_and_another_content_is_refused(prefix: Path, change: dict[str, Any]) -> None:
    content = {**json.loads(record_path(prefix).read_text()), **change}
    digest = digest_of_bytes(json.dumps({name: content[name] for name in content if name != "sha256"}, indent=1) + "\n")
    record_path(prefix).write_text(json.dumps({**content, "sha256": digest}, indent=1) + "\n")
    with pytest.raises(ValueError, match="content: expected what was written"):
        read_record(prefix)


@pytest.mark.parametrize("text", ["{}", "", "[1]", '{"text": "a corpus of the same name"}\n', "\0" * 100])
def test_another_programs_json_is_no_record(prefix: Path, text: str) -> None:
    record_path(prefix).write_text(text)
    assert read_record(prefix) is None
    assert not inspect(prefix).faults


def write(prefix: Path, lengths: list[int], token: int = 7) -> None:
    with IndexedWriter(prefix, "uint16", overwrite=True) as writer:
        for length in lengths:
            writer.add_document([np.full(length, token)])


def swap_bin(prefix: Path) -> None:
    size = Path(f"{prefix}.bin").stat().st_size
    Path(f"{prefix}.bin").write_bytes(b"\1\0" * (size // 2))


def flip_bin(prefix: Path) -> None:
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    content[len(content) // 2] ^= 1
    Path(f"{prefix}.bin").write_bytes(content)


def move_document_start(prefix: Path) -> None:
    """The one number of an index that has no redundancy of its own."""
    content = bytearray(Path(f"{prefix}.idx").read_bytes())
    place = HEADER.size + 12 * 20 + 8 * 3
    content[place] = 4
    Path(f"{prefix}.idx").write_bytes(content)


def truncate_bin(prefix: Path) -> None:
    Path(f"{prefix}.bin").write_bytes(Path(f"{prefix}.bin").read_bytes()[:-2])


def truncate_index(prefix: Path) -> None:
    Path(f"{prefix}.idx").write_bytes(Path(f"{prefix}.idx").read_bytes()[:-8])


# What is done to the files, which of the two is named, and whether a start sees it or only a reading of all bytes.
DAMAGES: dict[str, tuple[Callable[[Path], None], str, bool]] = {
    "another .bin of the same size": (swap_bin, ".bin: SHA-256: expected", False),
    "a flipped bit of the .bin": (flip_bin, ".bin: SHA-256: expected", False),
    "another corpus": (lambda prefix: write(prefix, [3, 4]), ".bin: size: expected", True),
    "a moved start of a document": (move_document_start, ".idx: SHA-256: expected", True),
    "a shorter .bin": (truncate_bin, ".bin: size: expected", True),
    "a shorter .idx": (truncate_index, ".idx: size: expected", True),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_are_not_as_recorded_are_named_with_what_was_expected_and_found(prefix: Path, damage: str) -> None:
    change, message, at_start = DAMAGES[damage]
    record = read_record(prefix)
    change(prefix)
    assert any(message in fault and ", found " in fault for fault in inspect(prefix).faults)
    if at_start:
        with pytest.raises(ValueError, match=message.replace(".", r"\.")):
            identify(prefix, record)
    else:
        identify(prefix, record)


def test_the_recorded_largest_token_is_held_against_the_vocabulary(prefix: Path) -> None:
    with pytest.raises(
        ValueError, match=r"largest token: expected one of the vocabulary, 0 to 255, found 256, by .*json"
    ):
        identify(prefix, read_record(prefix), vocab_size=256)


def test_tokens_of_another_tokenizer_are_refused(prefix: Path, golden: Path) -> None:
    record = read_record(prefix)
    assert record is not None
    check_tokenizer(prefix, record, load_tokenizer("ByteLevelTokenizer").digests)
    vocab, merges = str(golden / "small-vocab.json"), str(golden / "small-merges.txt")
    other = load_tokenizer("GPT2BPETokenizer", vocab_file=vocab, merge_file=merges)
    with pytest.raises(ValueError, match=r"\.bin: tokenizer: expected the run's .*found a ByteLevelTokenizer of 257"):
        check_tokenizer(prefix, record, other.digests)


def test_token_files_are_the_same_by_content_and_not_by_name() -> None:
    one = {"name": "a", "idx_sha256": "1", "bin_size": 2, "bin_sha256": "3"}
    assert same_file(one, {**one, "name": "b"})
    assert same_file(one, {**one, "bin_sha256": None})
    assert not any(same_file(one, {**one, name: 9}) for name in ("idx_sha256", "bin_size", "bin_sha256"))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64", "uint16"])
def test_the_first_bad_token_is_named_by_document_and_position(tmp_path: Path, dtype: str) -> None:
    with IndexedWriter(tmp_path / "corpus", dtype) as writer:
        writer.add_document([[1, 2, 3]])
        writer.add_document([])
        writer.add_document([[4], [], [5, 100, 101]])
        writer.add_document([[-1 if dtype.startswith("int") else 120]])
    found = inspect(tmp_path / "corpus", vocab_size=100)
    place = r"token 100 at position 1 of document 2 (in its item 2) is not in the vocabulary (0 to 99); 2 more"
    assert len(found.faults) == 1 and place in found.faults[0]
    assert (found.documents, found.items, found.empty_documents) == (4, 5, 1)
    found = inspect(tmp_path / "corpus")
    assert len(found.faults) == dtype.startswith("int")  # a negative id is wrong in every vocabulary


def test_tokens_over_many_blocks_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalith.data.inspect.BLOCK", 64)
    write(tmp_path / "corpus", [50, 0, 30])
    content = bytearray((tmp_path / "corpus.bin").read_bytes())
    content[2 * 61 : 2 * 62] = b"\xff\xff"
    (tmp_path / "corpus.bin").write_bytes(content)
    found = inspect(tmp_path / "corpus", vocab_size=1000)
    assert "token 65535 at position 11 of document 2 is not" in found.faults[0]
    assert found.largest_token == 65535


def test_merged_files_know_their_largest_token(tmp_path: Path) -> None:
    write(tmp_path / "one", [3], token=900)
    with IndexedWriter(tmp_path / "two", "uint16") as writer:
        assert writer.largest_token is None
        writer.add_document([[5]])
        writer.merge(tmp_path / "one")
        assert writer.largest_token == 900
