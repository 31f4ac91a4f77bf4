"""--corpus: text that is already on the machine, made into token files with a tokenizer trained on it, once per run.

For a gpt these are whole documents in a byte-level BPE. For tasks that read sentences (SENTENCE_TASKS) it is the prose
among them, an item for each sentence, in a lower-case WordPiece (--vocab-extra-ids adds sentinels to it), and beside it
a token file with the title of each document, in the same order.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from megalith.config import Run
from megalith.data.corpus import standard_library_documents, titled_documents
from megalith.data.indexed import IndexedWriter, best_dtype, idx_path
from megalith.data.sentences import split_sentences
from megalith.data.tokenizer import load_tokenizer, train_byte_bpe, train_wordpiece
from megalith.monitor.log import RunLog
from megalith.parallel.mesh import Layout
from megalith.ranks import Ranks

SENTENCE_TASKS = ("bert", "t5", "ict")


def prepare_corpus(run: Run, layout: Layout, log: RunLog) -> Run:
    """The run with its corpus turned into ordinary data settings; itself if it names none.

    The files are kept in the run directory: a run that goes on finds the very same text and tokenizer.
    """
    if run.data.corpus is None:
        return run
    if run.data.corpus == "shapes":
        return prepare_shapes(run, layout, log)
    prefix = corpus_prefix(run)
    if layout.rank == 0 and not idx_path(prefix).exists():
        log.line("making a corpus of this Python installation's documentation and sources ...")
        prefix.parent.mkdir(parents=True, exist_ok=True)
        make = make_sentences if run.task in SENTENCE_TASKS else make_corpus
        make(prefix, run.data.corpus_vocab_size)
    if layout.world_size > 1:
        Ranks().wait_for_all()
    return dataclasses.replace(run, data=dataclasses.replace(run.data, corpus=None, **_settings(run, prefix)))


def _settings(run: Run, prefix: Path) -> dict[str, Any]:
    """The data settings that name the files of a corpus."""
    folder = tokenizer_folder(prefix)
    if run.task in SENTENCE_TASKS:
        return {
            "data_path": (os.fspath(prefix),),
            "tokenizer_type": "BertWordPieceLowerCase",
            "vocab_file": os.fspath(folder / "vocab.txt"),
            **({"titles_data_path": os.fspath(titles_prefix(prefix))} if run.task == "ict" else {}),
        }
    return {
        "data_path": (os.fspath(prefix),),
        "tokenizer_type": "GPT2BPETokenizer",
        "vocab_file": os.fspath(folder / "vocab.json"),
        "merge_file": os.fspath(folder / "merges.txt"),
    }


def prepare_shapes(run: Run, layout: Layout, log: RunLog) -> Run:
    """The run with a folder of drawn images as its data."""
    folder = shapes_folder(run)
    if layout.rank == 0 and not folder.exists():
        log.line("drawing a set of images ...")
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Pillow is there for image tasks only.
        from megalith.data.shapes import draw_set

        draw_set(folder)
    if layout.world_size > 1:
        Ranks().wait_for_all()
    return dataclasses.replace(run, data=dataclasses.replace(run.data, corpus=None, data_path=(os.fspath(folder),)))


def shapes_folder(run: Run) -> Path:
    """Where the drawn images of a run lie."""
    assert run.checkpoint.save is not None, "check.py saw to it"
    return Path(run.checkpoint.save) / "corpus" / "shapes"


def corpus_prefix(run: Run) -> Path:
    """Where the token files of a run's corpus lie."""
    assert run.checkpoint.save is not None, "check.py saw to it"
    level = "sentence" if run.task in SENTENCE_TASKS else "document"
    return Path(run.checkpoint.save) / "corpus" / f"{run.data.corpus}-{run.data.corpus_vocab_size}_text_{level}"


def titles_prefix(prefix: Path) -> Path:
    """Where the titles of a corpus of sentences lie."""
    return prefix.with_name(prefix.name.removesuffix("_text_sentence") + "_title_document")


def tokenizer_folder(prefix: Path) -> Path:
    """Where the tokenizer trained on a corpus lies."""
    return prefix.with_name(prefix.name.rpartition("_text_")[0] + "-tokenizer")


def make_corpus(prefix: Path, vocab_size: int) -> None:
    """Train a byte-level BPE on the text and write the text's tokens; the index, written last, makes it whole."""
    folder = tokenizer_folder(prefix)
    documents = list(standard_library_documents())
    train_byte_bpe(documents, vocab_size, folder)
    tokenizer = load_tokenizer(
        "GPT2BPETokenizer", vocab_file=str(folder / "vocab.json"), merge_file=str(folder / "merges.txt")
    )
    with IndexedWriter(prefix, best_dtype(tokenizer.vocab_size), overwrite=True) as writer:
        for tokens in tokenizer.encode_batch(documents):
            writer.add_document([[*tokens, tokenizer.eod]])


def make_sentences(prefix: Path, vocab_size: int) -> None:
    """Train a WordPiece on the text and write the tokens of titles and sentences; the sentences' index comes last."""
    titles, documents = zip(*titled_documents(code=False), strict=True)
    tokenizer = train_wordpiece(documents, vocab_size, tokenizer_folder(prefix))
    split = [split_sentences(text) for text in documents]
    tokens, lengths = tokenizer.encode_flat([sentence for sentences in split for sentence in sentences])
    dtype = best_dtype(tokenizer.vocab_size)
    with IndexedWriter(titles_prefix(prefix), dtype, overwrite=True) as writer:
        for title in tokenizer.encode_batch(titles):
            writer.add_document([title])
    with IndexedWriter(prefix, dtype, overwrite=True) as writer:
        writer.add_documents(lengths, [len(sentences) for sentences in split], tokens)
