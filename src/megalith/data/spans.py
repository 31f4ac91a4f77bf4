"""T5's samples: spans of whole words are cut out of some sentences, and the decoder is to tell what stood there.

They are Megatron-LM's, token by token (Raffel et al. 2020, arXiv:1910.10683, with its spans of whole words).

Shape letters: B batch, E encoder length, T decoder length, P places in the stream (E + T).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.data.causal import SampleRows
from megalith.data.masking import WORDPIECE, Pieces, SpanRule, choose_spans, pieces_of, random_of
from megalith.data.mock import MockRows
from megalith.data.sentence_rows import SentenceRows, filled
from megalith.data.tokenizer import Tokenizer

SPECIAL_TOKENS = 2  # by which a sample's longest target is shorter than the encoder's sequence


@dataclass(frozen=True, eq=False)
class SpanCutRule:
    """What all samples have in common."""

    encoder_length: int  # tokens, with padding
    decoder_length: int
    pieces: Pieces
    bos: int
    eos: int
    pad: int
    sentinels: Sequence[int]  # each stands for a span, in this order
    masking: SpanRule


@dataclass(frozen=True)
class SpanSample:
    """One sample."""

    encoder: NDArray[np.int64]  # E: the sentences with a sentinel in place of each span
    decoder: NDArray[np.int64]  # T: [BOS], then each sentinel and its span
    labels: NDArray[np.int64]  # T: the decoder's next tokens, [EOS] last; -1 for padding


def cut_spans(
    sentences: Sequence[NDArray[Any]], target: int, rule: SpanCutRule, random: np.random.RandomState
) -> SpanSample:
    """The sample of some sentences of a document; target: tokens to which they are cut.

    A span for which there is no sentinel left, or no room in the decoder, stays where it is (Megatron-LM fails there).
    """
    tokens = np.concatenate(sentences).astype(np.int64)[:target]
    spans = list(choose_spans(tokens, rule.pieces, rule.masking, rule.masking.share * target, random))
    encoder: list[int] = []
    decoder = [rule.bos]
    begin = used = 0
    for span in sorted(spans, key=lambda places: int(places[0])):
        if used == len(rule.sentinels) or len(decoder) + 1 + len(span) > rule.decoder_length:
            continue
        sentinel = rule.sentinels[used]
        used += 1
        encoder += [*tokens[begin : span[0]].tolist(), sentinel]
        decoder += [sentinel, *tokens[span].tolist()]
        begin = int(span[-1]) + 1
    encoder += tokens[begin:].tolist()
    labels = [*decoder[1:], rule.eos]
    return SpanSample(
        filled(encoder, rule.encoder_length, rule.pad),
        filled(decoder, rule.decoder_length, rule.pad),
        filled(labels, rule.decoder_length, -1),
    )


def pieces_for_spans(tokenizer: Tokenizer) -> Pieces:
    """What masking needs of a tokenizer: of BERT's WordPiece, or of any that shows where its words begin.

    There a token begins a word if white space stands before it when it is decoded behind another.
    """
    if tokenizer.name in WORDPIECE:
        return pieces_of(tokenizer)
    size = tokenizer.vocab_size
    other = tokenizer.encode("a")[-1]
    skipped = len(tokenizer.decode([other]))
    begins_word = np.array([tokenizer.decode([other, n])[skipped : skipped + 1].isspace() for n in range(size)])
    fixed = np.zeros(size, bool)
    fixed[[*tokenizer.roles.values(), *tokenizer.extra_ids]] = True
    return Pieces(size, begins_word, fixed)


class SpanRows:
    """The samples of a map as rows of numbers, as a blend mixes them: encoder (E), decoder and labels (T each)."""

    def __init__(self, sentences: SentenceRows, rule: SpanCutRule) -> None:
        self.sentences = sentences
        self.rule = rule

    def __len__(self) -> int:
        return len(self.sentences)

    def sample(self, index: int) -> SpanSample:
        """The sample at this place of the map."""
        sentences, target = self.sentences.read(index)
        return cut_spans(sentences, target, self.rule, random_of(self.sentences.seed, index))

    def batch(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """[B, E + 2 T]"""
        rows = np.empty((len(indices), self.rule.encoder_length + 2 * self.rule.decoder_length), np.int64)
        self.sentences.indexed.check_sizes()
        for row, index in zip(rows, indices, strict=True):
            sample = self.sample(int(index))
            row[:] = np.concatenate([sample.encoder, sample.decoder, sample.labels])
        return rows


class MockSpanRows:
    """Rows as those of SpanRows, of evenly distributed ids from 1 to vocab_size - 1, without padding."""

    def __init__(
        self, num_samples: int, *, encoder_length: int, decoder_length: int, vocab_size: int, seed: int
    ) -> None:
        length = encoder_length + 2 * decoder_length
        self._rows = MockRows(num_samples, sequence_length=length - 1, vocab_size=vocab_size - 1, seed=seed)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """[B, E + 2 T]"""
        return self._rows.batch(indices) + 1


@dataclass(frozen=True)
class SpanBatches:
    """Batches for an encoder and a decoder, from rows as those of SpanRows; what a Loader reads from."""

    rows: SampleRows
    encoder_length: int
    pad: int
    sentinels: tuple[int, ...] = ()  # for whoever counts labels

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: NDArray[np.int64], samples: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Each with B first.

        tokens: int64 BP, the encoder's and the decoder's joined. padding: int32 BE, 1 where the encoder's token is
        [PAD], which nobody sees. labels: int64 BT. loss_mask: float32 BT. samples: int64 B.
        """
        rows = self.rows.batch(indices)
        places = (rows.shape[1] + self.encoder_length) // 2
        labels = rows[:, places:]
        return {
            "tokens": rows[:, :places].astype(np.int64),
            "padding": (rows[:, : self.encoder_length] == self.pad).astype(np.int32),
            "labels": labels.astype(np.int64),
            "loss_mask": (labels >= 0).astype(np.float32),
            "samples": np.asarray(samples, np.int64),
        }
