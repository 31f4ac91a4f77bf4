"""One block of documents to tokens: what a worker does, and nothing that depends on which worker does it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.data.documents import Block, DocumentRules, Fault, parse_block
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
    keys = tuple(_tokenize_texts(texts, rules, tokenizer) for texts in columns)
    return TokenizedBlock(keys, len(documents), len(block.content), block.num_read, num_bad, tuple(faults))


def _tokenize_texts(texts: Sequence[str], rules: TokenRules, tokenizer: Tokenizer) -> Tokens:
    """Empty items are dropped; documents without any item are left out."""
    owners = np.arange(len(texts))
    if rules.split_sentences:
        split = [split_sentences(text, keep_newlines=rules.keep_newlines) for text in texts]
        owners = np.repeat(owners, [len(sentences) for sentences in split])
        texts = [sentence for sentences in split for sentence in sentences]
    ids, lengths = tokenizer.encode_flat(texts)
    kept = lengths > 0
    lengths, owners = lengths[kept], owners[kept]
    items = np.bincount(owners)
    if rules.append_eod and len(owners):
        last = np.flatnonzero(np.diff(owners, append=-1))
        ids = np.insert(ids, np.cumsum(lengths)[last], tokenizer.eod)
        lengths[last] += 1
    return Tokens(lengths.astype(np.int32), items[items > 0].astype(np.int32), ids.astype(rules.dtype))
