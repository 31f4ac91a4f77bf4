"""BERT's samples: two runs of sentences of a document, in their order or swapped, with some tokens masked.

They are Megatron-LM's, token by token (Devlin et al. 2019, with the sentence order task of Lan et al. 2020,
arXiv:1909.11942, in place of the next sentence task).

Shape letters: B batch, T sequence length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.data.causal import SampleRows
from megalith.data.masking import Pieces, SpanRule, mask_tokens, random_of
from megalith.data.mock import mix_words
from megalith.data.sentence_rows import SentenceRows, filled

SPECIAL_TOKENS = 3  # [CLS] and two [SEP]
SWAP_SHARE = 0.5  # of the samples whose two parts are swapped


@dataclass(frozen=True, eq=False)
class PairRule:
    """What all samples have in common. binary_head: whether a sample has two parts."""

    length: int  # tokens of a sample, with special ones and padding
    pieces: Pieces
    cls: int
    sep: int
    mask: int
    pad: int
    masking: SpanRule
    binary_head: bool


@dataclass(frozen=True)
class PairSample:
    """One sample, T entries each."""

    tokens: NDArray[np.int64]
    types: NDArray[np.int64]  # 0 for the first part, 1 for the second; padding has the id of [PAD], as in Megatron-LM
    labels: NDArray[np.int64]  # the token that was there, where one is masked, else -1
    swapped: bool  # the second part stood first in the document
    num_tokens: int  # without padding


def make_pair(
    sentences: Sequence[NDArray[Any]], target: int, rule: PairRule, random: np.random.RandomState
) -> PairSample:
    """The sample of some sentences of a document; target: tokens without special ones to which it is cut."""
    first, second, swapped = (
        _halves(sentences, random) if rule.binary_head else (np.concatenate(sentences), None, False)
    )
    first, second = _cut(first, np.empty(0, first.dtype) if second is None else second, target, random)
    parts: list[Any] = [[rule.cls], first, [rule.sep]]
    if len(second):
        parts += [second, [rule.sep]]
    tokens = np.concatenate(parts).astype(np.int64)
    masked, labels = mask_tokens(tokens, rule.pieces, rule.masking, rule.masking.share * target, rule.mask, random)
    count = len(tokens)
    types = np.zeros(count, np.int64)
    types[len(first) + 2 :] = 1
    return PairSample(
        filled(masked, rule.length, rule.pad),
        filled(types, rule.length, rule.pad),
        filled(labels, rule.length, -1),
        swapped,
        count,
    )


def _halves(
    sentences: Sequence[NDArray[Any]], random: np.random.RandomState
) -> tuple[NDArray[Any], NDArray[Any], bool]:
    count = len(sentences)
    cut = random.randint(1, count) if count >= 3 else 1
    first, second = np.concatenate(sentences[:cut]), np.concatenate(sentences[cut:])
    if random.random_sample() < SWAP_SHARE:
        return second, first, True
    return first, second, False


def _cut(
    first: NDArray[Any], second: NDArray[Any], target: int, random: np.random.RandomState
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both parts, together at most target tokens long: one token after the other is taken from the longer part (the
    second if they are equal), from its front or its end."""
    sizes = [len(first), len(second)]
    fronts = [0, 0]
    for at_front in random.random_sample(max(0, sum(sizes) - target)) < 0.5:
        longer = 0 if sizes[0] > sizes[1] else 1
        sizes[longer] -= 1
        fronts[longer] += int(at_front)
    return first[fronts[0] : fronts[0] + sizes[0]], second[fronts[1] : fronts[1] + sizes[1]]


class PairRows:
    """The samples of a map as rows of numbers, as a blend mixes them: tokens, types and labels (T each), whether the
    parts are swapped, and how many tokens are no padding."""

    def __init__(self, sentences: SentenceRows, rule: PairRule) -> None:
        self.sentences = sentences
        self.rule = rule

    def __len__(self) -> int:
        return len(self.sentences)

    def sample(self, index: int) -> PairSample:
        """The sample at this place of the map."""
        sentences, target = self.sentences.read(index)
        return make_pair(sentences, target, self.rule, random_of(self.sentences.seed, index))

    def batch(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """[B, 3 T + 2]"""
        length = self.rule.length
        rows = np.empty((len(indices), 3 * length + 2), np.int64)
        self.sentences.indexed.check_sizes()
        for row, index in zip(rows, indices, strict=True):
            sample = self.sample(int(index))
            row[:length], row[length : 2 * length] = sample.tokens, sample.types
            row[2 * length : 3 * length] = sample.labels
            row[-2], row[-1] = sample.swapped, sample.num_tokens
        return rows


class MockPairRows:
    """Rows as those of PairRows, made up on the spot: full samples of two halves with evenly distributed ids."""

    def __init__(self, num_samples: int, *, length: int, vocab_size: int, share: float, seed: int) -> None:
        self.num_samples = num_samples
        self.length = length
        self.vocab_size = vocab_size
        self.share = share  # of the tokens that are masked
        self.seed = seed

    def __len__(self) -> int:
        return self.num_samples

    def batch(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """[B, 3 T + 2]"""
        length = self.length
        places = np.arange(2 * length + 1, dtype=np.uint64)
        numbers = np.asarray(indices).astype(np.uint64)[:, None] * np.uint64(2 * length + 1) + places
        words = mix_words(numbers + mix_words(np.array([self.seed], np.uint64)))
        rows = np.empty((len(words), 3 * length + 2), np.int64)
        rows[:, :length] = words[:, :length] % np.uint64(self.vocab_size)
        rows[:, length : 2 * length] = np.arange(length) >= length // 2
        masked = words[:, length : 2 * length] < np.uint64(self.share * 2.0**64)
        rows[:, 2 * length : 3 * length] = np.where(masked, rows[:, :length], -1)
        rows[:, -2], rows[:, -1] = words[:, -1] % np.uint64(2), length
        return rows


@dataclass(frozen=True)
class PairBatches:
    """Batches for BERT, from rows as those of PairRows; what a Loader reads from."""

    rows: SampleRows

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: NDArray[np.int64], samples: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Each with B first.

        tokens, types, labels: int64 BT; labels are -1 where nothing is masked. loss_mask: float32 BT, 1 where something
        is. padding: int32 BT, 1 where a token is real. order: int64 B, 1 where the parts are swapped; order_mask:
        float32 B, all 1. samples: int64 B.
        """
        rows = self.rows.batch(indices)
        length = (rows.shape[1] - 2) // 3
        padding = (np.arange(length) < rows[:, -1:]).astype(np.int32)
        labels = rows[:, 2 * length : 3 * length].astype(np.int64)
        return {
            "tokens": rows[:, :length].astype(np.int64),
            # Behind the text's end they have the id of [PAD], which need not be one of two types.
            "types": rows[:, length : 2 * length].astype(np.int64) * padding,
            "labels": labels,
            "loss_mask": (labels >= 0).astype(np.float32),
            "padding": padding,
            "order": rows[:, -2].astype(np.int64),
            "order_mask": np.ones(len(rows), np.float32),
            "samples": np.asarray(samples, np.int64),
        }
