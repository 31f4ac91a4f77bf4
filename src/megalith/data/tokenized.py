"""One block of documents to tokens: what a worker does, and nothing that depends on which worker does it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.data.blocks import Block, DocumentRules
from megalith.data.documents import Fault, parse_block
from megalith.data.sentences import split_sentences
from megalith.data.tokenizer import Tokenizer

MOST_FAULTS = 5  # of one block that are told apart; the others are counted


@dataclass(frozen=True)
class TokenRules:
    """How documents become items of tokens.

    append_eod: end each document's last item with the end-of-document token. split_sentences: an item is a sentence,
    not the whole text. skip_bad: count documents that cannot be used instead of stopping at the first. dtype: of the
    tokens.
    """

    documents: DocumentRules
    append_eod: bool
    split_sentences: bool
    keep_newlines: bool
    skip_bad: bool
    dtype: str


@dataclass(frozen=True)
class Tokens:
    """Documents under one key: all their tokens, the length of each item, the number of items of each document."""

    lengths: NDArray[np.int32]
    items: NDArray[np.int32]
    tokens: NDArray[Any]


@dataclass(frozen=True)
class TokenizedBlock:
    """What became of a block. keys: in the order of the rules. num_read: bytes of input files read up to its end."""

    keys: tuple[Tokens, ...]
    num_documents: int  # usable ones, also those without tokens
    num_bytes: int  # of the block's documents, uncompressed
    num_read: int
    num_bad: int
    faults: tuple[Fault, ...]  # the first ones


def tokenize_block(block: Block, rules: TokenRules, tokenizer: Tokenizer) -> TokenizedBlock:
    """The tokens of a block's documents; without skip_bad nothing behind the first fault is looked at."""
    documents: list[tuple[str, ...]] = []
    faults: list[Fault] = []
    num_bad = 0
    for document in parse_block(block, rules.documents):
        if not isinstance(document, Fault):
            documents.append(document)
            continue
        num_bad += 1
        if len(faults) < MOST_FAULTS:
            faults.append(document)
        if not rules.skip_bad:
            break
    columns = list(zip(*documents, strict=True)) if documents else [()] * len(rules.documents.keys)
    keys = tuple(_with_tokens([_items_of(texts, rules, tokenizer) for texts in columns], rules, tokenizer))
    return TokenizedBlock(keys, len(documents), len(block.content), block.num_read, num_bad, tuple(faults))


@dataclass(frozen=True)
class _Items:
    """Texts under one key: all their tokens, the length of each item that has some, the number of its document."""

    ids: NDArray[Any]
    lengths: NDArray[Any]
    owners: NDArray[Any]


def _items_of(texts: Sequence[str], rules: TokenRules, tokenizer: Tokenizer) -> _Items:
    owners = np.arange(len(texts))
    if rules.split_sentences:
        split = [split_sentences(text, keep_newlines=rules.keep_newlines) for text in texts]
        owners = np.repeat(owners, [len(sentences) for sentences in split])
        texts = [sentence for sentences in split for sentence in sentences]
    ids, lengths = tokenizer.encode_flat(texts)
    kept = lengths > 0
    return _Items(ids, lengths[kept], owners[kept])


def _with_tokens(keys: Sequence[_Items], rules: TokenRules, tokenizer: Tokenizer) -> Iterator[Tokens]:
    """The documents that have tokens under every key, so that those of one key are those of all."""
    whole = reduce(np.intersect1d, [items.owners for items in keys])
    for items in keys:
        ids, lengths, owners = items.ids, items.lengths, items.owners
        stays = np.isin(owners, whole)
        if not stays.all():
            ids = ids[np.repeat(stays, lengths)]
            lengths, owners = lengths[stays], owners[stays]
        counts = np.bincount(owners)
        if rules.append_eod and len(owners):
            last = np.flatnonzero(np.diff(owners, append=-1))
            ids = np.insert(ids, np.cumsum(lengths)[last], tokenizer.eod)
            lengths[last] += 1
        yield Tokens(lengths.astype(np.int32), counts[counts > 0].astype(np.int32), ids.astype(rules.dtype))
