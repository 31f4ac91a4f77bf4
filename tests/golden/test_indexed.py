"""Token files are Megatron-LM's, byte for byte."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalith.data.indexed import IndexedDataset, IndexedWriter, open_indexed

WRITTEN = ["tiny_uint16", "tiny_int32", "gpt_docs_uint16"]


def recorded(golden: Path, name: str) -> dict[str, Any]:
    files: dict[str, dict[str, Any]] = json.loads((golden / "bin_idx.json").read_text())["files"]
    return files[name]


def documents_of(expected: dict[str, Any]) -> list[list[list[int]]]:
    """The items of each document."""
    items = iter(expected["items"])
    return [[next(items) for _ in document] for document in expected["sentence_lengths_per_document"]]


@pytest.mark.parametrize("name", WRITTEN)
def test_every_field_is_read(golden: Path, name: str) -> None:
    expected = recorded(golden, name)
    indexed = IndexedDataset(golden / name)
    assert indexed.lengths.tolist() == expected["sizes"]
    assert indexed.offsets.tolist() == expected["pointers"]
    assert indexed.document_index.tolist() == expected["doc_idx"]
    assert [indexed.read(item).tolist() for item in range(indexed.num_items)] == expected["items"]
    assert indexed.read(0, 1, 1).tolist() == expected["get_0_off1_len1"]


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_is_byte_identical(golden: Path, tmp_path: Path, name: str) -> None:
    expected = recorded(golden, name)
    with IndexedWriter(tmp_path / "written", IndexedDataset(golden / name).dtype) as writer:
        for document in documents_of(expected):
            writer.add_document(document)
    assert (tmp_path / "written.idx").read_bytes().hex() == expected["idx_hex"]
    assert hashlib.sha256((tmp_path / "written.bin").read_bytes()).hexdigest() == expected["bin_sha256"]
    assert (tmp_path / "written.bin").read_bytes() == (golden / f"{name}.bin").read_bytes()


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_many_documents_at_a_time_is_byte_identical(golden: Path, tmp_path: Path, name: str) -> None:
    expected = recorded(golden, name)
    lengths = expected["sentence_lengths_per_document"]
    tokens = np.concatenate([np.array(item) for item in expected["items"]])
    with IndexedWriter(tmp_path / "written", IndexedDataset(golden / name).dtype) as writer:
        writer.add_documents(np.concatenate([np.array(x, int) for x in lengths]), [len(x) for x in lengths], tokens)
    assert (tmp_path / "written.idx").read_bytes().hex() == expected["idx_hex"]
    assert (tmp_path / "written.bin").read_bytes() == (golden / f"{name}.bin").read_bytes()


@pytest.mark.parametrize("impl", ["lazy", "cached", "infer"])
def test_the_older_format_is_read(golden: Path, impl: str) -> None:
    expected = recorded(golden, "lazy_int32")
    indexed = open_indexed(golden / "lazy_int32", impl)
    assert indexed.lengths.tolist() == expected["sizes"]
    assert (indexed.offsets // 4).tolist() == expected["data_offsets"][:-1]
    assert indexed.document_index.tolist() == expected["doc_idx"]
    assert [indexed.read(item).tolist() for item in range(indexed.num_items)] == expected["items"]
    assert indexed.read(1, 1, 2).tolist() == expected["items"][1][1:3]
