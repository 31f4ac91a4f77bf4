"""Samples of sentences from the files on disk: parts, maps that are kept, and blends, which Megatron-LM cannot do."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from megalith.config import Run
from megalith.data.blend import blend_order
from megalith.data.causal import SampleRows
from megalith.data.indexed import IndexedWriter, open_indexed
from megalith.data.sentence_maps import (
    LONGEST_SENTENCE,
    DocumentUse,
    SentencePlan,
    build_sentence_map,
    document_use,
    list_samples,
    usable_documents,
)
from megalith.data.sentence_rows import SentenceRows
from megalith.data.survey import nothing
from megalith.monitor.events import Event, SentenceMapLoaded, Warned
from megalith.sentence_datasets import build_sentence_rows
from tests.sentences import write_sentences

LONGEST = 14
TARGETS = {"train": 50, "valid": 10, "test": 0}


class FirstTokens:
    """Rows that say which sample of which file they are: its first token and its number of sentences."""

    def __init__(self, sentences: SentenceRows) -> None:
        self.sentences = sentences

    def __len__(self) -> int:
        return len(self.sentences)

    def batch(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        read = [self.sentences.read(int(index))[0] for index in indices]
        return np.array([[sentences[0][0], len(sentences)] for sentences in read])


def build(run: Run, said: list[Event] | None = None, *, least: int = 1, vocab_size: int = 60) -> dict[str, SampleRows]:
    heard: list[Event] = [] if said is None else said
    return build_sentence_rows(
        run,
        longest=LONGEST,
        least=least,
        vocab_size=vocab_size,
        make_rows=FirstTokens,
        targets=TARGETS,
        report=heard.append,
        moved=nothing,
    )


def run_of(*data_path: str, split: str = "80,20,0") -> Run:
    run = Run()
    return replace(run, data=replace(run.data, data_path=data_path, split=split))


def test_parts_have_documents_of_their_own_and_the_maps_of_the_plan(tmp_path: Path) -> None:
    prefix = write_sentences(tmp_path)
    said: list[Event] = []
    parts = build(run_of(str(prefix)), said)
    assert parts.keys() == {"train", "valid"}
    indexed = open_indexed(prefix)
    plan = SentencePlan(LONGEST, 1, 0.1, 1234)
    for name, documents in (("train", range(0, 48)), ("valid", range(48, 60))):
        index = indexed.document_index[documents.start : documents.stop + 1]
        rows = build_sentence_map(index, indexed.lengths, num_samples=TARGETS[name], plan=plan)
        assert len(parts[name]) == len(rows) >= TARGETS[name]
        batch = parts[name].batch(np.arange(len(rows)))
        assert batch[:, 1].tolist() == (rows[:, 1] - rows[:, 0]).tolist()
        assert batch[:, 0].tolist() == [int(indexed.read(int(first))[0]) for first in rows[:, 0]]
    names = [Path(event.path).name for event in said if isinstance(event, SentenceMapLoaded)]
    assert names == [
        "text_sentence_train_indexmap_50mns_14msl_0.10ssp_1234s.npy",
        "text_sentence_valid_indexmap_10mns_14msl_0.10ssp_1234s.npy",
    ]


def test_documents_that_give_no_samples_are_counted_and_told(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "long_sentence", np.uint16) as writer:
        for number in range(10):
            writer.add_document([[1] * 20, [2] * (LONGEST_SENTENCE + (1 if number < 3 else 0))])
        writer.add_document([[1] * (LONGEST_SENTENCE + 1)])  # of a single sentence its length does not matter
        writer.add_document([[3]])
        writer.add_document([])
    indexed = open_indexed(tmp_path / "long_sentence")
    assert document_use(indexed.document_index, indexed.lengths, 2) == DocumentUse(used=7, short=3, spoilt=3)
    assert len(usable_documents(indexed.document_index, indexed.lengths, 2)) == 7
    said: list[Event] = []
    build(run_of(str(indexed.prefix), split="100,0,0"), said)
    (loaded,) = (event for event in said if isinstance(event, SentenceMapLoaded))
    assert (loaded.num_used, loaded.num_documents) == (9, 13)
    (told,) = (event.text for event in said if isinstance(event, Warned))
    assert "samples are made of 9 of 13 documents; 3 hold a sentence of more than 512 tokens, 1 have too few" in told


def test_documents_that_were_not_split_into_sentences_are_told(tmp_path: Path) -> None:
    for name, tokens in (("whole", LONGEST + 1), ("short", LONGEST)):
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            for _ in range(20):
                writer.add_document([range(tokens)])
    said: list[Event] = []
    build(run_of(str(tmp_path / "short")), said)
    assert not any(isinstance(event, Warned) for event in said)
    build(run_of(str(tmp_path / "whole"), split="100,0,0"), said)
    assert [event.text for event in said if isinstance(event, Warned)] == [
        f"{tmp_path}/whole, train part: 20 of 20 documents are one sentence of more than {LONGEST} tokens, whose rest "
        "is left out; prepare the text with --split-sentences"
    ]


def test_maps_are_kept_and_made_anew_for_other_data(tmp_path: Path) -> None:
    prefix = write_sentences(tmp_path)
    build(run_of(str(prefix)))
    kept = next(tmp_path.glob("*train_indexmap*.npy"))
    before = (kept.stat().st_mtime_ns, kept.read_bytes())
    build(run_of(str(prefix)))
    assert (kept.stat().st_mtime_ns, kept.read_bytes()) == before
    for path in tmp_path.glob("text_sentence.*"):
        path.unlink()
    write_sentences(tmp_path, documents=40, seed=4)
    build(run_of(str(prefix)))
    assert kept.read_bytes() != before[1]


def test_several_files_are_blended_by_their_weights(tmp_path: Path) -> None:
    files = [write_sentences(tmp_path, name=f"text{n}_sentence", documents=60, seed=n) for n in range(2)]
    parts = build(run_of("0.7", str(files[0]), "0.3", str(files[1])))
    alone = [build(run_of(str(file)))["train"] for file in files]
    train = parts["train"]
    order = blend_order([0.7, 0.3], len(train))
    assert len(train) >= TARGETS["train"]
    assert sum(order.datasets[:50] == 0) == 35
    first = train.batch(np.arange(50))
    for number, rows in enumerate(alone):
        known = {tuple(row) for row in rows.batch(np.arange(len(rows)))}
        assert {tuple(row) for row in first[order.datasets[:50] == number]} <= known


def test_what_cannot_be_made_is_said(tmp_path: Path) -> None:
    prefix = write_sentences(tmp_path)
    with pytest.raises(ValueError, match=r"--split = 0,50,50: leaves no document for training"):
        build(run_of(str(prefix), split="0,50,50"))
    run = run_of(str(prefix))
    with pytest.raises(ValueError, match=r"text_sentence, train part: none of the 48 documents has 9 sentences"):
        build(run, least=9)
    with pytest.raises(ValueError, match="not in the vocabulary of 10"):
        rows = build(run, vocab_size=10)["train"]
        rows.batch(np.arange(50))


@given(
    documents=st.lists(st.lists(st.one_of(st.integers(0, 30), st.just(600)), max_size=9), min_size=1, max_size=9),
    longest=st.integers(2, 60),
    least=st.integers(1, 3),
)
def test_samples_of_one_length_are_those_of_the_rule(documents: list[list[int]], longest: int, least: int) -> None:
    expected: list[list[int]] = []
    first = 0
    for sentences in documents:
        if len(sentences) >= least and not (len(sentences) > 1 and max(sentences) > LONGEST_SENTENCE):
            begin = first
            for place in range(len(sentences)):
                stop, remaining = first + place + 1, len(sentences) - place - 1
                is_full = sum(sentences[begin - first : place + 1]) >= longest and stop - begin >= least
                if remaining == 0 or (is_full and remaining >= 2):
                    expected.append([begin, stop, longest])
                    begin = stop
        first += len(sentences)
    index = np.cumsum([0, *map(len, documents)])
    lengths = np.array([length for sentences in documents for length in sentences], np.int32)
    if expected:
        rows = list_samples(index, lengths, num_samples=1, plan=SentencePlan(longest, least, 0.0, 1))
        assert rows.tolist() == expected
