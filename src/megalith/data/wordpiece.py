"""WordPiece as published with BERT (Devlin et al. 2019, arXiv:1810.04805), exact by BERT's own rules of cleaning.

A text is cut where BERT cuts it whatever stands around: at white space, around CJK ideographs and, in words of plain
ASCII, around punctuation. What lies between is cleaned, lower-cased and matched piece by piece, and remembered.
"""

import functools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from megalith.data.pieces import SEPARATOR, Bytes8, Ids, Places
from megalith.data.unicode_classes import class_table, classify

UNKNOWN = "[UNK]"
CONTINUED = "##"  # begins every piece of a word but the first
LONGEST_WORD = 200  # characters; a longer word becomes UNKNOWN
WHITE, IDEOGRAPH, MARK, OTHER, END = range(5)  # MARK: ASCII punctuation
# BERT's own white space (tab, newline, return, category Zs), and U+2028 and U+2029, where str.split() parts words.
WHITE_SPACE = (
    *((0x09, 0x0A), (0x0D, 0x0D), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A)),
    *((0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000)),
)
IDEOGRAPHS = (
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F)),
    *((0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0x2F800, 0x2FA1F)),
)
ASCII_PUNCTUATION = ((33, 47), (58, 64), (91, 96), (123, 126))
ASCII_MARKS = frozenset(chr(n) for first, last in ASCII_PUNCTUATION for n in range(first, last + 1))
BLANK = ord(" ")
WHITE_BYTE = re.compile(rb"[ \n]")


@functools.cache
def word_classes() -> Bytes8:
    """The class of each character by which a text is cut."""
    return class_table({WHITE: WHITE_SPACE, IDEOGRAPH: IDEOGRAPHS, MARK: ASCII_PUNCTUATION}, OTHER)


def find_words(data: Bytes8) -> Places:
    """Where the pieces of a buffer start: words with the blank before them, ideographs, marks, other white space."""
    classes = classify(data, word_classes(), END)
    kinds = np.where(classes == MARK, np.uint8(OTHER), classes)
    starts = np.empty(len(data), bool)
    starts[0] = True
    np.not_equal(kinds[1:], kinds[:-1], out=starts[1:])
    first_byte = data & 0xC0 != 0x80
    starts |= (kinds != OTHER) & first_byte
    # A blank joins the word after it, which halves the number of pieces.
    starts[1:] &= ~((data[:-1] == BLANK) & (kinds[1:] == OTHER))
    marks = np.flatnonzero(classes == MARK)
    foreign = np.flatnonzero((data >= 0x80) & (kinds == OTHER))
    if len(foreign):
        # Lower-casing looks beyond a mark (a final sigma), and a mark may carry an accent: such words stay whole.
        begins = np.flatnonzero(starts)
        whole = np.zeros(len(begins), bool)
        whole[np.searchsorted(begins, foreign, side="right") - 1] = True
        marks = marks[~whole[np.searchsorted(begins, marks, side="right") - 1]]
    starts[marks] = True
    # A blank before a mark stays with it. The first byte's neighbour here is the last one, a separator.
    starts[marks[data[marks - 1] == BLANK]] = False
    after = marks + 1
    starts[after[kinds[after] == OTHER]] = True
    return np.flatnonzero(starts)


class WordPieceRule:
    """BERT's cleaning and its greedy matching, longest piece first, as pieces.py wants them."""

    def __init__(self, vocabulary: Mapping[str, int], *, lower_case: bool) -> None:
        self._first = dict(vocabulary)
        self._later = {t[len(CONTINUED) :]: n for t, n in vocabulary.items() if t.startswith(CONTINUED)}
        self._longest = max((len(token) for token in vocabulary), default=0)
        self._unknown = vocabulary[UNKNOWN]
        self._lower_case = lower_case

    def find_starts(self, buffer: Bytes8) -> Places:
        return find_words(buffer)

    def safe_cut(self, text: bytes, begin: int) -> int:
        found = WHITE_BYTE.search(text, begin)
        return found.start() if found else len(text)

    def encode_pieces(self, pieces: Sequence[bytes]) -> tuple[Ids, Places]:
        """The ids of all pieces one after the other, and how many each has; white space and a separator have none."""
        ids: list[int] = []
        counts = np.zeros(len(pieces), np.int64)
        for number, piece in enumerate(pieces):
            if piece[0] == SEPARATOR:
                continue
            before = len(ids)
            for word in self._words(piece.decode()):
                ids += self._match(word)
            counts[number] = len(ids) - before
        return np.array(ids, np.int32), counts

    def _words(self, text: str) -> Iterator[str]:
        """The words and marks of a text that white space and ideographs do not part any further."""
        if text.isascii() and text.isprintable():
            # The usual case: nothing to drop and no accents.
            for raw in text.split():
                yield from _part_marks(raw.lower() if self._lower_case else raw)
            return
        kept = "".join(character for character in text if not _is_dropped(character))
        for raw in kept.split():
            if self._lower_case:
                folded = unicodedata.normalize("NFD", raw.lower())
                raw = "".join(character for character in folded if unicodedata.category(character) != "Mn")
            yield from _part_marks(raw)

    def _match(self, word: str) -> list[int]:
        """The ids of the longest known pieces from left to right; UNKNOWN alone if a rest matches none."""
        if len(word) > LONGEST_WORD:
            return [self._unknown]
        ids: list[int] = []
        known, begin = self._first, 0
        while begin < len(word):
            end = min(len(word), begin + self._longest)
            while end > begin and word[begin:end] not in known:
                end -= 1
            if end == begin:
                return [self._unknown]
            ids.append(known[word[begin:end]])
            known, begin = self._later, end
        return ids


def _part_marks(word: str) -> Iterator[str]:
    """A word in parts: every punctuation character alone, and what lies between."""
    begin = 0
    for place, character in enumerate(word):
        if character in ASCII_MARKS or (character > "\x7f" and unicodedata.category(character)[0] == "P"):
            if begin < place:
                yield word[begin:place]
            yield character
            begin = place + 1
    if begin < len(word):
        yield word[begin:]


def _is_dropped(character: str) -> bool:
    """Whether cleaning drops a character: NUL, the replacement character, control and format characters."""
    if character in "\t\n\r":
        return False
    return character == "\ufffd" or unicodedata.category(character) in ("Cc", "Cf")
