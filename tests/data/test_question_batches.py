"""Questions and their passages as batches: what is chosen, in which order, and what is missing."""

import string
from pathlib import Path
from threading import Lock

import numpy as np
import pytest

from megalith.data.marked import Marks
from megalith.data.question_batches import Negatives, QuestionBatches
from megalith.data.questions import Evidence, TrainingQuestion
from megalith.data.tokenizer import Tokenizer, load_tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in [*SPECIAL, *string.ascii_lowercase]))
    return load_tokenizer("BertWordPieceLowerCase", vocab_file=str(tmp_path / "vocab.txt"))


def passages(letters: str) -> tuple[Evidence, ...]:
    return tuple(Evidence("t", letter) for letter in letters)


QUESTIONS = [
    TrainingQuestion("q a", Evidence("t", "p"), passages("hijk"), passages("mno")),
    TrainingQuestion("q b", Evidence("t", "p"), passages("h"), passages("m")),
    TrainingQuestion("q", Evidence("t", "p p p p p p p"), (), ()),
]


def texts(tokenizer: Tokenizer, read: dict[str, np.ndarray], row: int) -> list[str]:
    """What stands in each passage of a sample; empty for one that is missing."""
    found = []
    for tokens, real in zip(read["contexts"][row], read["contexts_real"][row], strict=True):
        assert (tokens[real == 0] == 0).all()
        words = tokenizer.decode(tokens[real == 1].tolist())
        found.append("".join(words.replace("[CLS] t [SEP] ", "").replace(" [SEP]", "").split()))
    return found


def batches(tokenizer: Tokenizer, negatives: Negatives, seed: int = 1) -> QuestionBatches:
    marks = Marks.of(tokenizer, 8)
    return QuestionBatches(
        QUESTIONS, tokenizer, marks, negatives=negatives, seed=seed, vocab_size=64, lock=Lock()
    )  # fmt: skip


def test_the_right_passage_comes_first_and_hard_ones_are_made_up_for_by_others(tokenizer: Tokenizer) -> None:
    read = batches(tokenizer, Negatives(2, 0, filled=True, shuffled=True)).read(np.arange(3), np.arange(3))
    assert read["contexts"].shape == (3, 3, 8)
    first, second, third = (texts(tokenizer, read, row) for row in range(3))
    assert first[0] == "p" and set(first[1:]) < set("hijk") and len(set(first)) == 3
    assert second == ["p", "h", "m"]
    assert third == ["pppp", "", ""]  # cut to [CLS] t [SEP] p p p p [SEP]
    assert read["queries"][0].tolist() == [2, 5 + 16, 5, 3, 0, 0, 0, 0]


def test_in_validation_the_first_of_both_kinds_are_taken(tokenizer: Tokenizer) -> None:
    read = batches(tokenizer, Negatives(3, 2, filled=False, shuffled=False)).read(np.arange(3), np.arange(3))
    assert [texts(tokenizer, read, row) for row in range(2)] == [["p", *"hij", *"mn"], ["p", "h", "m", "", "", ""]]


def test_what_is_chosen_follows_from_the_seed_and_the_samples_number(tokenizer: Tokenizer) -> None:
    source = batches(tokenizer, Negatives(2, 0, filled=True, shuffled=True))
    zeros = np.zeros(40, np.int64)
    read = source.read(zeros, np.arange(40))
    again = source.read(zeros[:5], np.arange(20, 25))
    assert (read["contexts"][20:25] == again["contexts"]).all()
    assert len({tuple(texts(tokenizer, read, row)) for row in range(40)}) > 5
    other = batches(tokenizer, Negatives(2, 0, filled=True, shuffled=True), seed=2).read(zeros, np.arange(40))
    assert (other["contexts"] != read["contexts"]).any()
