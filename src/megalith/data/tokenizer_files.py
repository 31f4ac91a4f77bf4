"""Reading the files that make a tokenizer. A fault is a ValueError that names the file, what was expected and found."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalith.data.bpe import byte_symbols
from megalith.data.token_codecs import (
    ByteCodec,
    BytePairCodec,
    Codec,
    HuggingFaceCodec,
    LibraryFaults,
    SentencePieceCodec,
    WordPieceCodec,
)
from megalith.data.wordpiece import UNKNOWN

LARGEST_FILE = 1 << 28  # bytes; no vocabulary comes near it
MOST_UNREACHABLE = 256  # tokens that no merge makes; room for special ones
END_OF_TEXT = "<|endoftext|>"
BERT_ROLES = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]", "bos": "[BOS]", "eos": "[EOS]"}
# What widely used tokenizers call the token that ends a text, where no tokenizer_config.json says so (GPT-2's own names
# no token).
USUAL_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|end▁of▁sentence|>")
CONFIG_ROLES = {
    "eod": "eos_token",
    "bos": "bos_token",
    "eos": "eos_token",
    "cls": "cls_token",
    "sep": "sep_token",
    "pad": "pad_token",
    "mask": "mask_token",
}

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Parts:
    """What a tokenizer is made of: codec, ids by role, ids of the extra tokens."""

    codec: Codec
    roles: Mapping[str, int]
    extra_ids: tuple[int, ...] = ()


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The content of a regular file that is not empty and not absurdly large."""
    file = Path(path)
    if not file.exists():
        raise ValueError(f"{file}: expected a tokenizer's file, found nothing there")
    if not file.is_file():
        raise ValueError(f"{file}: expected a regular file, found {'a directory' if file.is_dir() else 'a device'}")
    size = file.stat().st_size
    if not 0 < size <= LARGEST_FILE:
        raise ValueError(f"{file}: expected 1 to {LARGEST_FILE} bytes, found {size}")
    return file.read_bytes()


def make_gpt2(files: Files, names: Mapping[str, str]) -> Parts:
    """GPT-2's BPE from vocab.json and merges.txt. names: what to call each file in an error."""
    vocabulary = _read_vocabulary_json(files["vocab.json"], names["vocab.json"])
    merges = _read_merges(files["merges.txt"], names["merges.txt"])
    _check_match(vocabulary, merges, names)
    roles = {"eod": vocabulary[END_OF_TEXT]} if END_OF_TEXT in vocabulary else {}
    return Parts(BytePairCodec(vocabulary, merges), roles)


def _read_vocabulary_json(content: bytes, name: str) -> dict[str, int]:
    vocabulary = parse_json(content, name)
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise ValueError(f"{name}: expected a JSON object of tokens and ids, found {_kind(vocabulary)}")
    holder: dict[int, str] = {}
    for token, number in vocabulary.items():
        if type(number) is not int or not 0 <= number < len(vocabulary):
            raise ValueError(
                f"{name}: expected ids from 0 to {len(vocabulary) - 1} (there are {len(vocabulary)} tokens), "
                f"found {number!r:.40} for {token!r:.60}"
            )
        if number in holder:
            raise ValueError(f"{name}: expected one token per id, found {holder[number]!r} and {token!r} with {number}")
        holder[number] = token
    return vocabulary


def _read_merges(content: bytes, name: str) -> list[tuple[str, str]]:
    """The pairs in the order of their ranks. The first line, and what follows the last newline, is no pair."""
    lines = _decode(content, name).split("\n")[1:-1]
    if not lines:
        raise ValueError(f"{name}: expected a version line and pairs of tokens, found no complete second line")
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 2):
        pair = line.split()
        if len(pair) != 2:
            raise ValueError(f"{name}, line {number}: expected two tokens with a blank between, found {line!r:.80}")
        merges.append((pair[0], pair[1]))
    return merges


def _check_match(vocabulary: Mapping[str, int], merges: list[tuple[str, str]], names: Mapping[str, str]) -> None:
    made = set(byte_symbols())
    for number, (a, b) in enumerate(merges, 2):
        if a + b not in vocabulary:
            raise ValueError(
                f"{names['merges.txt']}, line {number}: expected a merge into a token of {names['vocab.json']}, found "
                f"{a + b!r:.80}, which it lacks; the two files are not of one tokenizer"
            )
        made.add(a + b)
    unreachable = [token for token in vocabulary if token not in made]
    if len(unreachable) > MOST_UNREACHABLE:
        raise ValueError(
            f"{names['merges.txt']}: expected merges for nearly all tokens of {names['vocab.json']}, found none for "
            f"{len(unreachable)} of {len(vocabulary)}, among them {unreachable[-1]!r:.60}; it is cut off or of another "
            "tokenizer"
        )


def make_wordpiece(files: Files, names: Mapping[str, str], *, lower_case: bool, num_extra: int) -> Parts:
    """BERT's WordPiece from vocab.txt: one token per line, the id is the line's number from 0.

    [BOS] and [EOS] are appended if they are not there, then <extra_id_0> and so on.
    """
    name = names["vocab.txt"]
    lines = _decode(files["vocab.txt"], name).split("\n")
    if lines[-1] == "":
        lines.pop()
    vocabulary: dict[str, int] = {}
    for number, line in enumerate(lines):
        token = line.strip()
        if token in vocabulary or not token:
            found = f"{token!r} again (line {vocabulary[token] + 1})" if token else "an empty line"
            raise ValueError(f"{name}, line {number + 1}: expected one new token, found {found}")
        vocabulary[token] = number
    if UNKNOWN not in vocabulary:
        raise ValueError(f"{name}: expected {UNKNOWN} among its {len(vocabulary)} tokens, found none")
    extra = [f"<extra_id_{number}>" for number in range(num_extra)]
    for token in ("[BOS]", "[EOS]", *extra):
        vocabulary.setdefault(token, len(vocabulary))
    roles = {role: vocabulary[token] for role, token in BERT_ROLES.items() if token in vocabulary}
    codec = WordPieceCodec(vocabulary, lower_case=lower_case)
    return Parts(codec, roles, tuple(vocabulary[token] for token in extra))


def make_hugging_face(files: Files, names: Mapping[str, str]) -> Parts:
    """Any tokenizer.json; the roles of its tokens from the tokenizer_config.json beside it, if there is one.

    Where that has no entry for the token that ends a text it is the one of the usual names.
    """
    from tokenizers import Tokenizer as LibraryTokenizer

    name = names["tokenizer.json"]
    described = parse_json(files["tokenizer.json"], name)
    if not isinstance(described, dict) or not isinstance(described.get("model"), dict):
        raise ValueError(f'{name}: expected an object with "model", found {_kind(described)} without')
    with LibraryFaults(name, "a tokenizer that the tokenizers library can read"):
        tokenizer = LibraryTokenizer.from_str(_decode(files["tokenizer.json"], name))
        codec = HuggingFaceCodec(tokenizer)
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    extra = _sentinels(vocabulary)
    config: Any = {}
    if "tokenizer_config.json" in files:
        config = parse_json(files["tokenizer_config.json"], names["tokenizer_config.json"])
        if not isinstance(config, dict):
            raise ValueError(f"{names['tokenizer_config.json']}: expected an object, found {_kind(config)}")
    said = {role: _token_of(config[key]) for role, key in CONFIG_ROLES.items() if key in config}
    if "eos_token" not in config:
        said |= dict.fromkeys(("eod", "eos"), next(filter(vocabulary.__contains__, USUAL_ENDS), None))
    return Parts(codec, {role: vocabulary[token] for role, token in said.items() if token in vocabulary}, extra)


def _sentinels(vocabulary: Mapping[str, int]) -> tuple[int, ...]:
    """The ids of <extra_id_0>, <extra_id_1> and so on, as far as they go."""
    found: list[int] = []
    while (number := vocabulary.get(f"<extra_id_{len(found)}>")) is not None:
        found.append(number)
    return tuple(found)


def make_sentencepiece(files: Files, names: Mapping[str, str]) -> Parts:
    """A SentencePiece model; the token that ends a document is its </s>."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ValueError(
            "SentencePieceTokenizer needs the package sentencepiece, which is not installed; "
            "pip install 'megalith[data]' brings it"
        ) from error
    name = names["tokenizer.model"]
    try:
        processor = SentencePieceProcessor(model_proto=files["tokenizer.model"])
    except RuntimeError as error:
        raise ValueError(f"{name}: expected a SentencePiece model, found something else ({error})") from error
    ids = {"bos": processor.bos_id(), "eos": processor.eos_id(), "eod": processor.eos_id(), "pad": processor.pad_id()}
    return Parts(SentencePieceCodec(processor), {role: number for role, number in ids.items() if number >= 0})


def make_byte_level() -> Parts:
    """The 256 bytes and a token that ends a document; needs no file."""
    return Parts(ByteCodec(), {"eod": ByteCodec.end_of_document})


def _token_of(entry: Any) -> str | None:
    """The text of a token in tokenizer_config.json, where it stands as such or as an object."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) else None


def _decode(content: bytes, name: str) -> str:
    """A file's text, without a byte order mark at its start."""
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: expected UTF-8 text, found byte 0x{content[error.start]:02x} at offset {error.start}"
        ) from error


def parse_json(content: bytes, name: str) -> Any:
    """The value that a file's content is as JSON; name: what to call the file in an error."""
    text = _decode(content, name)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}, line {error.lineno}: expected JSON, found a fault: {error.msg}") from error
    except RecursionError as error:
        raise ValueError(f"{name}: expected JSON, found brackets nested too deeply") from error
    except ValueError as error:  # of a number with thousands of digits; it names no file
        raise ValueError(f"{name}: expected JSON, found a fault: {error}") from error


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number") if value != {} else "an empty object"
