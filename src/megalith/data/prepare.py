"""Text files to the token files that training reads, as `megalith preprocess` makes them.

One pass: a process cuts the input into blocks, workers tokenize them, the tokens are written in the order of the input.
So memory stays bounded, and the files are the same bytes whatever the number of workers. They get their names when all
is done, and last of all PREFIX_KEY_document.json, which says what they were made from and what their digests are.
"""

import errno
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalith import __version__
from megalith.data.blocks import TEXT_DOCUMENTS, Block, DocumentRules, read_blocks
from megalith.data.documents import NO_JSON, NO_UTF8
from megalith.data.indexed import IndexedWriter, best_dtype, bin_path, idx_path
from megalith.data.input_files import COMPRESSIONS, FORMATS, SUFFIXES, Source, find_sources
from megalith.data.prepare_progress import Amount, Progress, open_progress
from megalith.data.record import record_path, write_record
from megalith.data.tokenized import TokenizedBlock, TokenRules, tokenize_block
from megalith.data.tokenizer import KINDS, Tokenizer, load_tokenizer
from megalith.data.worker_pool import WorkerPool
from megalith.fields import setting
from megalith.files import Written, name_at_the_end
from megalith.terminal import counted

MOST_FAULTS_SHOWN = 10

# How text is cut into more documents than it was, by --text-documents.
CUT_MORE = {
    "file": "plain text with --text-documents paragraph",
    "paragraph": "plain text with --text-documents line",
    "line": "plain text into lines",
}

# What helps where an output file cannot be written, by the system's number for why not.
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room there, or choose a place that has more"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a directory that you may write to"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "choose a prefix whose directory is not a file"),
    errno.ENAMETOOLONG: "choose a shorter prefix",
}


@dataclass(frozen=True)
class PrepareConfig:
    """What to read, how to tokenize it and where to write."""

    input: tuple[str, ...] = setting(
        (),
        "JSON lines, text or parquet files, plain, .gz or .zst; patterns like 'data/*.jsonl'; - is standard input",
        section="input data",
        repeat="+",
    )
    json_keys: tuple[str, ...] = setting(
        ("text",), "fields or columns to take text from; each gives files of its own", section="input data", repeat="+"
    )
    input_format: str = setting(
        "auto",
        "what the files hold; auto: by their names, where these do not tell JSON lines, or text beside a "
        "--text-documents that is not file",
        section="input data",
        choices=("auto", *FORMATS),
    )
    text_documents: str = setting(
        "file",
        "what one document of plain text is: the file, a paragraph (between blank lines) or a line",
        section="input data",
        choices=TEXT_DOCUMENTS,
    )
    split_sentences: bool = setting(False, "make an item of every sentence", section="input data", switch="on")
    keep_newlines: bool = setting(
        False, "keep the white space after each sentence when splitting", section="input data", switch="on"
    )
    skip_bad: bool = setting(
        False, "skip and count documents that cannot be used; else stop at the first", section="input data", switch="on"
    )
    max_document_mb: int = setting(
        256,
        "longest document that is accepted; it may take nine times as much memory",
        section="input data",
        unit="MiB",
    )
    tokenizer_type: str | None = setting(None, "kind of tokenizer", section="tokenizer", choices=tuple(KINDS))
    vocab_file: str | None = setting(None, "vocab.json of GPT-2, vocab.txt of BERT", section="tokenizer")
    merge_file: str | None = setting(None, "merges.txt of GPT-2", section="tokenizer")
    tokenizer_model: str | None = setting(None, "tokenizer.json or SentencePiece model", section="tokenizer")
    append_eod: bool = setting(
        False, "end every document with the end-of-document token", section="tokenizer", switch="on"
    )
    output_prefix: str | None = setting(
        None, "where to write: PREFIX_KEY_document.bin and .idx, or _sentence", section="output data"
    )
    dataset_impl: str = setting(
        "mmap", "format of the token files", section="output data", choices=("lazy", "cached", "mmap")
    )
    overwrite: bool = setting(False, "replace token files that exist already", section="output data", switch="on")
    workers: int | None = setting(
        None, "processes that tokenize; as many as there are cores unless given", section="runtime", unit="processes"
    )
    log_interval: int = setting(100, "documents between progress lines", section="runtime", unit="documents")

    @property
    def nameless_format(self) -> str:
        """What an input holds whose name does not tell: text where documents of text are spoken of."""
        return "jsonl" if self.text_documents == "file" else "text"


@dataclass(frozen=True)
class PreparedSet:
    """One pair of token files. prefix: their path without .bin and .idx."""

    key: str
    prefix: Path
    documents: int
    sentences: int
    tokens: int


@dataclass(frozen=True)
class PrepareReport:
    """What was made of the input. skipped: documents that could not be used; faults: the first of them.

    text_documents: what a document of plain text was.
    """

    sets: tuple[PreparedSet, ...]
    documents: int
    skipped: int
    faults: tuple[str, ...]
    num_bytes: int
    seconds: float
    text_documents: str

    def lines(self) -> Iterator[str]:
        """The report for people."""
        rate = self.num_bytes / max(self.seconds, 1e-9) / 1e6
        taken = f"{self.num_bytes:,} bytes in {self.seconds:.1f} s ({rate:.1f} MB/s)"
        yield f"{counted(self.documents, 'document')}, {taken}"
        for made in self.sets:
            left_out = self.documents - made.documents
            lacking = "without tokens" if len(self.sets) == 1 else "that have not a token under each key"
            note = f"; {counted(left_out, 'document')} {lacking} left out" if left_out else ""
            items = f"{counted(made.sentences, 'sentence')}, " if made.sentences != made.documents else ""
            held = f"{counted(made.documents, 'document')}, {items}{counted(made.tokens, 'token')}"
            yield f"{made.prefix}: {held}{note}"
        if self.skipped:
            yield f"skipped {counted(self.skipped, 'document')} that cannot be used (--skip-bad), the first of them:"
            yield from (f"  {fault}" for fault in self.faults)
        if any(made.documents == 1 for made in self.sets):
            yield (
                "all text is one document, and documents are what a split divides; for validation data prepare a "
                "second file (pretrain takes it as --valid-data-path), or cut the text: into several JSON objects, or "
                f"{CUT_MORE[self.text_documents]}"
            )


def check_config(config: PrepareConfig) -> list[str]:
    """Everything that is wrong with the settings themselves, one sentence each."""
    faults: list[str] = []
    if not config.output_prefix:
        faults.append("--output-prefix is needed: where to write, as in --output-prefix data/my-corpus")
    if config.tokenizer_type is None:
        faults.append(f"--tokenizer-type is needed: one of {', '.join(KINDS)}")
    if config.dataset_impl != "mmap":
        faults.append(
            f"--dataset-impl {config.dataset_impl} is an old format that is read but not written any more; use mmap"
        )
    for name, least in (("workers", 1), ("log_interval", 1), ("max_document_mb", 1)):
        value = getattr(config, name)
        if value is not None and value < least:
            faults.append(f"--{name.replace('_', '-')} {value} must be at least {least}")
    if config.keep_newlines and not config.split_sentences:
        faults.append("--keep-newlines has a meaning only with --split-sentences; add that or leave it out")
    if not config.json_keys or len(set(config.json_keys)) < len(config.json_keys):
        faults.append(f"--json-keys {' '.join(config.json_keys)} must name at least one key and none twice")
    faults += [
        f"--json-keys {key!r} cannot be part of a file name; rename the field"
        for key in config.json_keys
        if not key or "/" in key or "\0" in key
    ]
    return faults


def prepare(config: PrepareConfig, *, quiet: bool = False) -> PrepareReport:
    """Write the token files that the settings ask for; quiet: print nothing.

    Raises ValueError for wrong settings (all at once), for input that cannot be used (naming file, line and byte
    offset), and where nothing is left to write; ChildProcessError if a worker dies. Then no token file is there.
    """
    begin = time.monotonic()
    sources, tokenizer = _check_all(config)
    if config.tokenizer_type in ("BertWordPieceLowerCase", "BertWordPieceCase") and not (
        config.split_sentences or quiet
    ):
        print("note: BERT is trained on sentences; --split-sentences makes an item of each", file=sys.stderr)
    rules = TokenRules(
        documents=DocumentRules(config.json_keys, config.text_documents, config.max_document_mb << 20),
        append_eod=config.append_eod,
        split_sentences=config.split_sentences,
        keep_newlines=config.keep_newlines,
        skip_bad=config.skip_bad,
        dtype=str(best_dtype(tokenizer.vocab_size)),
    )
    prefixes = prefixes_of(config)
    seen: dict[str, Written] = {}
    with ExitStack() as stack:
        stack.enter_context(_faults_of_output(config))
        prefixes[0].parent.mkdir(parents=True, exist_ok=True)
        writers = [
            stack.enter_context(IndexedWriter(prefix, rules.dtype, overwrite=config.overwrite)) for prefix in prefixes
        ]
        progress = stack.enter_context(open_progress(config.log_interval, quiet=quiet))
        blocks = read_blocks(sources, rules.documents, seen=seen)
        results = _tokenize(blocks, rules, tokenizer, config.workers or _num_cores(), stack)
        amount, skipped, faults = _write(results, writers, progress, sources, config)
        for key, writer in zip(config.json_keys, writers, strict=True):
            if not writer.num_documents:
                bad = f" ({skipped} documents were skipped)" if skipped else ""
                raise ValueError(f"no document of the input has a token under the key {key!r}{bad}; nothing is written")
        # From here on the files change; what described the old ones must not outlive them.
        for prefix in prefixes:
            record_path(prefix).unlink(missing_ok=True)
    sets = tuple(
        PreparedSet(key, prefix, writer.num_documents, writer.num_items, writer.num_tokens)
        for key, prefix, writer in zip(config.json_keys, prefixes, writers, strict=True)
    )
    with _faults_of_output(config):
        for made, writer in zip(sets, writers, strict=True):
            content = _described(made, rules, tokenizer, seen, skipped)
            write_record(made.prefix, content, largest_token=writer.largest_token)
    return PrepareReport(
        sets,
        amount.documents,
        skipped,
        faults,
        amount.num_bytes,
        time.monotonic() - begin,
        config.text_documents,
    )


def prefixes_of(config: PrepareConfig) -> list[Path]:
    """The paths of the token files without .bin and .idx, one for each key."""
    level = "sentence" if config.split_sentences else "document"
    return [Path(f"{config.output_prefix}_{key}_{level}") for key in config.json_keys]


@contextmanager
def _faults_of_output(config: PrepareConfig) -> Iterator[None]:
    """What the system says of the files that are written becomes a sentence about --output-prefix, a ValueError."""
    try:
        yield
    except OSError as error:
        folder = prefixes_of(config)[0].parent
        path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes | Path) else None
        if path is None or not (path.parent == folder or folder.is_relative_to(path)):
            raise
        remedy, written = REMEDIES.get(error.errno or 0, "choose another place"), name_at_the_end(path)
        raise ValueError(
            f"--output-prefix {config.output_prefix}: {written} cannot be written ({error.strerror}); {remedy}"
        ) from error


def _check_all(config: PrepareConfig) -> tuple[list[Source], Tokenizer]:
    """The input files and the tokenizer; ValueError with everything that is wrong."""
    faults = check_config(config)
    if config.output_prefix and not config.overwrite:
        faults += [
            f"--output-prefix {config.output_prefix}: {existing[0]} exists already; replace it with --overwrite, or "
            "choose another prefix"
            for prefix in prefixes_of(config)
            if (existing := [path for path in (bin_path(prefix), idx_path(prefix)) if os.path.exists(path)])
        ]
    sources: list[Source] = []
    tokenizer: Tokenizer | None = None
    try:
        sources = find_sources(config.input, config.input_format, otherwise=config.nameless_format)
    except ValueError as error:
        faults.append(str(error))
    if len(config.json_keys) > 1:
        faults += [
            f"--input {source.name}: plain text has one field, but --json-keys names {len(config.json_keys)}"
            for source in sources
            if source.format == "text"
        ]
    if config.tokenizer_type is not None:
        try:
            tokenizer = load_tokenizer(
                config.tokenizer_type,
                vocab_file=config.vocab_file,
                merge_file=config.merge_file,
                tokenizer_model=config.tokenizer_model,
            )
            if config.append_eod and "eod" not in tokenizer.roles:
                faults.append(f"--append-eod: {tokenizer.name} has no token that ends a document; leave it out")
        except ValueError as error:
            faults.append(str(error))
    if faults or tokenizer is None:
        raise ValueError("\n".join(faults))
    return sources, tokenizer


def _tokenize(
    blocks: Iterator[Block], rules: TokenRules, tokenizer: Tokenizer, num_workers: int, stack: ExitStack
) -> Iterator[TokenizedBlock]:
    """The tokens of the blocks in their order; a pool of workers is left to the stack to close."""
    if num_workers == 1:
        return (tokenize_block(block, rules, tokenizer) for block in blocks)
    return stack.enter_context(WorkerPool(num_workers, rules, tokenizer)).tokenize(blocks)


def _write(
    results: Iterable[TokenizedBlock],
    writers: Sequence[IndexedWriter],
    progress: Progress,
    sources: Sequence[Source],
    config: PrepareConfig,
) -> tuple[Amount, int, tuple[str, ...]]:
    """Write all results; give how much it was, the number of documents skipped, and the first faults."""
    total = None if any(source.size is None for source in sources) else sum(source.size or 0 for source in sources)
    amount, skipped, faults = Amount(num_total=total), 0, list[str]()
    for result in results:
        if result.faults and not config.skip_bad:
            fault = result.faults[0]
            may_be_text = config.input_format == "auto" and fault.reason.startswith(NO_JSON)
            if may_be_text and not _tells_format(fault.source):
                raise ValueError(f"{fault}; if this is plain text, say so with --input-format text")
            other = ", convert the file (iconv -f LATIN1 -t UTF-8)" if fault.reason.startswith(NO_UTF8) else ""
            raise ValueError(f"{fault}; correct it{other}, or leave such documents out with --skip-bad")
        skipped += result.num_bad
        faults += [str(fault) for fault in result.faults][: MOST_FAULTS_SHOWN - len(faults)]
        for writer, made in zip(writers, result.keys, strict=True):
            writer.add_documents(made.lengths, made.items, made.tokens)
        amount = Amount(
            amount.documents + result.num_documents,
            amount.tokens + sum(len(made.tokens) for made in result.keys),
            amount.num_bytes + result.num_bytes,
            result.num_read,
            total,
        )
        progress.show(amount)
    return amount, skipped, tuple(faults)


def _tells_format(name: str) -> bool:
    """Whether an input's name says what it holds, so that it is not just taken for JSON lines."""
    path = Path(name.lower())
    return (path.with_suffix("") if path.suffix in COMPRESSIONS else path).suffix in SUFFIXES


def _described(
    made: PreparedSet, rules: TokenRules, tokenizer: Tokenizer, seen: Mapping[str, Written], skipped: int
) -> dict[str, Any]:
    """What the record of a token file says beside what the files themselves are."""
    return {
        "megalith": __version__,
        "tokenizer": {"type": tokenizer.name, "vocab_size": tokenizer.vocab_size, "digest": tokenizer.digest},
        "eod": tokenizer.eod if rules.append_eod else None,
        "split_sentences": rules.split_sentences,
        "keep_newlines": rules.keep_newlines,
        "documents": made.documents,
        "sentences": made.sentences,
        "tokens": made.tokens,
        "skipped_documents": skipped,
        "sources": [{"name": name, "size": source.size, "sha256": source.digest} for name, source in seen.items()],
    }


def _num_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
