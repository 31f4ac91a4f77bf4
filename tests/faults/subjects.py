"""The kinds of files whose damage is tried: token files, index maps, a checkpoint's index, tokenizers."""

import os
import shutil
from pathlib import Path
from typing import Any

# Its threads would not outlive a fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import sentencepiece
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models, pre_tokenizers, trainers

from megalith import __version__
from megalith.checkpoint.directory import step_name
from megalith.checkpoint.index import INDEX_NAME, LAST_LINE_LENGTH
from megalith.checkpoint.verify import verify
from megalith.data import record
from megalith.data.index_cache import ARRAYS, load_or_build_index_maps
from megalith.data.index_maps import IndexMaps
from megalith.data.indexed import open_indexed
from megalith.data.inspect import inspect
from megalith.data.tokenizer import KINDS, Tokenizer, load_saved_tokenizer, load_tokenizer, train_byte_bpe
from megalith.files import digest_of_bytes
from tests.faults.bad_files import ChangedError
from tests.faults.judge import Kind
from tests.faults.twin import Twin
from tests.layouts.runs import write_data

LENGTHS = np.random.RandomState(5).randint(1, 30, 50).astype(np.int32)


class Maps:
    """Index maps and the record beside them; what does not fit is built anew."""

    name = "index maps"

    def make(self, folder: Path) -> list[str]:
        # Copies, for the files below the maps are to change.
        maps, _ = _maps_of(folder)
        self._wanted = {name: np.array(getattr(maps, name)) for name in ARRAYS}
        return sorted(path.name for path in folder.iterdir())

    def read(self, folder: Path) -> Kind:
        maps, rebuilt = _maps_of(folder)
        for name in ARRAYS:
            if not np.array_equal(getattr(maps, name), self._wanted[name]):
                raise ChangedError(name)
        return "recovered" if rebuilt else "finished-identical"


def _maps_of(folder: Path) -> tuple[IndexMaps, bool]:
    maps, report = load_or_build_index_maps(
        folder / "data",
        "train",
        documents=range(40),
        lengths=LENGTHS,
        num_samples=60,
        sequence_length=16,
        seed=7,
    )
    return maps, bool(report.rebuilt_because)


class TokenFiles:
    """A token file and its record. whole: read as `megalith verify` does, every byte; else as a start does.

    A start does not read all tokens: of the .bin it only looks at the size.
    """

    def __init__(self, *, whole: bool) -> None:
        self._whole = whole
        self.name = f"token file, {'verified' if whole else 'at a start'}"

    def make(self, folder: Path) -> list[str]:
        prefix = write_data(folder)
        tokenizer = load_tokenizer("ByteLevelTokenizer")
        described = {"type": tokenizer.name, "vocab_size": tokenizer.vocab_size, "digest": tokenizer.digest}
        record.write_record(prefix, {"megalith": __version__, "tokenizer": described}, largest_token=256)
        self._wanted = _token_file(prefix)
        return [
            f"{prefix.name}{suffix}" for suffix in ((".bin", ".idx", ".json") if self._whole else (".idx", ".json"))
        ]

    def read(self, folder: Path) -> Kind:
        prefix = folder / "bytes_document"
        if self._whole:
            if faults := inspect(prefix).faults:
                raise ValueError("\n".join(faults))
        else:
            record.identify(prefix, record.read_record(prefix), vocab_size=257)
        found = _token_file(prefix)
        for name, wanted in self._wanted.items():
            if not np.array_equal(found[name], wanted):
                raise ChangedError(name)
        return "finished-identical"


def _token_file(prefix: Path) -> dict[str, Any]:
    """Copies of everything in a token file."""
    indexed = open_indexed(prefix)
    return {name: np.array(getattr(indexed, name)) for name in ("lengths", "offsets", "document_index", "tokens")}


class CheckpointIndex:
    """A checkpoint's index.json. signed: what is changed gets a fitting digest, as a fault in our writer would."""

    def __init__(self, twin: Twin, *, signed: bool = False) -> None:
        self._path = twin.folder / "all" / "checkpoints" / step_name(twin.scenario.last_step)
        self._signed = signed
        self.name = f"{'digested ' if signed else ''}index.json of {twin.scenario.name}"

    def make(self, folder: Path) -> list[str]:
        shutil.copytree(self._path, folder / self._path.name)
        self._wanted = verify(self._path)
        return [f"{self._path.name}/{INDEX_NAME}"]

    def read(self, folder: Path) -> Kind:
        path = folder / self._path.name
        if self._signed:
            body = (path / INDEX_NAME).read_bytes()[:-LAST_LINE_LENGTH]
            (path / INDEX_NAME).write_bytes(body + f'"sha256":"{digest_of_bytes(body)}"\n}}\n'.encode())
        found = verify(path)
        # What the run goes on from beside the tensors is only as good as the digest.
        same = (found.files, found.tensors) == (self._wanted.files, self._wanted.tensors)
        if not same or (not self._signed and found != self._wanted):
            raise ChangedError(INDEX_NAME)
        return "finished-identical"


TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "Mega-lith: ünïcödé, 123, 漢字",
    " a  b\n\tc",
    "undoing remakes",
]
WORDS = [f"{a}{b}{c}" for a in ("un", "re", "in") for b in ("do", "make", "form") for c in ("ing", "able", "s", "")]


class Tokenizers:
    """The files of one kind of tokenizer. saved: as a run directory carries them, with a manifest of digests."""

    def __init__(self, kind: str, *, saved: bool) -> None:
        self._kind, self._saved = kind, saved
        self.name = f"{'saved ' if saved else ''}{kind}"

    def make(self, folder: Path) -> list[str]:
        _write_tokenizer(self._kind, folder)
        tokenizer = self._load(folder)
        self._digest, self._ids = tokenizer.digest, tokenizer.encode_batch(TEXTS)
        if not self._saved:
            return list(KINDS[self._kind])
        tokenizer.save(folder / "tokenizer")
        return sorted(f"tokenizer/{path.name}" for path in (folder / "tokenizer").iterdir())

    def _load(self, folder: Path) -> Tokenizer:
        paths = {setting: str(folder / name) for name, setting in KINDS[self._kind].items()}
        return load_tokenizer(
            self._kind,
            vocab_file=paths.get("vocab_file"),
            merge_file=paths.get("merge_file"),
            tokenizer_model=paths.get("tokenizer_model"),
        )

    def read(self, folder: Path) -> Kind:
        tokenizer = load_saved_tokenizer(folder / "tokenizer") if self._saved else self._load(folder)
        ids = tokenizer.encode_batch(TEXTS)
        for row in ids:
            tokenizer.decode(row)
        if tokenizer.digest != self._digest:
            # Another tokenizer, and known to be one: a run that has the first does not go on with it.
            if self._saved:
                raise ChangedError("its digest")
            return "recovered"
        if any(not np.array_equal(row, wanted) for row, wanted in zip(ids, self._ids, strict=True)):
            raise ChangedError("ids")
        return "finished-identical"


def _write_tokenizer(kind: str, folder: Path) -> None:
    """The source files of a small tokenizer."""
    if kind == "GPT2BPETokenizer":
        train_byte_bpe(TEXTS * 5, 300, folder)
    elif kind == "BertWordPieceCase":
        tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({*" ".join(TEXTS).split(), *WORDS})]
        (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    elif kind == "HuggingFaceTokenizer":
        library = LibraryTokenizer(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], show_progress=False)
        library.train_from_iterator(TEXTS * 5, trainer)
        library.save(str(folder / "tokenizer.json"))
    else:
        with open(folder / "tokenizer.model", "wb") as model:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter([f"{a} {b}" for a in WORDS for b in WORDS]),
                model_writer=model,
                vocab_size=60,
                model_type="bpe",
                minloglevel=2,
            )
