"""Which tokens of a sample are masked: spans of whole words, as Megatron-LM draws them for BERT and T5, draw by draw.

Every sample has a stream of random numbers of its own, numpy's RandomState of (seed + index), so that it is the same
whoever reads it when. What is drawn from it in which order is part of what a sample is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.data.tokenizer import Tokenizer
from megalith.data.wordpiece import CONTINUED

WORDPIECE = ("BertWordPieceLowerCase", "BertWordPieceCase")
MASKED_SHARE, KEPT_SHARE = 0.8, 0.5  # of the chosen tokens: become [MASK]; of the others: stay as they are
BERT_LONGEST, T5_LONGEST = 3, 10  # words of a span
STOP_SHARE = 0.2  # of the geometric distribution of a span's length


@dataclass(frozen=True, eq=False)
class Pieces:
    """What masking needs to know of a WordPiece vocabulary."""

    vocab_size: int
    begins_word: NDArray[np.bool_]  # by id; false for a piece that goes on with a word
    fixed: NDArray[np.bool_]  # by id; [CLS] and [SEP], which are never masked and belong to no word


@dataclass(frozen=True)
class SpanRule:
    """How spans are drawn. share: of a sample's tokens that are masked; longest: words of a span.

    geometric: a span's length is drawn from a geometric distribution, as for T5 (SpanBERT, Joshi et al. 2020,
    arXiv:1907.10529); else from weights 1, 1/2, 1/3, ... as for BERT.
    """

    share: float
    longest: int = BERT_LONGEST
    geometric: bool = False


def pieces_of(tokenizer: Tokenizer) -> Pieces:
    """What masking needs of a tokenizer; ValueError unless it is BERT's WordPiece with the tokens that it takes."""
    if tokenizer.name not in WORDPIECE:
        raise ValueError(
            f"tokenizer_type={tokenizer.name} does not say which tokens begin a word, on which masking depends; use "
            f"{' or '.join(WORDPIECE)}"
        )
    size = tokenizer.vocab_size
    # A piece alone is decoded as it stands in the vocabulary.
    begins_word = np.array([not tokenizer.decode([number]).startswith(CONTINUED) for number in range(size)])
    fixed = np.zeros(size, bool)
    fixed[[tokenizer.cls, tokenizer.sep]] = True
    return Pieces(size, begins_word, fixed)


def random_of(seed: int, index: int) -> np.random.RandomState:
    """The random numbers of a sample; index is its place in the map."""
    return np.random.RandomState((seed + index) % 2**32)


def choose_spans(
    tokens: NDArray[Any], pieces: Pieces, rule: SpanRule, most: float, random: np.random.RandomState
) -> Iterator[NDArray[np.int64]]:
    """The places of the tokens of each span, in the order in which they are drawn; spans never overlap.

    tokens: with their special ones. most: tokens that may be masked beside what the rule's share gives (T5 and BERT:
    the share of the target length). Whoever draws from random between two spans does so between their draws.
    """
    if rule.share == 0:
        return
    wanted = min(most, max(1, round(len(tokens) * rule.share)))
    places = np.flatnonzero(~pieces.fixed[tokens])
    begins = pieces.begins_word[tokens[places]]
    begins[:1] = True
    firsts: list[int] = [*np.flatnonzero(begins).tolist(), len(places)]
    num_words = len(firsts) - 1
    order = np.arange(num_words)
    random.shuffle(order)
    thresholds = _thresholds(rule)
    covered = np.zeros(len(tokens), bool)
    found = 0
    for word in order.tolist():
        if found >= wanted:
            break
        if rule.geometric:
            length = min(int(random.geometric(STOP_SHARE)), rule.longest)
        else:
            length = int(thresholds.searchsorted(random.random_sample(), side="right")) + 1
        first = firsts[word]
        while True:
            count = firsts[min(word + length, num_words)] - first
            if found + count <= wanted or length == 1:
                break
            length -= 1
        span = places[first : first + count]
        if found + count > wanted or covered[span].any():
            continue
        covered[span] = True
        found += count
        yield span


def _thresholds(rule: SpanRule) -> NDArray[np.float64]:
    """The sums up to which a number between 0 and 1 means a span of 1, 2, ... words, with the rounding of numpy's
    choice."""
    weights = 1.0 / np.arange(1, rule.longest + 1)
    shares = weights / weights.sum()
    sums: NDArray[np.float64] = np.cumsum(shares / shares.sum())
    sums /= sums[-1]
    return sums


def mask_tokens(
    tokens: NDArray[np.int64], pieces: Pieces, rule: SpanRule, most: float, mask: int, random: np.random.RandomState
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """BERT's masking (Devlin et al. 2019): the tokens with some replaced, and for these the original, elsewhere -1.

    Of the chosen ones 80 % become [MASK], 10 % stay, 10 % become any token of the vocabulary.
    """
    masked, labels = tokens.copy(), np.full(len(tokens), -1, np.int64)
    for span in choose_spans(tokens, pieces, rule, most, random):
        for place in span.tolist():
            if random.random_sample() < MASKED_SHARE:
                masked[place] = mask
            elif random.random_sample() >= KEPT_SHARE:
                masked[place] = random.randint(0, pieces.vocab_size)
        labels[span] = tokens[span]
    return masked, labels
