"""The three arrays that turn documents into samples of equal length, in Megatron-LM's order, bit for bit.

All documents of all epochs are put into one shuffled row (doc_idx) and read as one stream of tokens. Sample k is tokens
k*s to (k+1)*s of that stream, s+1 of them: each sample's last token is the next one's first. sample_idx says in which
document of the row and at which of its tokens sample k starts. shuffle_idx is the order in which samples are drawn.

The samples' starts need no walk: the stream position of each document's end is a running sum, and the samples that
start inside a document are those whose k*s lies between two such ends. So everything is numpy, block by block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 16  # documents or samples worked on at once, so that they stay in the processor's cache
WIDE_SAMPLES = 2**32 - 2  # from here on shuffle_idx takes 64 bits
LAST_EPOCH_SHARE = 0.80  # a last epoch of which less is needed is shuffled by itself


@dataclass(frozen=True)
class EpochPlan:
    """How many passes over the documents the samples need, and whether the last pass is shuffled by itself."""

    tokens_per_epoch: int
    epochs: int
    separate_last_epoch: bool
    samples: int  # that the stream of all epochs gives; at least as many as were asked for
    samples_before_last_epoch: int
    samples_per_epoch: int
    last_epoch_samples: int  # of those asked for, the ones that only the last epoch gives


@dataclass(frozen=True)
class IndexMaps:
    """Where each sample's tokens are: the three arrays, and the plan they were made by."""

    doc_idx: NDArray[np.int32]  # [epochs * documents]: the documents in the order of the stream
    sample_idx: NDArray[
        np.int32
    ]  # [samples + 1, 2]: place in doc_idx, token of that document at which each sample starts
    shuffle_idx: NDArray[Any]  # [samples], uint32 (int64 if too many): sample to draw at each position
    plan: EpochPlan
    sequence_length: int

    @property
    def epochs(self) -> int:
        return self.plan.epochs

    @property
    def separate_last_epoch(self) -> bool:
        return self.plan.separate_last_epoch

    def __len__(self) -> int:
        return len(self.shuffle_idx)


def build_index_maps(
    documents: NDArray[np.int32], lengths: NDArray[np.int32], *, num_samples: int, sequence_length: int, seed: int
) -> IndexMaps:
    """The maps for at least num_samples samples of sequence_length + 1 tokens.

    documents: the items to draw from; lengths: of every item of the token file. Raises ValueError if the documents have
    no token, or are too many for 32-bit places.
    """
    tokens_per_epoch = count_tokens(documents, lengths)
    plan = plan_epochs(tokens_per_epoch, num_samples=num_samples, sequence_length=sequence_length)
    arrays = dict(make_arrays(documents, lengths, plan, sequence_length=sequence_length, seed=seed))
    return IndexMaps(**arrays, plan=plan, sequence_length=sequence_length)


def make_arrays(
    documents: NDArray[np.int32], lengths: NDArray[np.int32], plan: EpochPlan, *, sequence_length: int, seed: int
) -> Iterator[tuple[str, NDArray[Any]]]:
    """doc_idx, sample_idx and shuffle_idx of a plan with their names, each made when it is asked for.

    documents, lengths: as in `build_index_maps`. Raises ValueError for documents too many for 32-bit places.
    """
    # One stream of random numbers for both shuffles, in this order.
    random = np.random.RandomState(seed)
    doc_idx = shuffle_documents(documents, plan, random)
    yield "doc_idx", doc_idx
    yield "sample_idx", locate_samples(doc_idx, lengths, plan, sequence_length)
    yield "shuffle_idx", shuffle_samples(plan, random)


def count_tokens(documents: NDArray[np.int32], lengths: NDArray[np.int32]) -> int:
    """Tokens of all the documents together."""
    if len(documents) and not 0 <= documents.min() <= documents.max() < len(lengths):
        raise ValueError(f"documents {documents.min()} to {documents.max()} are not all among the {len(lengths)} items")
    blocks = range(0, len(documents), BLOCK)
    return sum(int(lengths[documents[begin : begin + BLOCK]].sum(dtype=np.int64)) for begin in blocks)


def plan_epochs(tokens_per_epoch: int, *, num_samples: int, sequence_length: int) -> EpochPlan:
    """The fewest epochs that give num_samples samples, by Megatron-LM's rules.

    Its check that the last epoch gives no more than samples_per_epoch is one too strict: where s divides into an epoch
    without a rest, or an epoch is shorter than a sample, it can be one more.
    """
    if sequence_length < 1 or num_samples < 0:
        raise ValueError(f"sequence_length={sequence_length} must be 1 or more, num_samples={num_samples} 0 or more")
    if tokens_per_epoch < 1:
        raise ValueError(f"{num_samples} samples cannot be drawn from documents without a token; check data and split")
    epochs = max(1, -(-(num_samples * sequence_length + 1) // tokens_per_epoch))
    before_last = ((epochs - 1) * tokens_per_epoch - 1) // sequence_length if epochs > 1 else 0
    last = num_samples - before_last
    per_epoch = (tokens_per_epoch - 1) // sequence_length
    assert epochs == 1 or 0 <= last <= per_epoch + 1
    return EpochPlan(
        tokens_per_epoch=tokens_per_epoch,
        epochs=epochs,
        separate_last_epoch=epochs > 1 and last < int(LAST_EPOCH_SHARE * per_epoch),
        samples=(epochs * tokens_per_epoch - 1) // sequence_length,
        samples_before_last_epoch=before_last,
        samples_per_epoch=per_epoch,
        last_epoch_samples=last,
    )


def shuffle_documents(
    documents: NDArray[np.int32], plan: EpochPlan, random: np.random.RandomState
) -> NDArray[np.int32]:
    """doc_idx: the documents once for every epoch, shuffled together; a separate last epoch only within itself."""
    if plan.epochs * len(documents) > np.iinfo(np.int32).max:
        raise ValueError(
            f"{plan.epochs} epochs of {len(documents)} documents are more than the 2^31 places of an index map; "
            "ask for fewer samples or join documents"
        )
    doc_idx = np.tile(documents.astype(np.int32, copy=False), plan.epochs)
    first = len(doc_idx) - len(documents) if plan.separate_last_epoch else len(doc_idx)
    random.shuffle(doc_idx[:first])
    random.shuffle(doc_idx[first:])
    return doc_idx


def locate_samples(
    doc_idx: NDArray[np.int32], lengths: NDArray[np.int32], plan: EpochPlan, sequence_length: int
) -> NDArray[np.int32]:
    """sample_idx: for k from 0 to the number of samples, where token k * sequence_length of the stream is.

    Row 0 is the first document's first token even if that document is empty; all others name a token that exists.
    """
    sample_idx = np.empty((plan.samples + 1, 2), np.int32)
    stream = 0  # tokens before this block of documents
    row = 0  # samples that start before it
    for begin in range(0, len(doc_idx), BLOCK):
        sizes = lengths[doc_idx[begin : begin + BLOCK]].astype(np.int64)
        ends = np.cumsum(sizes)
        ends += stream
        rows_before_end = (ends + (sequence_length - 1)) // sequence_length
        first_tokens = ends - sizes
        last_row = int(rows_before_end[-1])
        # By blocks again: one document may hold all the samples there are.
        for low in range(row, last_row, BLOCK):
            high = min(low + BLOCK, last_row)
            places = _documents_of_rows(rows_before_end, low, high)
            rows = sample_idx[low:high]
            rows[:, 0] = places + begin
            rows[:, 1] = np.arange(low, high) * sequence_length - first_tokens[places]
        row = last_row
        stream = int(ends[-1])
    assert row == len(sample_idx), "the plan counts the samples of these very documents"
    sample_idx[0] = 0
    return sample_idx


def _documents_of_rows(rows_before_end: NDArray[np.int64], low: int, high: int) -> NDArray[np.int64]:
    """For each row from low to high - 1, the documents that end before it: the place of the one it starts in."""
    before, until = np.searchsorted(rows_before_end, (low, high - 1), side="right")
    # Counting the ends at each row and summing up is far quicker than a search for every row.
    ends_at_row = np.bincount(rows_before_end[before:until] - low, minlength=high - low)
    ends_at_row[0] = before
    return np.cumsum(ends_at_row, out=ends_at_row)


def shuffle_samples(plan: EpochPlan, random: np.random.RandomState) -> NDArray[Any]:
    """shuffle_idx: the samples before a separate last epoch in random order, then those of the last one."""
    dtype = np.int64 if plan.samples >= WIDE_SAMPLES else np.uint32
    shuffle_idx = np.arange(plan.samples, dtype=dtype)
    first = plan.samples_before_last_epoch if plan.separate_last_epoch else plan.samples
    random.shuffle(shuffle_idx[:first])
    random.shuffle(shuffle_idx[first:])
    return shuffle_idx
