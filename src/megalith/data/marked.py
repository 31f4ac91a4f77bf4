"""Texts as a bi-encoder reads them: [CLS], one or two parts with [SEP] behind each, padding.

Shape letters: B batch, T sequence length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megalith.data.tokenizer import Tokenizer

FEWEST_TOKENS = 3  # [CLS], a token, [SEP]


@dataclass(frozen=True)
class Marks:
    """What all sequences have in common. length: T, with special tokens and padding."""

    length: int
    cls: int
    sep: int
    pad: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, length: int) -> Self:
        """Those of a tokenizer, which needs such tokens. Raises ValueError naming the one that it lacks."""
        if length < FEWEST_TOKENS:
            raise ValueError(f"sequences of {length} tokens have no room for a text between their marks; lengthen them")
        return cls(length, tokenizer.cls, tokenizer.sep, tokenizer.pad)

    def mark(self, *parts: NDArray[Any]) -> NDArray[np.int64]:
        """[CLS] and the parts, a [SEP] behind each; cut to the length, with a [SEP] at the end all the same."""
        pieces: list[Any] = [[self.cls]]
        for part in parts:
            pieces += [part, [self.sep]]
        tokens = np.concatenate(pieces).astype(np.int64)
        if len(tokens) > self.length:
            tokens = tokens[: self.length]
            tokens[-1] = self.sep
        return tokens

    def fill(self, sequences: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """BT: the sequences with padding behind them; and 1 where a token is real, 0 in the padding."""
        tokens = np.full((len(sequences), self.length), self.pad, np.int64)
        real = np.zeros_like(tokens)
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence)] = sequence
            real[row, : len(sequence)] = 1
        return tokens, real
