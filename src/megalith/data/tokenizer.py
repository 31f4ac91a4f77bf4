"""Tokenizers: text to token ids and back, the ids that have a role, and what a run records about them.

A tokenizer is a codec (token_codecs.py) made from files (tokenizer_files.py). It keeps the content of these files, so a
run directory carries its own tokenizer, and its digest says whether two tokenizers are the same.
"""

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.data.bpe import byte_symbols
from megalith.data.token_codecs import Codec
from megalith.data.tokenizer_files import (
    END_OF_TEXT,
    Files,
    Parts,
    make_byte_level,
    make_gpt2,
    make_hugging_face,
    make_sentencepiece,
    make_wordpiece,
    parse_json,
    read_file,
)
from megalith.data.wordpiece import CONTINUED, UNKNOWN
from megalith.files import Location, digest_of_bytes, write_whole

# What each kind is made from: the name of each file in a directory of ours, and the setting that names it.
KINDS: dict[str, dict[str, str]] = {
    "GPT2BPETokenizer": {"vocab.json": "vocab_file", "merges.txt": "merge_file"},
    "BertWordPieceLowerCase": {"vocab.txt": "vocab_file"},
    "BertWordPieceCase": {"vocab.txt": "vocab_file"},
    "HuggingFaceTokenizer": {"tokenizer.json": "tokenizer_model"},
    "SentencePieceTokenizer": {"tokenizer.model": "tokenizer_model"},
    "ByteLevelTokenizer": {},
}
BERT_SPECIAL = ("[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]")
MANIFEST = "tokenizer_manifest.json"


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer of one of the KINDS.

    name: its kind. roles: the ids that mean something (eod, cls, sep, pad, mask, bos, eos), as far as it has them.
    extra_ids: the ids of <extra_id_0>, ... files: the content of its files by name. One thread at a time may use it.
    """

    name: str
    codec: Codec = field(repr=False)
    roles: Mapping[str, int]
    extra_ids: tuple[int, ...]
    files: Files = field(repr=False)

    @property
    def vocab_size(self) -> int:
        """The number of ids, before any padding."""
        return self.codec.vocab_size

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        ids: list[int] = self.codec.encode([text])[0].tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """The ids of many texts, much faster than one at a time."""
        ids, lengths = self.codec.encode(texts)
        return np.split(ids, np.cumsum(lengths)[:-1]) if len(texts) else []

    def encode_flat(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The ids of many texts one after the other, and how many each text has."""
        return self.codec.encode(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD. ValueError for an id beyond the vocabulary."""
        known = [int(number) for number in ids]
        for number in known:
            if not 0 <= number < self.vocab_size:
                raise ValueError(
                    f"token {number} cannot be decoded: {self.name} has ids from 0 to {self.vocab_size - 1}"
                )
        return self.codec.decode(known)

    def role(self, name: str) -> int:
        """The id of a role; ValueError where the tokenizer has no such token."""
        if name not in self.roles:
            has = ", ".join(self.roles) or "none"
            raise ValueError(f"{self.name} has no {name} token (it has: {has}); use a tokenizer with one")
        return self.roles[name]

    @property
    def eod(self) -> int:
        """The id that ends a document."""
        return self.role("eod")

    @property
    def cls(self) -> int:
        return self.role("cls")

    @property
    def sep(self) -> int:
        return self.role("sep")

    @property
    def pad(self) -> int:
        return self.role("pad")

    @property
    def mask(self) -> int:
        return self.role("mask")

    @property
    def bos(self) -> int:
        return self.role("bos")

    @property
    def eos(self) -> int:
        return self.role("eos")

    @property
    def digest(self) -> str:
        """SHA-256 in hexadecimal over all that its ids depend on: kind, roles, extra tokens and files."""
        return _digest_of(self._description())

    @property
    def digests(self) -> tuple[str, str]:
        """Its digest, and the one it has without extra tokens, which change no id of a text."""
        plain = {**self._description(), "vocab_extra_ids": 0}
        return self.digest, digest_of_bytes(json.dumps(plain, sort_keys=True))

    def _description(self) -> dict[str, Any]:
        digests = {name: digest_of_bytes(content) for name, content in self.files.items()}
        return _describe(self.name, self.roles, len(self.extra_ids), digests)

    def manifest(self) -> dict[str, Any]:
        """What `rebuild_tokenizer` makes the same tokenizer of, together with its files. Fit for JSON."""
        return {**self._description(), "digest": self.digest}

    def save(self, directory: Location) -> None:
        """Write its files and a manifest, last, into a directory, which is made if need be."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            write_whole(folder / name, content)
        write_whole(folder / MANIFEST, json.dumps(self.manifest(), indent=1) + "\n")


def load_tokenizer(
    kind: str,
    *,
    vocab_file: str | None = None,
    merge_file: str | None = None,
    tokenizer_model: str | None = None,
    vocab_extra_ids: int = 0,
) -> Tokenizer:
    """The tokenizer of a kind, from the files that this kind needs.

    vocab_extra_ids: tokens <extra_id_0>, ... appended to a BERT vocabulary; without effect on other kinds. Raises
    ValueError for an unknown kind, a file that is not given, missing, damaged, or not of one tokenizer with the others.
    """
    if kind not in KINDS:
        raise ValueError(f"tokenizer_type={kind} is not one of {', '.join(KINDS)}")
    given = {"vocab_file": vocab_file, "merge_file": merge_file, "tokenizer_model": tokenizer_model}
    paths: dict[str, str] = {}
    for name, setting in KINDS[kind].items():
        path = given[setting]
        if path is None:
            raise ValueError(f"{kind} needs --{setting.replace('_', '-')}, the path of a {name}")
        paths[name] = path
    if kind == "HuggingFaceTokenizer":
        beside = Path(paths["tokenizer.json"]).with_name("tokenizer_config.json")
        if beside.is_file():
            paths["tokenizer_config.json"] = str(beside)
    files = {name: read_file(path) for name, path in paths.items()}
    parts = _make(kind, files, paths, vocab_extra_ids)
    carried = {name: content for name, content in files.items() if name in KINDS[kind]}
    return Tokenizer(kind, parts.codec, parts.roles, parts.extra_ids, carried)


def load_saved_tokenizer(directory: Location) -> Tokenizer:
    """The tokenizer that `save` wrote into a directory; ValueError where its files are not those that were written."""
    folder = Path(directory)
    path = folder / MANIFEST
    manifest = parse_json(read_file(path), str(path))
    try:
        names = list(KINDS[manifest["tokenizer_type"]])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a tokenizer's manifest, found something else ({error!r})") from error
    return rebuild_tokenizer(manifest, {name: read_file(folder / name) for name in names}, origin=str(folder))


def rebuild_tokenizer(manifest: Mapping[str, Any], files: Files, *, origin: str) -> Tokenizer:
    """The tokenizer of a manifest and the files it names; origin: where they come from, for errors.

    Raises ValueError for a file whose content is not what the manifest records.
    """
    try:
        kind, expected = manifest["tokenizer_type"], dict(manifest["files"])
        roles = {str(role): int(number) for role, number in dict(manifest["roles"]).items()}
        num_extra, digest = int(manifest["vocab_extra_ids"]), str(manifest["digest"])
        recorded = {name: str(expected[name]) for name in KINDS[kind]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{origin}: expected a tokenizer's manifest, found something else ({error!r})") from error
    for name, wanted in recorded.items():
        found = digest_of_bytes(files[name])
        if found != wanted:
            raise ValueError(
                f"{origin}/{name}: expected the content that was saved (SHA-256 {wanted:.12}...), found other content "
                f"({found:.12}...); the file was changed or damaged"
            )
    # Before anything is made by what the manifest says: a changed number may ask for any amount of memory.
    described = _digest_of(_describe(kind, roles, num_extra, recorded))
    if described != digest:
        raise ValueError(f"{origin}: expected a tokenizer with the digest {digest:.64}, found {described}")
    parts = _make(kind, files, {name: f"{origin}/{name}" for name in files}, num_extra)
    tokenizer = Tokenizer(kind, parts.codec, roles, parts.extra_ids, dict(files))
    if tokenizer.digest != digest:
        raise ValueError(f"{origin}: expected a tokenizer with the digest {digest:.64}, found {tokenizer.digest}")
    return tokenizer


def _describe(kind: str, roles: Mapping[str, int], num_extra: int, digests: Mapping[str, str]) -> dict[str, Any]:
    """All that a tokenizer's ids depend on; digests: of its files by name."""
    return {"tokenizer_type": kind, "roles": dict(roles), "vocab_extra_ids": num_extra, "files": dict(digests)}


def _digest_of(description: Mapping[str, Any]) -> str:
    return digest_of_bytes(json.dumps(description, sort_keys=True))


def _make(kind: str, files: Files, names: Mapping[str, str], num_extra: int) -> Parts:
    if kind == "GPT2BPETokenizer":
        return make_gpt2(files, names)
    if kind.startswith("BertWordPiece"):
        return make_wordpiece(files, names, lower_case=kind == "BertWordPieceLowerCase", num_extra=num_extra)
    if kind == "HuggingFaceTokenizer":
        return make_hugging_face(files, names)
    return make_sentencepiece(files, names) if kind == "SentencePieceTokenizer" else make_byte_level()


def padded_vocab_size(size: int, multiple: int, tensor_parallel: int) -> int:
    """The vocabulary size raised to the next multiple of multiple * tensor_parallel, so that it divides evenly."""
    step = multiple * tensor_parallel
    return -(-size // step) * step


class TextStream:
    """The text of tokens that come one at a time; a character is given out once all its bytes are there.

    The parts given out, joined, are what `Tokenizer.decode` makes of all the tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._shown: list[int] = []  # the tokens given out last: how the next ones look may depend on them
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that one more token completes; empty while a character is not whole."""
        self._held.append(token)
        text = self._new_text()
        if text.endswith("\ufffd"):
            return ""
        self._shown, self._held = self._held, []
        return text

    def finish(self) -> str:
        """The text of what is still held back."""
        text = self._new_text()
        self._shown, self._held = [], []
        return text

    def _new_text(self) -> str:
        before = self._decode(self._shown)
        return self._decode(self._shown + self._held)[len(before) :]


def train_wordpiece(texts: Sequence[str], vocab_size: int, directory: Location) -> Tokenizer:
    """Train a lower-case WordPiece on texts, write vocab.txt into a directory, and give its tokenizer.

    vocab_size counts BERT's special tokens, which come first; a small text may give fewer tokens. [BOS] and [EOS] are
    added by whatever reads the file. The same texts give the same file.
    """
    from tokenizers import Tokenizer as LibraryTokenizer
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    letters = {letter for text in texts for letter in unicodedata.normalize("NFD", text.lower()) if letter.isalnum()}
    # The library numbers pieces of one letter as it meets them in a table with a random order, and breaks ties of
    # longer ones by these numbers; given beforehand they are the same every time.
    given = [*BERT_SPECIAL, *sorted(CONTINUED + letter for letter in letters)]
    if vocab_size <= len(given):
        raise ValueError(f"vocab_size={vocab_size} must be above {len(given)}: special tokens and single letters")
    tokenizer = LibraryTokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=given, continuing_subword_prefix=CONTINUED, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.__getitem__))
    write_whole(folder / "vocab.txt", lines)
    return load_tokenizer("BertWordPieceLowerCase", vocab_file=str(folder / "vocab.txt"))


def train_byte_bpe(texts: Iterable[str], vocab_size: int, directory: Location) -> Tokenizer:
    """Train a GPT-2 style BPE on texts, write vocab.json and merges.txt into a directory, and give its tokenizer.

    vocab_size counts <|endoftext|>, the last id; a small text may give fewer tokens. The same texts give
    the same files.
    """
    from tokenizers import Tokenizer as LibraryTokenizer
    from tokenizers import models, pre_tokenizers, trainers

    smallest = len(byte_symbols()) + 1
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} must be at least {smallest}: the 256 bytes and {END_OF_TEXT}")
    tokenizer = LibraryTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=byte_symbols(), show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    # The order of GPT-2's own vocabulary: the bytes, what the merges make, the special token.
    tokens = dict.fromkeys([*sorted(byte_symbols()), *(a + b for a, b in merges), END_OF_TEXT])
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = json.dumps({token: number for number, token in enumerate(tokens)}, ensure_ascii=False)
    write_whole(folder / "vocab.json", vocabulary + "\n")
    write_whole(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return load_tokenizer(
        "GPT2BPETokenizer", vocab_file=str(folder / "vocab.json"), merge_file=str(folder / "merges.txt")
    )
