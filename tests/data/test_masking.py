"""The spans that are masked, against Megatron-LM's rule applied word by word."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.data.masking import Pieces, SpanRule, choose_spans, pieces_of, random_of
from megalith.data.tokenizer import load_tokenizer
from tests.sentences import PIECES as CONTINUING
from tests.sentences import SPECIAL, WORDS, write_vocabulary

CLS = 2
PIECES = Pieces(12, np.arange(12) % 3 > 0, np.arange(12) == CLS)


def by_the_rule(tokens: list[int], rule: SpanRule, most: float, random: np.random.RandomState) -> list[list[int]]:
    """The spans, with numpy's own choice of a length."""
    words: list[list[int]] = []
    for place, token in enumerate(tokens):
        if token == CLS:
            continue
        if words and not PIECES.begins_word[token]:
            words[-1].append(place)
        else:
            words.append([place])
    wanted = min(most, max(1, round(len(tokens) * rule.share)))
    shares = 1 / np.arange(1, rule.longest + 1)
    shares /= shares.sum()
    order, spans, covered = np.arange(len(words)), list[list[int]](), set[int]()
    random.shuffle(order)
    for word in order:
        if len(covered) >= wanted:
            break
        if rule.geometric:
            length = min(random.geometric(0.2), rule.longest)
        else:
            length = random.choice(np.arange(1, rule.longest + 1), p=shares / shares.sum())
        longest_first = [
            [place for each in words[word : word + size] for place in each] for size in range(length, 0, -1)
        ]
        span = next((span for span in longest_first if len(covered) + len(span) <= wanted), None)
        if span is not None and not covered & set(span):
            spans.append(span)
            covered |= set(span)
    return spans


@given(
    tokens=st.lists(st.integers(0, 11), min_size=1, max_size=60),
    share=st.floats(0.05, 1),
    most=st.integers(1, 60),
    longest=st.integers(1, 6),
    geometric=st.booleans(),
    seed=st.integers(0, 100),
)
def test_spans_are_those_of_the_rule(
    tokens: list[int], share: float, most: int, longest: int, geometric: bool, seed: int
) -> None:
    rule = SpanRule(share, longest, geometric)
    found = choose_spans(np.array(tokens), PIECES, rule, most, random_of(seed, 0))
    assert [span.tolist() for span in found] == by_the_rule(tokens, rule, most, random_of(seed, 0))


def test_pieces_of_words_and_the_tokens_around_a_text_are_known(tmp_path: Path) -> None:
    pieces = pieces_of(load_tokenizer("BertWordPieceLowerCase", vocab_file=str(write_vocabulary(tmp_path))))
    words, continuing = [True] * len([*SPECIAL, *WORDS]), [False] * len(CONTINUING)
    assert pieces.begins_word.tolist() == [*words, *continuing, True, True]  # [BOS] and [EOS] are added
    assert np.flatnonzero(pieces.fixed).tolist() == [SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")]
    with pytest.raises(ValueError, match="does not say which tokens begin a word"):
        pieces_of(load_tokenizer("ByteLevelTokenizer"))
