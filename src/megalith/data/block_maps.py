"""Which sentences make which block of a document, in Megatron-LM's order, bit for bit: for the inverse cloze task.

A block is some sentences of one document, as many as fill a sequence beside the document's title. Nothing is drawn at
random, so every pass over the documents gives the same blocks: one pass is listed, and repeated.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.data.sentence_maps import LONGEST_SENTENCE, WIDE_SENTENCES, shuffle_rows, usable_documents
from megalith.data.survey import nothing


def build_block_map(
    document_index: NDArray[np.int64],
    lengths: NDArray[np.int32],
    title_lengths: NDArray[np.int32],
    *,
    num_samples: int,
    longest: int,
    least: int,
    seed: int,
    first_document: int = 0,
    moved: Callable[[], None] = nothing,
) -> NDArray[Any]:
    """[N, 4]: first sentence, the one after the last, document, and the block's number in its pass; N >= num_samples.

    document_index: the sentence at which each document of the part starts, then the end of the last; lengths: tokens of
    every sentence of the token file; title_lengths: tokens of the title of each of these documents. longest: tokens of
    title and block together. least: sentences of a block. first_document: the number of the part's first one.
    moved: called after each block of the work. All documents are gone through as often as it takes. Raises ValueError
    if no document has a block.
    """
    rows = list_blocks(document_index, lengths, title_lengths, longest=longest, least=least)
    rows[:, 2] += rows.dtype.type(first_document)
    whole = np.tile(rows, (max(1, -(-num_samples // len(rows))), 1))
    shuffle_rows(whole, seed, moved=moved)
    return whole


def list_blocks(
    document_index: NDArray[np.int64],
    lengths: NDArray[np.int32],
    title_lengths: NDArray[np.int32],
    *,
    longest: int,
    least: int,
) -> NDArray[Any]:
    """The blocks of one pass, in the order of the documents; documents are counted from 0."""
    bounds_U2 = usable_documents(document_index, lengths, least)
    if not len(bounds_U2):
        raise ValueError(
            f"none of the {len(document_index) - 1} documents has {least} sentences and none of more than "
            f"{LONGEST_SENTENCE} tokens: no block can be made; prepare the text with --split-sentences"
        )
    # Empty documents start where the next one does: the last that starts there has the sentences.
    documents_U = np.searchsorted(document_index[:-1], bounds_U2[:, 0], side="right") - 1
    origin = int(bounds_U2[0, 0])
    sentences = lengths[origin : int(bounds_U2[-1, 1])]
    sums = np.zeros(len(sentences) + 1, np.int64)  # tokens before each sentence
    np.cumsum(sentences, out=sums[1:])
    places = np.arange(len(sentences))
    # Sentences between usable documents get some document, which nobody asks for.
    owners = np.maximum(np.searchsorted(bounds_U2[:, 0], places + origin, side="right") - 1, 0)
    wanted = longest - title_lengths[documents_U].astype(np.int64)[owners]
    ends = np.maximum(np.searchsorted(sums, sums[:-1] + wanted), places + least)
    stops = bounds_U2[owners, 1] - origin
    # A block closes early only if enough sentences remain for another.
    next_of = np.where(stops - ends >= least, ends, stops).tolist()
    starts: list[int] = []
    for start, stop in (bounds_U2 - origin).tolist():
        while start < stop:
            starts.append(start)
            start = next_of[start]
    firsts = np.array(starts, np.int64)
    rows = np.empty((len(starts), 4), np.uint64 if len(lengths) > WIDE_SENTENCES else np.uint32)
    rows[:, 0] = firsts + origin
    rows[:, 1] = np.array(next_of, np.int64)[firsts] + origin
    rows[:, 2] = documents_U[owners[firsts]]
    rows[:, 3] = np.arange(len(starts))
    return rows
