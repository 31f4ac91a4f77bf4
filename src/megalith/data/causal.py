"""Samples for language models that predict the next token: s+1 consecutive tokens of the shuffled stream of documents.

A whole batch is gathered from the memory map by one index array, so there is no work per document in Python, however
short the documents are.

Shape letters: B batch, S1 sequence length plus one, T sequence length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from megalith.data.index_maps import IndexMaps
from megalith.data.indexed import IndexedDataset


class SampleRows(Protocol):
    """A data set of rows of S1 tokens, read many at a time: a CausalDataset, or a blend of them."""

    def __len__(self) -> int: ...

    def batch(self, indices: NDArray[np.int64]) -> NDArray[Any]: ...


@dataclass(frozen=True)
class _Pieces:
    """The stretches of documents that make up a batch, in order."""

    documents: NDArray[np.int32]
    begins: NDArray[np.int64]  # first token taken of the document
    sizes: NDArray[np.int64]  # tokens taken


class CausalDataset:
    """The samples that index maps cut out of a token file.

    vocab_size: the token ids allowed are 0 to vocab_size - 1; None allows all. Raises ValueError if the tokens are no
    integers.
    """

    def __init__(self, indexed: IndexedDataset, maps: IndexMaps, *, vocab_size: int | None) -> None:
        if indexed.dtype.kind not in "iu":
            raise ValueError(f"{indexed.prefix}: its tokens are {indexed.dtype}; a language model needs integer ids")
        self.indexed = indexed
        self.maps = maps
        self.vocab_size = vocab_size
        self.sequence_length = maps.sequence_length

    def __len__(self) -> int:
        return len(self.maps)

    def sample(self, index: int) -> NDArray[np.int64]:
        """The S1 tokens of one sample; index is its place in the shuffled order."""
        row: NDArray[np.int64] = self.batch(np.array([index]))[0].astype(np.int64)
        return row

    def batch(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """The samples at these places of the shuffled order, [B, S1], in the file's dtype.

        Raises ValueError for an index out of range, for a file that was cut short, for maps that do not fit the token
        file, and for a token that is not in the vocabulary, naming document and position.
        """
        self.indexed.check_sizes()
        pieces = self._pieces(np.asarray(indices, np.int64))
        num_tokens = len(indices) * (self.sequence_length + 1)
        # Where each piece lies in the file, less where it lies in the batch.
        shifts = self.indexed.offsets[pieces.documents] // self.indexed.dtype.itemsize + pieces.begins
        shifts -= np.cumsum(pieces.sizes) - pieces.sizes
        places = np.repeat(shifts, pieces.sizes)
        places += np.arange(num_tokens)
        tokens = self.indexed.tokens[places]
        self._check_tokens(tokens, pieces)
        rows: NDArray[Any] = tokens.reshape(len(indices), self.sequence_length + 1)
        return rows

    def _pieces(self, indices: NDArray[np.int64]) -> _Pieces:
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise ValueError(f"samples {indices.min()} to {indices.max()} of {self.indexed.prefix}: it has {len(self)}")
        samples = self.maps.shuffle_idx[indices].astype(np.int64)
        first, last = self.maps.sample_idx[samples].astype(np.int64), self.maps.sample_idx[samples + 1]
        counts = last[:, 0] - first[:, 0] + 1  # documents that each sample touches
        ends = np.cumsum(counts)
        places = np.repeat(first[:, 0] - (ends - counts), counts)
        places += np.arange(len(places))
        documents = self.maps.doc_idx[places]
        begins = np.zeros(len(places), np.int64)
        begins[ends - counts] = first[:, 1]
        lengths = self.indexed.lengths[documents].astype(np.int64)
        sizes = lengths - begins
        sizes[ends - 1] = last[:, 1] + 1 - begins[ends - 1]
        if len(indices):
            within = (sizes >= 0).all() and (begins + sizes <= lengths).all()
            if not within or (np.add.reduceat(sizes, ends - counts) != self.sequence_length + 1).any():
                raise ValueError(f"the index maps do not fit {self.indexed.prefix}; remove them, and they are rebuilt")
        return _Pieces(documents, begins, sizes)

    def _check_tokens(self, tokens: NDArray[Any], pieces: _Pieces) -> None:
        if self.vocab_size is None or not len(tokens):
            return
        # Seen without its sign a negative id is an enormous one.
        unsigned = tokens.view(f"u{tokens.dtype.itemsize}")
        if int(unsigned.max()) >= self.vocab_size:
            self._refuse(tokens, int((unsigned >= self.vocab_size).argmax()), pieces)

    def _refuse(self, tokens: NDArray[Any], place: int, pieces: _Pieces) -> NoReturn:
        ends = np.cumsum(pieces.sizes)
        piece = int(np.searchsorted(ends, place, side="right"))
        position = int(pieces.begins[piece]) + place - int(ends[piece] - pieces.sizes[piece])
        raise ValueError(
            f"{self.indexed.bin_path}: token {tokens[place]} at position {position} of document "
            f"{pieces.documents[piece]} is not in the vocabulary (0 to {(self.vocab_size or 0) - 1}); it was prepared "
            "with another tokenizer, or is damaged"
        )


@dataclass(frozen=True)
class CausalBatches:
    """Batches for a language model, from rows of tokens; what a Loader reads from.

    eod: id of the end-of-document token, needed by the three settings: positions that begin anew after it, attention
    that does not reach back over it, no loss where it is the input.
    """

    rows: SampleRows
    eod: int | None
    reset_position_ids: bool
    reset_attention_mask: bool
    eod_mask_loss: bool

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: NDArray[np.int64], samples: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The batch of the data set's samples with these indices, which are these samples of the run."""
        return causal_batch(
            self.rows.batch(indices),
            samples,
            eod=self.eod,
            reset_position_ids=self.reset_position_ids,
            reset_attention_mask=self.reset_attention_mask,
            eod_mask_loss=self.eod_mask_loss,
        )


def causal_batch(
    tokens_BS1: NDArray[Any],
    samples_B: NDArray[np.int64] | Sequence[int],
    *,
    eod: int | None,
    reset_position_ids: bool,
    reset_attention_mask: bool,
    eod_mask_loss: bool,
) -> dict[str, NDArray[Any]]:
    """Inputs, labels and what goes with them, each with B first.

    tokens, labels: int64 BT. loss_mask: float32 BT, 0 where the input is eod if eod_mask_loss. positions: int64 BT,
    from 0 again after each eod if reset_position_ids. documents: int32 BT, the number of eods before each token, only
    if reset_attention_mask: a token sees those of its own document. samples: int64 B.
    """
    if eod is None and (reset_position_ids or reset_attention_mask or eod_mask_loss):
        raise ValueError(
            "reset_position_ids, reset_attention_mask and eod_mask_loss need a tokenizer with an end-of-document token"
        )
    tokens_BT = tokens_BS1[:, :-1].astype(np.int64)
    batch: dict[str, NDArray[Any]] = {
        "tokens": tokens_BT,
        "labels": tokens_BS1[:, 1:].astype(np.int64),
        "loss_mask": np.ones(tokens_BT.shape, np.float32),
        "positions": np.tile(np.arange(tokens_BT.shape[1]), (len(tokens_BT), 1)),
        "samples": np.asarray(samples_B, np.int64),
    }
    if eod is None or not (reset_position_ids or reset_attention_mask or eod_mask_loss):
        return batch
    eods = np.flatnonzero(tokens_BT == eod)  # places in the batch, row after row
    if eod_mask_loss:
        batch["loss_mask"].reshape(-1)[eods] = 0.0
    # A document begins with each row, and behind each eod: that one belongs to the document that it ends.
    row_starts = np.arange(0, tokens_BT.size, tokens_BT.shape[1])
    starts = np.union1d(row_starts, eods + 1)
    starts = starts[starts < tokens_BT.size]
    sizes = np.diff(starts, append=tokens_BT.size)
    if reset_position_ids:
        positions = np.arange(tokens_BT.size) - np.repeat(starts, sizes)
        batch["positions"] = positions.reshape(tokens_BT.shape)
    if reset_attention_mask:
        first_of_row = np.searchsorted(starts, row_starts)
        rows = starts // tokens_BT.shape[1]
        numbers = (np.arange(len(starts)) - first_of_row[rows]).astype(np.int32)
        batch["documents"] = np.repeat(numbers, sizes).reshape(tokens_BT.shape)
    return batch
