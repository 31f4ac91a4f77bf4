"""Samples of a language model against plain concatenation, and what goes with them against Megatron-LM's masks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from megalith.data.causal import CausalBatches, CausalDataset, causal_batch
from megalith.data.index_file import encode_index
from megalith.data.index_maps import IndexMaps, build_index_maps
from megalith.data.indexed import IndexedDataset, IndexedWriter

EOD = 11


def maps_of(lengths: list[int], num_samples: int, sequence_length: int) -> IndexMaps:
    return build_index_maps(
        np.arange(len(lengths), dtype=np.int32),
        np.array(lengths, np.int32),
        num_samples=num_samples,
        sequence_length=sequence_length,
        seed=5,
    )


def corpus(prefix: Path, lengths: list[int], tokens: NDArray[Any], dtype: str) -> IndexedDataset:
    with IndexedWriter(prefix, dtype) as writer:
        writer.add_documents(lengths, [1] * len(lengths), tokens)
    return IndexedDataset(prefix)


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=10).filter(any),
    num_samples=st.integers(1, 40),
    sequence_length=st.integers(1, 30),
    dtype=st.sampled_from(["uint16", "int32", "uint8"]),
)
def test_samples_are_stretches_of_the_stream_of_documents(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], num_samples: int, sequence_length: int, dtype: str
) -> None:
    tokens = np.arange(sum(lengths)) % 251
    indexed = corpus(tmp_path_factory.mktemp("any") / "corpus", lengths, tokens, dtype)
    maps = maps_of(lengths, num_samples, sequence_length)
    dataset = CausalDataset(indexed, maps, vocab_size=251)
    stream = np.concatenate([indexed.read(document) for document in maps.doc_idx])
    order = np.random.default_rng(0).permutation(len(dataset))
    rows = dataset.batch(order)
    assert rows.dtype == dtype and rows.shape == (len(dataset), sequence_length + 1)
    for index, row in zip(order, rows, strict=True):
        start = int(maps.shuffle_idx[index]) * sequence_length
        assert row.tolist() == stream[start : start + sequence_length + 1].tolist()
        sample = dataset.sample(int(index))
        assert sample.dtype == np.int64 and np.array_equal(sample, row)


def test_no_samples_are_an_empty_batch(tmp_path: Path) -> None:
    indexed = corpus(tmp_path / "corpus", [30], np.arange(30), "uint16")
    dataset = CausalDataset(indexed, maps_of([30], 3, 8), vocab_size=30)
    assert dataset.batch(np.empty(0, np.int64)).shape == (0, 9)


@pytest.mark.parametrize("indices", [[-1], [3], [0, 5]])
def test_samples_that_do_not_exist_are_refused(tmp_path: Path, indices: list[int]) -> None:
    indexed = corpus(tmp_path / "corpus", [30], np.arange(30), "uint16")
    dataset = CausalDataset(indexed, maps_of([30], 3, 8), vocab_size=30)
    with pytest.raises(ValueError, match="corpus: it has 3"):
        dataset.batch(np.array(indices))


@pytest.mark.parametrize("position", [0, 5])
@pytest.mark.parametrize(("token", "dtype"), [(100, "uint16"), (65535, "uint16"), (-1, "int32"), (2**31 - 1, "int32")])
def test_a_token_that_is_not_in_the_vocabulary_is_named_by_document_and_position(
    tmp_path: Path, token: int, dtype: str, position: int
) -> None:
    lengths = [7, 0, 12, 9]
    tokens = np.arange(28)
    tokens[7 + position] = token
    indexed = corpus(tmp_path / "corpus", lengths, tokens, dtype)
    maps = maps_of(lengths, 6, 4)
    dataset = CausalDataset(indexed, maps, vocab_size=100)
    message = rf"corpus\.bin: token {token} at position {position} of document 2 is not in the vocabulary \(0 to 99\)"
    num_refused = 0
    for index in range(len(dataset)):
        try:
            dataset.sample(index)
        except ValueError as error:
            num_refused += 1
            with pytest.raises(ValueError, match=message):
                raise error
    assert num_refused >= 1
    with pytest.raises(ValueError, match=message):
        dataset.batch(np.arange(len(dataset)))
    assert CausalDataset(indexed, maps, vocab_size=None).batch(np.arange(len(dataset))).max() == max(token, 24)


def test_documents_of_billions_of_tokens_are_read_to_their_ends(tmp_path: Path) -> None:
    """Three documents of 2^31 - 1 tokens, of which only the last ones take room on the disk."""
    length = 2**31 - 1
    with open(tmp_path / "corpus.bin", "wb") as file:
        file.seek(2 * (3 * length - 4))
        file.write(np.array([5, 6, 7, 8], np.uint16).tobytes())
    lengths = np.full(3, length, np.int32)
    (tmp_path / "corpus.idx").write_bytes(b"".join(encode_index(np.dtype("<u2"), lengths, np.arange(4))))
    indexed = IndexedDataset(tmp_path / "corpus")
    assert indexed.read(2, length - 4).tolist() == [5, 6, 7, 8]
    documents = np.arange(3, dtype=np.int32)
    maps = build_index_maps(documents, lengths, num_samples=6_000_000, sequence_length=1000, seed=1)
    dataset = CausalDataset(indexed, maps, vocab_size=9)
    # Whatever the documents' order, the last one's end lies in the sample that holds the token there.
    place = int((maps.doc_idx == 2).argmax())
    holder = ((place + 1) * length - 2) // 1000
    index = int((maps.shuffle_idx == holder).argmax())
    assert {5, 6, 7, 8} & set(dataset.sample(index).tolist())


def test_maps_of_other_data_are_refused(tmp_path: Path) -> None:
    indexed = corpus(tmp_path / "corpus", [10, 20], np.arange(30), "uint16")
    dataset = CausalDataset(indexed, maps_of([10, 12], 6, 8), vocab_size=30)
    with pytest.raises(ValueError, match="the index maps do not fit"):
        dataset.batch(np.arange(len(dataset)))


def test_samples_of_wrong_lengths_are_refused_even_if_they_add_up(tmp_path: Path) -> None:
    indexed = corpus(tmp_path / "corpus", [30], np.arange(30), "uint16")
    maps = maps_of([30], 3, 8)
    moved = maps.sample_idx.copy()
    moved[1, 1] += 1
    dataset = CausalDataset(indexed, replace(maps, sample_idx=moved), vocab_size=30)
    with pytest.raises(ValueError, match="the index maps do not fit"):
        dataset.batch(np.arange(len(dataset)))


def test_only_integers_are_tokens(tmp_path: Path) -> None:
    indexed = corpus(tmp_path / "corpus", [30], np.arange(30), "float64")
    with pytest.raises(ValueError, match="tokens are float64"):
        CausalDataset(indexed, maps_of([30], 3, 8), vocab_size=30)


def batch_of(tokens_BS1: NDArray[Any], *, reset: bool) -> dict[str, NDArray[Any]]:
    return causal_batch(
        tokens_BS1,
        np.arange(len(tokens_BS1)),
        eod=EOD,
        reset_position_ids=reset,
        reset_attention_mask=reset,
        eod_mask_loss=reset,
    )


@pytest.mark.parametrize(("variant", "reset"), [("default", False), ("reset_all_eod", True)])
def test_positions_and_masks_are_megatrons(golden: Path, variant: str, reset: bool) -> None:
    expected = json.loads((golden / "model_gpt.json").read_text())[variant]
    assert expected["eod"] == EOD
    batch = batch_of(np.array(expected["tokens"]), reset=reset)
    assert batch["loss_mask"].tolist() == expected["loss_mask"]
    assert batch["positions"].tolist() == expected["position_ids"]
    assert ("documents" in batch) == reset
    documents = batch.get("documents", np.zeros_like(batch["tokens"]))
    seen = np.tril(documents[:, :, None] == documents[:, None, :])
    if reset:
        blocked = np.array(expected["attention_mask_True_means_blocked"], bool)[:, 0]
        assert np.array_equal(~seen, blocked)


@given(tokens=st.lists(st.lists(st.sampled_from([EOD, 1, 2]), min_size=9, max_size=9), min_size=1, max_size=3))
def test_positions_and_documents_begin_anew_after_each_end(tokens: list[list[int]]) -> None:
    batch = batch_of(np.array(tokens), reset=True)
    for row, positions, documents, loss_mask in zip(
        tokens, batch["positions"], batch["documents"], batch["loss_mask"], strict=True
    ):
        document = position = 0
        for place, token in enumerate(row[:-1]):
            assert (positions[place], documents[place]) == (position, document)
            assert loss_mask[place] == (token != EOD)
            position += 1
            if token == EOD:
                document, position = document + 1, 0


def test_a_batch_has_the_types_that_models_expect() -> None:
    batch = batch_of(np.arange(12, dtype=np.uint16).reshape(2, 6), reset=True)
    assert {name: str(array.dtype) for name, array in batch.items()} == {
        "tokens": "int64",
        "labels": "int64",
        "loss_mask": "float32",
        "positions": "int64",
        "documents": "int32",
        "samples": "int64",
    }
    assert batch["tokens"].tolist() == [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]]
    assert batch["labels"].tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 10, 11]]
    assert all(array.flags.c_contiguous for array in batch.values())


@pytest.mark.parametrize("setting", ["reset_position_ids", "reset_attention_mask", "eod_mask_loss"])
def test_what_needs_an_end_of_document_says_so(setting: str) -> None:
    settings = dict.fromkeys(["reset_position_ids", "reset_attention_mask", "eod_mask_loss"], False)
    with pytest.raises(ValueError, match="need a tokenizer with an end-of-document token"):
        causal_batch(np.zeros((1, 3), np.uint16), [0], eod=None, **{**settings, setting: True})


def test_batches_are_read_by_index_and_carry_the_runs_positions(tmp_path: Path) -> None:
    indexed = corpus(tmp_path / "corpus", [30], np.arange(30), "uint16")
    rows = CausalDataset(indexed, maps_of([30], 3, 8), vocab_size=30)
    batches = CausalBatches(rows, eod=EOD, reset_position_ids=False, reset_attention_mask=True, eod_mask_loss=False)
    assert len(batches) == 3
    batch = batches.read(np.array([2, 0]), np.array([70, 71]))
    assert batch["samples"].tolist() == [70, 71]
    assert np.array_equal(batch["tokens"][0], rows.sample(2)[:-1])
    assert np.array_equal(batch["labels"][1], rows.sample(0)[1:])
