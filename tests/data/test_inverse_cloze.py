"""Block maps against the rule applied sentence by sentence, and what becomes of a block."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megalith.data.block_maps import build_block_map, list_blocks
from megalith.data.indexed import IndexedWriter, open_indexed
from megalith.data.inverse_cloze import ClozeBatches, title_bounds, title_lengths
from megalith.data.marked import Marks

CLS, SEP, PAD = 101, 102, 0
LONG = 600


def by_the_rule(documents: list[list[int]], titles: list[int], longest: int, least: int) -> list[list[int]]:
    """The blocks, one sentence after the other."""
    rows: list[list[int]] = []
    first = 0
    for number, (sentences, title) in enumerate(zip(documents, titles, strict=True)):
        if len(sentences) >= least and not (len(sentences) > 1 and max(sentences) > 512):
            begin, tokens, count = first, 0, 0
            for place, length in enumerate(sentences):
                tokens, count, remaining = tokens + length, count + 1, len(sentences) - place - 1
                if remaining == 0 or (tokens >= longest - title and count >= least and remaining >= least):
                    rows.append([begin, first + place + 1, number, len(rows)])
                    begin, tokens, count = first + place + 1, 0, 0
        first += len(sentences)
    return rows


@given(
    documents=st.lists(
        st.tuples(st.lists(st.one_of(st.integers(1, 30), st.just(LONG), st.just(0)), max_size=8), st.integers(0, 40)),
        min_size=1,
        max_size=12,
    ),
    longest=st.integers(1, 60),
    least=st.integers(1, 2),
)
@settings(deadline=None)
def test_blocks_are_those_of_the_rule(documents: list[tuple[list[int], int]], longest: int, least: int) -> None:
    sentences, titles = [pair[0] for pair in documents], [pair[1] for pair in documents]
    index = np.cumsum([0, *map(len, sentences)])
    lengths = np.array([length for document in sentences for length in document], np.int32)
    expected = by_the_rule(sentences, titles, longest, least)
    if not expected:
        with pytest.raises(ValueError, match="no block can be made"):
            list_blocks(index, lengths, np.array(titles, np.int32), longest=longest, least=least)
        return
    made = list_blocks(index, lengths, np.array(titles, np.int32), longest=longest, least=least)
    assert made.tolist() == expected


def test_a_map_of_a_later_part_names_the_files_documents() -> None:
    index = np.array([7, 9, 12])
    rows = build_block_map(
        index, np.full(12, 5, np.int32), np.zeros(2, np.int32), num_samples=5, longest=8, least=2, seed=3,
        first_document=4,
    )  # fmt: skip
    assert len(rows) == 6
    assert sorted(map(tuple, rows.tolist())) == [(7, 9, 4, 0)] * 3 + [(9, 12, 5, 1)] * 3


def write_files(folder: Path) -> tuple[Path, Path]:
    """Two documents of three sentences and of one, whose tokens tell where they stand, and their titles."""
    with IndexedWriter(folder / "text_sentence", np.uint16) as writer:
        writer.add_document([[11, 12], [21, 22, 23], [31]])
        writer.add_document([[41, 42, 43]])
    with IndexedWriter(folder / "title_document", np.uint16) as writer:
        writer.add_document([[91]])
        writer.add_document([[92, 93]])
    return folder / "text_sentence", folder / "title_document"


def fresh(folder: Path) -> Path:
    """Another folder below."""
    (folder / "again").mkdir()
    return folder / "again"


def batches(folder: Path, *, kept_share: float, length: int = 12, copies: int = 200, **changed: int) -> ClozeBatches:
    sentences, titles = write_files(folder)
    rows = np.tile(np.array([[0, 3, 0, 0], [3, 4, 1, 1]], np.uint32), (copies, 1))
    marks = Marks(length, CLS, SEP, PAD)
    return open_batches(sentences, titles, rows, marks, kept_share=kept_share, **changed)


def open_batches(
    sentences: Path,
    titles: Path,
    rows: NDArray[np.uint32],
    marks: Marks,
    *,
    kept_share: float = 0.1,
    seed: int = 1,
    vocab_size: int = 200,
) -> ClozeBatches:
    opened = open_indexed(sentences), open_indexed(titles)
    return ClozeBatches(*opened, rows, marks=marks, kept_share=kept_share, seed=seed, vocab_size=vocab_size)


def test_a_sentence_is_taken_out_of_its_block(tmp_path: Path) -> None:
    source = batches(tmp_path, kept_share=0.0)
    found = {(tuple(sample.query), tuple(sample.block)) for sample in map(source.sample, range(0, 400, 2))}
    front = (CLS, 91, SEP)
    assert found == {
        ((CLS, 11, 12, SEP), (*front, 21, 22, 23, 31, SEP)),
        ((CLS, 21, 22, 23, SEP), (*front, 11, 12, 31, SEP)),
        ((CLS, 31, SEP), (*front, 11, 12, 21, 22, 23, SEP)),
    }
    alone = source.sample(1)
    assert alone.query.tolist() == [CLS, 41, 42, 43, SEP]
    assert alone.block.tolist() == [CLS, 92, 93, SEP, SEP]


def test_a_share_of_the_sentences_stays(tmp_path: Path) -> None:
    source = batches(tmp_path, kept_share=0.3)
    kept = [len(source.sample(index).block) == 10 for index in range(0, 400, 2)]
    assert 0.2 < np.mean(kept) < 0.4


def test_what_is_too_long_is_cut_and_ends_with_a_mark(tmp_path: Path) -> None:
    sample = batches(tmp_path, kept_share=1.0, length=5).sample(0)
    assert sample.block.tolist() == [CLS, 91, SEP, 11, SEP]
    assert len(sample.query) <= 5 and sample.query[-1] == SEP
    # A title that leaves no room.
    assert batches(fresh(tmp_path), kept_share=1.0, length=3).sample(1).block.tolist() == [CLS, 92, SEP]


def test_a_sample_follows_from_its_number_alone(tmp_path: Path) -> None:
    source = batches(tmp_path, kept_share=0.5)
    numbers = np.array([7, 2, 9, 2])
    read = source.read(numbers, numbers + 1000)
    for row, number in enumerate(numbers):
        sample = source.sample(int(number))
        for name, tokens in (("queries", sample.query), ("contexts", sample.block)):
            whole, real = read[name].reshape(4, 12)[row], read[f"{name}_real"].reshape(4, 12)[row]
            assert whole[: len(tokens)].tolist() == tokens.tolist() and not whole[len(tokens) :].any()
            assert real.tolist() == [1] * len(tokens) + [0] * (12 - len(tokens))
    assert read["samples"].tolist() == [1007, 1002, 1009, 1002] and read["loss_mask"].tolist() == [1.0] * 4
    others = batches(fresh(tmp_path), kept_share=0.5, seed=2).read(np.arange(50), np.arange(50))
    assert (others["queries"] != source.read(np.arange(50), np.arange(50))["queries"]).any()


def test_a_title_of_several_sentences_is_one(tmp_path: Path) -> None:
    sentences, _ = write_files(tmp_path)
    with IndexedWriter(tmp_path / "split_sentence", np.uint16) as writer:
        writer.add_document([[91, 94], [95]])
        writer.add_document([[92, 93]])
    titles = open_indexed(tmp_path / "split_sentence")
    assert title_lengths(titles, title_bounds(open_indexed(sentences), titles)).tolist() == [3, 2]
    rows = np.array([[0, 3, 0, 0], [3, 4, 1, 1]], np.uint32)
    source = open_batches(sentences, titles.prefix, rows, Marks(20, CLS, SEP, PAD))
    assert source.sample(0).block.tolist()[:5] == [CLS, 91, 94, 95, SEP]
    assert source.sample(1).block.tolist()[:4] == [CLS, 92, 93, SEP]


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="token 91 at position 0 of sentence 0 is not in the vocabulary of 80"):
        batches(tmp_path, kept_share=0.5, vocab_size=80).sample(0)
    sentences, titles, marks = tmp_path / "text_sentence", tmp_path / "title_document", Marks(12, CLS, SEP, PAD)
    with IndexedWriter(tmp_path / "three", np.uint16) as writer:
        for number in range(3):
            writer.add_document([[91 + number]])
    with pytest.raises(ValueError, match=r"has 3 titles, and .* has 2 documents"):
        open_batches(sentences, tmp_path / "three", np.zeros((1, 4), np.uint32), marks)
    for row in ([0, 9, 0, 0], [0, 3, 2, 0], [3, 3, 0, 0]):
        source = open_batches(sentences, titles, np.array([row], np.uint32), marks)
        with pytest.raises(ValueError, match="the block map does not fit"):
            source.sample(0)
    with pytest.raises(ValueError, match=r"sample 5 of .*: it has 1"):
        source.sample(5)
