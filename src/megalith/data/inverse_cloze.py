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

    rows: [N, 4], from `build_block_map`. titles: a token file with the title of each document of the sentences' file.
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
        self._title_bounds = title_bounds(sentences, titles)
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
        return ClozeSample(self.marks.mark(query), self.marks.mark(self._title_of(document), text))

    def _title_of(self, document: int) -> NDArray[Any]:
        first, last = (int(bound) for bound in self._title_bounds[document : document + 2])
        items = [self._titles.sentence(number) for number in range(first, last)]
        return items[0] if len(items) == 1 else np.concatenate(items)

    def read(self, indices: NDArray[np.int64], samples: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """queries BT and contexts B1T, for each which tokens are real; loss_mask B."""
        for rows in (self._sentences, self._titles):
            rows.indexed.check_sizes()
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


def title_bounds(sentences: IndexedDataset, titles: IndexedDataset) -> NDArray[np.int64]:
    """[documents + 1]: the item of the titles' file at which the title of each document starts, and the last one's end.

    An item is a title, as in Megatron-LM; or a document is, where titles have been split into sentences. Raises
    ValueError unless there is a title for each document.
    """
    if titles.prefix == sentences.prefix:
        raise ValueError(f"--titles-data-path = {titles.prefix}: is the text itself. Name the token file of its titles")
    if titles.num_items == sentences.num_documents:
        return np.arange(titles.num_items + 1)
    if titles.num_documents == sentences.num_documents and (np.diff(titles.document_index) > 0).all():
        return titles.document_index
    raise ValueError(
        f"--titles-data-path = {titles.prefix}: has {titles.num_documents} titles, and {sentences.prefix} has "
        f"{sentences.num_documents} documents. Prepare both at once, of the same file: --json-keys text title"
    )


def title_lengths(titles: IndexedDataset, bounds: NDArray[np.int64]) -> NDArray[np.int32]:
    """The tokens of each title. bounds: from `title_bounds`."""
    before = np.concatenate([[0], np.cumsum(titles.lengths, dtype=np.int64)])
    return np.diff(before[bounds]).astype(np.int32)
