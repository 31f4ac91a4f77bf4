"""Token ids of text that is cut into pieces, found for a whole array of pieces at once.

Most pieces of a text (words, roughly) have been seen before. So every distinct piece is encoded once, by the exact rule
of its tokenizer, and its ids are remembered by its bytes; all later ones are looked up, some 100,000 in one numpy call.
Pieces of up to 15 bytes live in an open-addressing hash table whose 128-bit key holds the bytes themselves and their
number, so that no two pieces share a key; longer ones in a dict.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Bytes8 = NDArray[np.uint8]
Places = NDArray[np.int64]
Ids = NDArray[np.int32]
Words = NDArray[np.uint64]

SEPARATOR = 0xFF  # follows each text in a buffer; no UTF-8 text holds this byte
PADDING = 16  # bytes behind the last piece of a buffer, so that 16 bytes can be read anywhere
GROUP_SIZE = 1 << 19  # bytes of text encoded in one go: enough to hide numpy's overhead, not too much for the cache
MOST_PIECES = 1 << 20  # pieces remembered; then all are forgotten and the memory starts again
MOST_IDS = 1 << 23  # ids remembered; likewise
LONGEST_KEY = 15  # bytes of a piece that the table holds
LONGEST_REMEMBERED = 256  # bytes; longer pieces hardly ever come again
EMPTY = -1

_LOW_MASKS = np.array([(1 << (8 * min(n, 8))) - 1 for n in range(LONGEST_KEY + 1)], np.uint64)
_HIGH_MASKS = np.array([(1 << (8 * max(n - 8, 0))) - 1 for n in range(LONGEST_KEY + 1)], np.uint64)


class PieceRule(Protocol):
    """How a tokenizer cuts a buffer into pieces, and what the ids of a new piece are."""

    def find_starts(self, buffer: Bytes8) -> Places:
        """Where each piece starts, in increasing order, the first at 0; every SEPARATOR is a piece of its own."""

    def encode_pieces(self, pieces: Sequence[bytes]) -> tuple[Ids, Places]:
        """The ids of all pieces one after the other, and how many each has."""

    def safe_cut(self, text: bytes, begin: int) -> int:
        """A place at or after begin where a text may be cut in two without any effect on its ids; its end if none."""


class PieceEncoder:
    """Encodes texts by a rule, remembering the ids of the pieces it has seen."""

    def __init__(self, rule: PieceRule) -> None:
        self._rule = rule
        self._forget()

    def _forget(self) -> None:
        self._table = _KeyTable()
        self._long: dict[bytes, int] = {}
        self._num_pieces = 0
        self._num_ids = 0
        self._ids: Ids = np.empty(1 << 12, np.int32)
        self._first: Places = np.empty(1 << 10, np.int64)  # of each piece in _ids
        self._count: Places = np.empty(1 << 10, np.int64)  # ids of each piece

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Places]:
        """The ids of all texts one after the other, and how many each has.

        Raises UnicodeEncodeError (a ValueError) for a text with half a surrogate pair.
        """
        lengths = np.zeros(len(texts), np.int64)
        parts: list[Ids] = []
        for buffer, owners in self._group(texts):
            tokens, counts = self._encode_buffer(buffer)
            ends = np.cumsum(counts)[buffer.separators]
            np.add.at(lengths, owners, np.diff(ends, prepend=0))
            parts.append(tokens)
        return (np.concatenate(parts) if parts else np.empty(0, np.int32)), lengths

    def _group(self, texts: Sequence[str]) -> Iterator[tuple["_Buffer", Places]]:
        """Buffers of about GROUP_SIZE bytes, and the text that each of their sections is from."""
        sections: list[bytes] = []
        owners: list[int] = []
        size = 0
        for number, text in enumerate(texts):
            for section in self._sections(text.encode()):
                sections.append(section)
                owners.append(number)
                size += len(section) + 1
                if size >= GROUP_SIZE:
                    yield _Buffer(sections, self._rule), np.array(owners)
                    sections, owners, size = [], [], 0
        if sections:
            yield _Buffer(sections, self._rule), np.array(owners)

    def _sections(self, text: bytes) -> Iterator[bytes]:
        """A text in parts of about GROUP_SIZE bytes that are encoded like the whole."""
        begin = 0
        while len(text) - begin > 2 * GROUP_SIZE:
            end = self._rule.safe_cut(text, begin + GROUP_SIZE)
            yield text[begin:end]
            begin = end
        yield text[begin:]

    def _encode_buffer(self, buffer: "_Buffer") -> tuple[Ids, Places]:
        """The ids of a buffer, and how many each of its pieces has."""
        if self._num_pieces > MOST_PIECES or self._num_ids > MOST_IDS:
            self._forget()
        numbers = self._find(buffer)
        counts, firsts = self._count.take(numbers), self._first.take(numbers)
        total = int(counts.sum())
        if total == len(numbers) and counts.min(initial=1) == 1:
            return self._ids.take(firsts), counts
        shifts = firsts - (np.cumsum(counts) - counts)
        return self._ids.take(np.repeat(shifts, counts) + np.arange(total)), counts

    def _find(self, buffer: "_Buffer") -> Places:
        """The number under which each piece of a buffer is remembered; new ones are encoded and remembered."""
        numbers = np.empty(len(buffer.starts), np.int64)
        short = np.flatnonzero(buffer.lengths <= LONGEST_KEY)
        long = np.flatnonzero(buffer.lengths > LONGEST_KEY)
        low, high = buffer.keys(short)
        found = self._table.find(low, high)
        unknown = np.flatnonzero(found == EMPTY)
        low, high, inverse = _distinct(low[unknown], high[unknown])
        new = [_bytes_of(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
        long_pieces = buffer.pieces(long)
        new_long = list(dict.fromkeys(piece for piece in long_pieces if piece not in self._long))
        if new or new_long:
            given = self._remember(new + new_long)
            self._table.insert(low, high, given[: len(new)])
            found[unknown] = given[inverse]
            self._long.update(zip(new_long, given[len(new) :].tolist(), strict=True))
        numbers[short] = found
        numbers[long] = [self._long[piece] for piece in long_pieces]
        for piece in new_long:
            if len(piece) > LONGEST_REMEMBERED:
                del self._long[piece]
        return numbers

    def _remember(self, pieces: list[bytes]) -> Places:
        """Encode pieces and give each the next number."""
        tokens, counts = self._rule.encode_pieces(pieces)
        begin, end = self._num_pieces, self._num_pieces + len(pieces)
        ids_end = self._num_ids + len(tokens)
        self._ids = _grown(self._ids, ids_end)
        self._first = _grown(self._first, end)
        self._count = _grown(self._count, end)
        self._ids[self._num_ids : ids_end] = tokens
        self._first[begin:end] = self._num_ids + np.cumsum(counts) - counts
        self._count[begin:end] = counts
        self._num_pieces, self._num_ids = end, ids_end
        return np.arange(begin, end)


class _Buffer:
    """Texts joined into one array, each followed by SEPARATOR, and where its pieces are."""

    def __init__(self, sections: Sequence[bytes], rule: PieceRule) -> None:
        separator = bytes([SEPARATOR])
        self.content = separator.join(sections) + separator + bytes(PADDING)
        data = np.frombuffer(self.content, np.uint8)[:-PADDING]
        self.starts = rule.find_starts(data)
        self.lengths = np.diff(self.starts, append=len(data))
        self.separators = np.flatnonzero(data[self.starts] == SEPARATOR)  # pieces that end a text

    def pieces(self, which: Places) -> list[bytes]:
        """Some pieces as bytes."""
        starts, lengths = self.starts[which].tolist(), self.lengths[which].tolist()
        return [self.content[start : start + length] for start, length in zip(starts, lengths, strict=True)]

    def keys(self, which: Places) -> tuple[Words, Words]:
        """Some pieces as two numbers each: the first 8 bytes; the next 7 and, on top, the length."""
        starts, lengths = self.starts.take(which), self.lengths.take(which)
        words: Words = np.ndarray(shape=(len(self.content) - 7,), dtype="<u8", buffer=self.content, strides=(1,))
        low = words.take(starts)
        low &= _LOW_MASKS.take(lengths)
        high = lengths.astype(np.uint64) << np.uint64(56)
        longer = np.flatnonzero(lengths > 8)
        high[longer] |= words.take(starts[longer] + 8) & _HIGH_MASKS[lengths[longer]]
        return low, high


class _KeyTable:
    """A hash table from 128-bit keys to numbers, searched and filled by whole arrays; at most half full.

    A slot is a row of low and high key, number, and nothing, so that a search touches one cache line.
    """

    def __init__(self) -> None:
        self._num_keys = 0
        self._allocate(1 << 16)

    def _allocate(self, num_slots: int) -> None:
        self._slots = np.zeros((num_slots, 4), np.uint64)  # high is 0 in an empty slot: a key's length is at least 1
        self._shift = np.uint64(65 - num_slots.bit_length())
        self._mask = num_slots - 1

    def _first_slots(self, low: Words, high: Words) -> Places:
        """The slot where the search for a key begins (multiplicative hashing, Knuth, TAOCP volume 3, 6.4)."""
        mixed = low * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(32)
        mixed += high * np.uint64(0xC2B2AE3D27D4EB4F)
        mixed *= np.uint64(0xD6E8FEB86659FD93)
        mixed >>= self._shift
        return mixed.astype(np.int64)

    def find(self, low: Words, high: Words) -> Places:
        """The number of each key, or EMPTY."""
        places = self._first_slots(low, high)
        numbers = np.full(len(low), EMPTY, np.int64)
        searching = np.arange(len(low))
        while len(searching):
            rows = self._slots.take(places, axis=0)
            same = (rows[:, 1] == high) & (rows[:, 0] == low)
            found = np.flatnonzero(same)
            numbers[searching[found]] = rows[found, 2]
            more = np.flatnonzero(~same & (rows[:, 1] != 0))
            searching, low, high = searching[more], low[more], high[more]
            places = (places[more] + 1) & self._mask
        return numbers

    def insert(self, low: Words, high: Words, numbers: Places) -> None:
        """Add keys that are not there yet, all different."""
        num_slots = self._mask + 1
        self._num_keys += len(low)
        if 2 * self._num_keys > num_slots:
            held = self._slots[self._slots[:, 1] != 0]
            while 2 * self._num_keys > num_slots:
                num_slots *= 2
            # Four times the need, so that growing stays rare.
            self._allocate(2 * num_slots)
            self._place(held[:, 0], held[:, 1], held[:, 2].astype(np.int64))
        self._place(low, high, numbers)

    def _place(self, low: Words, high: Words, numbers: Places) -> None:
        places = self._first_slots(low, high)
        rows = np.stack((low, high, numbers.astype(np.uint64), np.zeros_like(low)), axis=1)
        while len(rows):
            free = np.flatnonzero(self._slots[places, 1] == 0)
            # Where several keys want one slot, the last one written has it; the others go on to the next slot.
            self._slots[places[free]] = rows[free]
            left = np.flatnonzero(self._slots[places, 2] != rows[:, 2])
            rows, places = rows[left], (places[left] + 1) & self._mask


def _distinct(low: Words, high: Words) -> tuple[Words, Words, Places]:
    """The different keys among these, in the order of the keys, and which of them each one is."""
    order = np.lexsort((low, high))
    low, high = low[order], high[order]
    new = np.ones(len(low), bool)
    new[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    inverse = np.empty(len(low), np.int64)
    inverse[order] = np.cumsum(new) - 1
    return low[new], high[new], inverse


def _bytes_of(low: int, high: int) -> bytes:
    """The piece that a key stands for."""
    length = high >> 56
    return (low | (high & ((1 << 56) - 1)) << 64).to_bytes(16, "little")[:length]


def _grown(array: NDArray[Any], size: int) -> NDArray[Any]:
    """The array itself, or a copy with room for at least size entries."""
    if size <= len(array):
        return array
    larger = np.empty(max(size, 2 * len(array)), array.dtype)
    larger[: len(array)] = array
    return larger
