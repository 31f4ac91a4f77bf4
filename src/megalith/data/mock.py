"""Tokens made up on the spot, for measuring a model without data: hashes of the sample's number and the place in it."""

import numpy as np
from numpy.typing import NDArray


class MockRows:
    """Rows of sequence_length + 1 evenly distributed ids below vocab_size; the same for the same seed, anywhere.

    A source of rows like CausalDataset, of num_samples samples.
    """

    def __init__(self, num_samples: int, *, sequence_length: int, vocab_size: int, seed: int) -> None:
        self.num_samples = num_samples
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self.seed = seed

    def __len__(self) -> int:
        return self.num_samples

    def batch(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples with these indices, [B, S1]."""
        places = np.arange(self.sequence_length + 1, dtype=np.uint64)
        rows = np.asarray(indices).astype(np.uint64)[:, None] * np.uint64(self.sequence_length + 1) + places
        return (mix_words(rows + mix_words(np.array([self.seed], np.uint64))) % np.uint64(self.vocab_size)).astype(
            np.int64
        )


def mix_words(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A random-looking one-to-one image of 64-bit words: the finaliser of SplitMix64 (variant 13 of D. Stafford)."""
    words = words * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = words ^ (words >> np.uint64(31))
    return mixed
