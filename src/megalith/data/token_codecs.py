"""What turns texts into token ids and back, one class for each kind of tokenizer."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megalith.data.bpe import Gpt2Rule, byte_symbols
from megalith.data.pieces import Ids, PieceEncoder, Places
from megalith.data.wordpiece import CONTINUED, WordPieceRule

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer as LibraryTokenizer

LARGEST_ID = np.iinfo(np.int32).max - 1
TEXTS_AT_ONCE = 256  # handed to a library in one call, so that its results never fill the memory


class Codec(Protocol):
    """Texts to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """The number of ids: all are from 0 to vocab_size - 1."""

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Places]:
        """The ids of all texts one after the other, and how many each text has.

        Raises ValueError for a text with half a surrogate pair, which no UTF-8 can hold.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text that ids stand for; bytes that are not UTF-8 become U+FFFD."""


class ByteCodec:
    """The bytes of a text are its ids; one more id, 256, ends a document."""

    vocab_size = 257
    end_of_document = 256

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Places]:
        encoded = [text.encode() for text in texts]
        lengths = np.array([len(text) for text in encoded], np.int64)
        return np.frombuffer(b"".join(encoded), np.uint8).astype(np.int32), lengths

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(b"<|endoftext|>" if i == self.end_of_document else bytes([i]) for i in ids).decode(
            errors="replace"
        )


class BytePairCodec:
    """GPT-2's byte-level BPE."""

    def __init__(self, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
        self.vocab_size = len(vocabulary)
        self._vocabulary = vocabulary
        self._encoder = PieceEncoder(Gpt2Rule(vocabulary, merges))

    @functools.cached_property
    def _bytes(self) -> dict[int, bytes]:
        """The bytes of each id; made when first needed, since preparing data never decodes."""
        byte_of = {symbol: bytes([number]) for number, symbol in enumerate(byte_symbols())}
        # A token that no merge makes may hold other characters; it stands for itself.
        return {
            number: b"".join(byte_of.get(character, character.encode()) for character in token)
            for token, number in self._vocabulary.items()
        }

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Places]:
        return self._encoder.encode(texts)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._bytes[number] for number in ids).decode(errors="replace")


class WordPieceCodec:
    """BERT's WordPiece."""

    def __init__(self, vocabulary: Mapping[str, int], *, lower_case: bool) -> None:
        self.vocab_size = len(vocabulary)
        self._encoder = PieceEncoder(WordPieceRule(vocabulary, lower_case=lower_case))
        self._tokens = {number: token for token, number in vocabulary.items()}

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Places]:
        return self._encoder.encode(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """The words with a blank between any two; what stood there in the text is not known."""
        return " ".join(self._tokens[number] for number in ids).replace(f" {CONTINUED}", "")


class LibraryFaults:
    """Turns what the tokenizers library raises (Exception itself, or a panic of its Rust code) into a ValueError."""

    def __init__(self, name: str, expected: str) -> None:
        self._name = name
        self._expected = expected

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is Exception or (kind is not None and kind.__name__ == "PanicException"):
            raise ValueError(f"{self._name}: expected {self._expected}, found a fault: {error!s:.200}") from error


class HuggingFaceCodec:
    """Whatever a tokenizer.json describes, run by the `tokenizers` library.

    The text is all there is: no special tokens are added around it, nothing is cut off or filled up. Special tokens
    that stand in a text are recognised, as the file says.
    """

    def __init__(self, tokenizer: "LibraryTokenizer") -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if not 0 <= largest <= LARGEST_ID:
            found = largest if largest >= 0 else "none"
            raise ValueError(f"tokenizer.json: expected tokens with ids up to {LARGEST_ID}, found {found}")
        self.vocab_size = largest + 1
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Places]:
        # A pattern of the file may give up on a text: the library bounds its work and panics.
        with LibraryFaults("tokenizer.json", "patterns that come to an end on every text"):
            return _flat(
                encoding.ids
                for begin in range(0, len(texts), TEXTS_AT_ONCE)
                for encoding in self._tokenizer.encode_batch_fast(
                    _checked(texts[begin : begin + TEXTS_AT_ONCE]), add_special_tokens=False
                )
            )

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


class SentencePieceCodec:
    """A SentencePiece model (Kudo and Richardson 2018, arXiv:1808.06226), run by its library."""

    def __init__(self, processor: "SentencePieceProcessor") -> None:
        self.vocab_size = int(processor.get_piece_size())
        self._processor = processor

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Places]:
        # One by one: what the library makes of a batch no longer fits the cache when it is read.
        return _flat(self._processor.encode(text) for text in _checked(texts))

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode(list(ids))
        return text


def _flat(lists: Iterable[list[int]]) -> tuple[Ids, Places]:
    arrays = [np.fromiter(ids, np.int32, len(ids)) for ids in lists]
    lengths = np.array([len(ids) for ids in arrays], np.int64)
    return (np.concatenate(arrays) if arrays else np.empty(0, np.int32)), lengths


def _checked(texts: Sequence[str]) -> list[str]:
    """The texts, once it is sure that all can be written as UTF-8 (the libraries' own errors are less clear)."""
    for text in texts:
        text.encode()
    return list(texts)
