"""Byte-level BPE as published with GPT-2, exact for any vocabulary and merges, on whole arrays of pieces.

A text is cut by GPT-2's pattern (`Gpt2Rule.find_starts`), each piece is merged on its own (`Merges`), and pieces.py
remembers what came out. Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; Sennrich
et al. 2016, arXiv:1508.07909.
"""

import functools
import heapq
import itertools
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megalith.data.pieces import LONGEST_KEY, SEPARATOR, Bytes8, Ids, Places
from megalith.data.unicode_classes import class_table, classify, classify_categories

if TYPE_CHECKING:
    from tiktoken import Encoding

WHITE, LETTER, DIGIT, OTHER, END = range(5)  # classes of characters; END is the separator between texts
WHITE_SPACE = (  # the characters with Unicode's property White_Space
    *((0x09, 0x0D), (0x20, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A)),
    *((0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000)),
)
APOSTROPHE, BLANK = ord("'"), ord(" ")
NEVER = np.int32(2**31 - 1)  # the rank of a pair that is not merged
MOST_ROUNDS = 64  # longest piece, in bytes, that is merged together with all others
MOST_LONG = 1 << 18  # bytes of new pieces beyond LONGEST_KEY, after which a library is worth its preparation
# A visible ASCII character, or the last byte of a character that cannot be white space, before a blank or a newline.
SAFE_CUT = re.compile(rb"[!-~\x8b-\x9e\xa1-\xa7\xaa-\xae\xb0-\xbf](?=[ \n])")


@functools.cache
def gpt2_classes() -> Bytes8:
    """The class of each character in GPT-2's pattern."""
    table = class_table({WHITE: WHITE_SPACE}, OTHER)
    classify_categories(table, {"L": LETTER, "N": DIGIT})
    return table


def byte_symbols() -> list[str]:
    """The character by which GPT-2's files write each byte.

    Visible Latin-1 characters stand for themselves; the other 68 bytes, in increasing order, for U+0100 and on.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {byte: chr(byte) for byte in visible}
    for byte in range(256):
        symbols.setdefault(byte, chr(256 + len(symbols) - len(visible)))
    return [symbols[byte] for byte in range(256)]


def find_gpt2_pieces(data: Bytes8) -> Places:
    """Where the pieces of GPT-2's pattern start in a buffer of UTF-8 texts, each followed by SEPARATOR.

    The pattern is 's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+ with the leftmost
    alternative first. In words: a run of one class is a piece; a blank before a run belongs to it; the last white
    character before a run is parted from those before it; an apostrophe that begins a piece takes a contraction's
    letters with it. A separator is a piece of its own.
    """
    classes = classify(data, gpt2_classes(), END)
    white = classes == WHITE
    end = classes == END
    starts = np.empty(len(data), bool)
    starts[0] = True
    np.not_equal(classes[1:], classes[:-1], out=starts[1:])
    starts[1:] &= ~((data[:-1] == BLANK) & ~white[1:])
    starts |= end
    before_run = white.copy()
    before_run[:-1] &= ~(white[1:] | end[1:])
    starts |= _first_bytes(data, before_run)
    _part_contractions(data, classes, starts)
    return np.flatnonzero(starts)


def _first_bytes(data: Bytes8, marks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Marks on the last bytes of characters, moved to their first bytes, in place."""
    at = np.flatnonzero(marks & (data >= 0x80))
    if len(at):
        marks[at] = False
        for _ in range(3):
            at = np.where(data[at] & 0xC0 == 0x80, at - 1, at)
        marks[at] = True
    return marks


def _part_contractions(data: Bytes8, classes: Bytes8, starts: NDArray[np.bool_]) -> None:
    """Make 's 't 'm 'd 're 've 'll pieces where the apostrophe begins a piece, in place."""
    # A contraction takes at least two bytes and each text ends with a separator, so two more bytes can be read.
    at = np.flatnonzero(data[:-2] == APOSTROPHE)
    at = at[starts[at]]
    first, second = data[at + 1], data[at + 2]
    two = (first == ord("s")) | (first == ord("t")) | (first == ord("m")) | (first == ord("d"))
    three = ((first == ord("r")) | (first == ord("v"))) & (second == ord("e"))
    three |= (first == ord("l")) & (second == ord("l"))
    for length, chosen in ((2, at[two]), (3, at[three])):
        starts[chosen + 1] = False
        starts[chosen + length] = True


class Merges:
    """The merges of a vocabulary, applied to many pieces at once.

    Until no pair is known, the adjacent pair of lowest rank is merged wherever it occurs, from left to right. Works on
    symbols (bytes and whatever merges produce); a symbol that is not in the vocabulary ends as id 0.
    """

    def __init__(self, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
        symbols = {symbol: number for number, symbol in enumerate(byte_symbols())}
        left, right, joined = (np.empty(len(merges), np.int32) for _ in range(3))
        for rank, (a, b) in enumerate(merges):
            left[rank] = symbols.setdefault(a, len(symbols))
            right[rank] = symbols.setdefault(b, len(symbols))
            joined[rank] = symbols.setdefault(a + b, len(symbols))
        self._num_symbols = len(symbols)
        self._joined = joined  # the symbol made by each merge, by rank
        self._ids = np.array([vocabulary.get(symbol, 0) for symbol in symbols], np.int32)
        self._pairs = _PairTable(left.astype(np.int64) * self._num_symbols + right)

    def encode_pieces(self, pieces: Sequence[bytes]) -> tuple[Ids, Places]:
        """The ids of all pieces one after the other, and how many each has; a separator has none."""
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        symbols = np.frombuffer(b"".join(pieces), np.uint8).astype(np.int32)
        owners = np.repeat(np.arange(len(pieces)), lengths)
        merged = symbols != SEPARATOR
        merged &= (lengths <= MOST_ROUNDS)[owners]
        parts = [self._merge_all(symbols[merged], owners[merged])]
        for number in np.flatnonzero(lengths > MOST_ROUNDS).tolist():
            long = self._merge_long(np.frombuffer(pieces[number], np.uint8).astype(np.int32))
            parts.append((long, np.full(len(long), number)))
        symbols, owners = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(owners, kind="stable")
        return self._ids[symbols[order]], np.bincount(owners, minlength=len(pieces))

    def _merge_all(self, symbols: Ids, owners: Places) -> tuple[Ids, Places]:
        """The symbols left of many pieces; owners says which piece each symbol belongs to. Order within a piece stays.

        One round makes one merge in every piece that still has a known pair.
        """
        done: list[tuple[Ids, Places]] = [(symbols[:0], owners[:0])]
        ranks = self._ranks(symbols, owners, np.arange(len(symbols)))
        while len(symbols):
            edges = np.flatnonzero(owners[1:] != owners[:-1]) + 1
            bounds = np.concatenate(([0], edges, [len(owners)]))
            lowest = np.repeat(np.minimum.reduceat(ranks, bounds[:-1]), bounds[1:] - bounds[:-1])
            active = lowest != NEVER
            if not active.all():
                done.append((symbols[~active], owners[~active]))
                symbols, owners, ranks, lowest = (part[active] for part in (symbols, owners, ranks, lowest))
            symbols, at, keep = self._merge_marked(symbols, ranks, ranks == lowest)
            owners, ranks = owners[keep], ranks[keep]
            # Only the pairs on both sides of what was merged are new.
            new = np.concatenate((at, at[at > 0] - 1))
            ranks[new] = self._ranks(symbols, owners, new)
        symbols, owners = (np.concatenate(column) for column in zip(*done, strict=True))
        return symbols, owners

    def _ranks(self, symbols: Ids, owners: Places, places: Places) -> NDArray[np.int32]:
        """The rank of the symbols at some places with their right neighbours; NEVER at the end of a piece."""
        ranks = np.full(len(places), NEVER, np.int32)
        last = len(symbols) - 1
        inside = np.flatnonzero((places < last) & (owners[places] == owners[np.minimum(places + 1, last)]))
        at = places[inside]
        ranks[inside] = self._pairs.find(symbols[at].astype(np.int64) * self._num_symbols + symbols[at + 1])
        return ranks

    def _merge_marked(
        self, symbols: Ids, ranks: NDArray[np.int32], marked: NDArray[np.bool_]
    ) -> tuple[Ids, Places, NDArray[np.bool_]]:
        """Merge each marked symbol with its right neighbour.

        Gives the symbols, the places of the merged ones among them, and which of the old places are left.
        """
        if (marked[1:] & marked[:-1]).any():
            # In "aaa" the pair (a, a) stands twice; from left to right every second one of such a run is merged.
            places = np.arange(len(marked))
            begins = marked.copy()
            begins[1:] &= ~marked[:-1]
            run = np.maximum.accumulate(np.where(begins, places, 0))
            marked = marked & ((places - run) % 2 == 0)
        at = np.flatnonzero(marked)
        symbols[at] = self._joined[ranks[at]]
        keep = np.ones(len(symbols), bool)
        keep[at + 1] = False
        return symbols[keep], at - np.arange(len(at)), keep

    def _merge_long(self, symbols: Ids) -> Ids:
        """The symbols left of one long piece: rounds while each merges much, then a queue of pairs."""
        while True:
            ranks = self._ranks(symbols, np.zeros(len(symbols), np.int64), np.arange(len(symbols)))
            lowest = ranks.min()
            marked = ranks == lowest
            if lowest == NEVER:
                return symbols
            if marked.sum() * MOST_ROUNDS < len(symbols):
                return self._merge_queued(symbols)
            symbols, _, _ = self._merge_marked(symbols, ranks, marked)

    def _merge_queued(self, piece: Ids) -> Ids:
        """The symbols left of one piece, by a queue of (rank, place); time n log n in the number of symbols."""
        symbols = piece.tolist()
        size = len(symbols)
        before = list(range(-1, size - 1))
        after = list(range(1, size + 1))
        rank_of, joined = self._pairs.as_dict, self._joined
        ranks = self._ranks(piece, np.zeros(size, np.int64), np.arange(size)).tolist()
        queue = [(rank, place) for place, rank in enumerate(ranks) if rank != NEVER]
        heapq.heapify(queue)
        gone = -1
        while queue:
            # All pairs of one rank are merged before any pair that their merging makes.
            rank = queue[0][0]
            places = []
            while queue and queue[0][0] == rank:
                places.append(heapq.heappop(queue)[1])
            for place in places:
                right = after[place] if symbols[place] != gone else size
                if right == size or rank_of.get(symbols[place] * self._num_symbols + symbols[right]) != rank:
                    continue
                symbols[place], symbols[right] = int(joined[rank]), gone
                after[place] = after[right]
                if after[place] < size:
                    before[after[place]] = place
                for a, b in ((before[place], place), (place, after[place])):
                    if a >= 0 and b < size:
                        new = rank_of.get(symbols[a] * self._num_symbols + symbols[b])
                        if new is not None:
                            heapq.heappush(queue, (new, a))
        return np.array([symbol for symbol in symbols if symbol != gone], np.int32)


class _PairTable:
    """The rank of each known pair of symbols, found for whole arrays (open addressing, at most a quarter full)."""

    def __init__(self, pairs: NDArray[np.int64]) -> None:
        """pairs: a number for each pair, in the order of their ranks; of equal ones the last counts."""
        self.as_dict = {pair: rank for rank, pair in enumerate(pairs.tolist())}
        bits = max(4, (4 * len(self.as_dict)).bit_length())
        self._mask = (1 << bits) - 1
        self._shift = np.uint64(64 - bits)
        self._pair = np.full(1 << bits, -1, np.int64)
        self._rank = np.full(1 << bits, NEVER, np.int32)
        keys = np.array(list(self.as_dict), np.int64)
        ranks = np.array(list(self.as_dict.values()), np.int32)
        slots = self._slots(keys)
        waiting = np.arange(len(keys))
        while len(waiting):
            free = waiting[self._pair[slots[waiting]] == -1]
            self._pair[slots[free]] = keys[free]
            placed = self._pair[slots[waiting]] == keys[waiting]
            self._rank[slots[waiting[placed]]] = ranks[waiting[placed]]
            waiting = waiting[~placed]
            slots[waiting] = (slots[waiting] + 1) & self._mask

    def _slots(self, pairs: NDArray[np.int64]) -> Places:
        slots: Places = (pairs.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> self._shift).astype(np.int64)
        return slots

    def find(self, pairs: NDArray[np.int64]) -> NDArray[np.int32]:
        """The rank of each pair; NEVER for unknown ones."""
        slots = self._slots(pairs)
        there = self._pair[slots]
        ranks = np.where(there == pairs, self._rank[slots], NEVER)
        searching = np.flatnonzero((there != pairs) & (there != -1))
        slots = slots[searching]
        while len(searching):
            slots = (slots + 1) & self._mask
            there = self._pair[slots]
            wanted = pairs[searching]
            ranks[searching] = np.where(there == wanted, self._rank[slots], NEVER)
            more = (there != wanted) & (there != -1)
            searching, slots = searching[more], slots[more]
        return ranks


class Gpt2Rule:
    """GPT-2's pattern and a vocabulary's merges, as pieces.py wants them.

    Long pieces (scripts without blanks have many) take `Merges` long: it makes a round for every merge of a piece. Once
    their number shows that it pays, new pieces are given to tiktoken, if that is proven to find the same ids.
    """

    def __init__(self, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
        self._merges = Merges(vocabulary, merges)
        self._files: tuple[Mapping[str, int], Sequence[tuple[str, str]]] | None = (vocabulary, merges)
        self._num_long = 0  # bytes of long pieces that Merges was given
        self._library: Encoding | None = None

    def find_starts(self, buffer: Bytes8) -> Places:
        return find_gpt2_pieces(buffer)

    def safe_cut(self, text: bytes, begin: int) -> int:
        """Before the first white space after a visible character: there a piece ends whatever follows."""
        found = SAFE_CUT.search(text, begin)
        return found.end() if found else len(text)

    def encode_pieces(self, pieces: Sequence[bytes]) -> tuple[Ids, Places]:
        if self._files is not None:
            self._num_long += sum(len(piece) for piece in pieces if len(piece) > LONGEST_KEY)
            if self._num_long > MOST_LONG:
                self._library = equal_library(*self._files, self._merges)
                self._files = None
        if self._library is None:
            return self._merges.encode_pieces(pieces)
        encode = self._library.encode_ordinary
        ids = [encode(piece.decode()) if piece[0] != SEPARATOR else [] for piece in pieces]
        counts = np.array([len(found) for found in ids], np.int64)
        return np.fromiter(chain.from_iterable(ids), np.int32, int(counts.sum())), counts


def equal_library(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], exact: Merges) -> "Encoding | None":
    """tiktoken with this vocabulary, for pieces that are cut already; None unless it gives the ids of `exact`.

    tiktoken merges any two neighbours that make a token, lowest id first, whether or not the merges name the pair. That
    is the same if ids are in the order of the merges, each merge makes a token of its own from earlier ones, and every
    token is encoded as itself: then, whenever two symbols side by side make up a token, the merges inside that stretch
    were those of the token alone, so the pair is the one by which the token itself was made.
    """
    made = [a + b for a, b in merges]
    places = {symbol: -1 for symbol in byte_symbols()} | {symbol: rank for rank, symbol in enumerate(made)}
    if len(places) != 256 + len(made) or any(symbol not in vocabulary for symbol in places):
        return None
    if any(vocabulary[a] >= vocabulary[b] for a, b in itertools.pairwise(made)):
        return None
    if any(places.get(part, rank) >= rank for rank, pair in enumerate(merges) for part in pair):
        return None
    byte_of = {symbol: number for number, symbol in enumerate(byte_symbols())}
    tokens = {bytes(byte_of[character] for character in symbol): vocabulary[symbol] for symbol in places}
    ids, counts = exact.encode_pieces([token for token in tokens if token != bytes([SEPARATOR])])
    expected = [number for token, number in tokens.items() if token != bytes([SEPARATOR])]
    if (counts != 1).any() or ids.tolist() != expected:
        return None
    try:
        from tiktoken import Encoding
    except ImportError:
        return None
    return Encoding("pieces", pat_str="(?s).+", mergeable_ranks=tokens, special_tokens={})
