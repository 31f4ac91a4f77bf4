"""The sentences of the samples that a sentence map cuts out of a token file."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.data.indexed import IndexedDataset


class SentenceRows:
    """What a map says of each sample: its sentences and its target length. seed: of the samples' random numbers.

    rows: [N, 3], from `build_sentence_map`. vocab_size: the token ids allowed are 0 to vocab_size - 1.
    """

    def __init__(self, indexed: IndexedDataset, rows: NDArray[Any], *, seed: int, vocab_size: int) -> None:
        if indexed.dtype.kind not in "iu":
            raise ValueError(f"{indexed.prefix}: its tokens are {indexed.dtype}; a model of text needs integer ids")
        self.indexed = indexed
        self.rows = rows
        self.seed = seed
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> tuple[list[NDArray[Any]], int]:
        """The sentences of a sample, views of the file, and its target length.

        Raises ValueError for an index out of range, a map that does not fit the file, a token beyond the vocabulary.
        """
        if not 0 <= index < len(self):
            raise ValueError(f"sample {index} of {self.indexed.prefix}: it has {len(self)}")
        first, last, target = (int(number) for number in self.rows[index])
        if not 0 <= first < last <= self.indexed.num_items:
            raise ValueError(f"the sentence map does not fit {self.indexed.prefix}; remove it, and it is rebuilt")
        return [self.sentence(number) for number in range(first, last)], target

    def sentence(self, number: int) -> NDArray[Any]:
        """The tokens of one sentence of the file."""
        tokens = self.indexed.read(number)
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            wrong = int(np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))[0])
            raise ValueError(
                f"{self.indexed.prefix}: token {int(tokens[wrong])} at position {wrong} of sentence {number} is not "
                f"in the vocabulary of {self.vocab_size}; the file was prepared with another tokenizer"
            )
        return tokens

    def all_tokens(self, most: int) -> NDArray[Any]:
        """The tokens of all sentences that stand in some sample, each sentence once; about most of them at the most."""
        counts = np.zeros(self.indexed.num_items + 1, np.int64)
        np.add.at(counts, self.rows[:, 0].astype(np.int64), 1)
        np.add.at(counts, self.rows[:, 1].astype(np.int64), -1)
        used = np.flatnonzero(np.cumsum(counts[:-1]) > 0)
        used = used[np.cumsum(self.indexed.lengths[used], dtype=np.int64) <= most]
        return np.concatenate([self.sentence(int(number)) for number in used])


def filled(values: Sequence[int] | NDArray[np.int64], length: int, filling: int) -> NDArray[np.int64]:
    """The values, and behind them as much filling as a sample has room for."""
    if len(values) > length:
        raise ValueError(f"a sample of {len(values)} tokens: it has room for {length}; remove the sentence maps")
    row = np.full(length, filling, np.int64)
    row[: len(values)] = values
    return row
