"""The inverse cloze task: which block of a text is a sentence taken from (Lee et al. 2019, arXiv:1906.00300)?

What is drawn for a sample follows from the seed and its place in the map, so it is the same whoever reads it when.

Shape letters: B batch, T sequence length.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.data.indexed import IndexedDataset
from megalith.data.marked import Marks
from megalith.data.masking import random_of
from megalith.data.sentence_rows import SentenceRows


@dataclass(frozen=True)
class ClozeSample:
    """A sentence and the block that it is from, with their marks and without padding."""

    query: NDArray[np.int64]
    block: NDArray[np.int64]


class ClozeBatches:
    """The samples of a block map as batches; see `ClozeBatches.sample`.

    rows: [N, 4], from `build_block_map`. titles: a token file with one item per document of the sentences' file.
    kept_share: the chance that the sentence stays in its block. vocab_size: the token ids allowed are those below.
    Raises ValueError if titles and documents differ in number.
    """

    def __init__(
        self,
        sentences: IndexedDataset,
        titles: IndexedDataset,
        rows: NDArray[Any],
        *,
        marks: Marks,
        kept_share: float,
        seed: int,
        vocab_size: int,
    ) -> None:
        check_titles(sentences, titles)
        self._sentences = SentenceRows(sentences, rows, seed=seed, vocab_size=vocab_size)
        self._titles = SentenceRows(titles, rows, seed=seed, vocab_size=vocab_size)
        self.marks = marks
        self.kept_share = kept_share

    def __len__(self) -> int:
        return len(self._sentences)

    def sample(self, index: int) -> ClozeSample:
        """The sample at this place of the map: a random sentence of a block, and the block, mostly without it.

        Raises ValueError for a place out of range, or a map that does not fit the files.
        """
        file = self._sentences.indexed
        if not 0 <= index < len(self):
            raise ValueError(f"sample {index} of {file.prefix}: it has {len(self)}")
        first, last, document, _ = (int(number) for number in self._sentences.rows[index])
        if not (0 <= first < last <= file.num_items and 0 <= document < file.num_documents):
            raise ValueError(f"the block map does not fit {file.prefix}; remove it, and it is rebuilt")
        block = [self._sentences.sentence(number) for number in range(first, last)]
        random = random_of(self._sentences.seed, index)
        chosen = int(random.randint(0, len(block)))
        query = block[chosen]
        if random.random_sample() >= self.kept_share:
            del block[chosen]
        text = np.concatenate(block) if block else query[:0]
        return ClozeSample(self.marks.mark(query), self.marks.mark(self._titles.sentence(document), text))

    def read(self, indices: NDArray[np.int64], samples: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """queries BT and contexts B1T, for each which tokens are real; loss_mask B."""
        made = [self.sample(int(index)) for index in indices]
        queries, real_queries = self.marks.fill([sample.query for sample in made])
        contexts, real_contexts = self.marks.fill([sample.block for sample in made])
        return {
            "queries": queries,
            "queries_real": real_queries,
            "contexts": contexts[:, None],
            "contexts_real": real_contexts[:, None],
            "loss_mask": np.ones(len(indices), np.float32),
            "samples": np.asarray(samples, np.int64),
        }


def check_titles(sentences: IndexedDataset, titles: IndexedDataset) -> None:
    """Raise ValueError unless there is a title for each document."""
    if titles.num_items != sentences.num_documents:
        raise ValueError(
            f"--titles-data-path = {titles.prefix}: has {titles.num_items} titles, and {sentences.prefix} has "
            f"{sentences.num_documents} documents. Prepare both keys of the same file together, each document with a "
            "title and a text"
        )
