"""Classes of Unicode characters, looked up for a whole buffer of UTF-8 at once.

The work is done on bytes: every byte of a character gets the character's class, so that a run of one class is a run of
equal bytes. ASCII costs one look-up a byte; the other characters are decoded where they stand.
"""

import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_CHARACTERS = 0x110000
NUM_CATEGORIZED = 0x40000  # beyond, there are only variation selectors, tags and characters for private use
NO_CLASS = 0xFF
Bytes8 = NDArray[np.uint8]


def class_table(groups: Mapping[int, Iterable[tuple[int, int]]], other: int) -> Bytes8:
    """The class of each character. groups: for each class the ranges of its code points, both ends included."""
    table = np.full(NUM_CHARACTERS, other, np.uint8)
    for number, ranges in groups.items():
        for first, last in ranges:
            table[first : last + 1] = number
    return table


def classify_categories(table: Bytes8, classes: Mapping[str, int]) -> None:
    """Give characters the class of their general category's first letter (L, N, ...), in place.

    The categories are those of this Python's Unicode version; characters that are newer keep what the table says.
    """
    letters = (unicodedata.category(chr(point))[0] for point in range(NUM_CATEGORIZED))
    found = np.array([classes.get(letter, NO_CLASS) for letter in letters], np.uint8)
    known = found != NO_CLASS
    table[:NUM_CATEGORIZED][known] = found[known]


def classify(data: Bytes8, table: Bytes8, separator_class: int) -> Bytes8:
    """The class of the character that each byte of a buffer is part of.

    data: valid UTF-8 texts, each followed by the byte 0xFF, which gets separator_class.
    """
    by_byte = table[:256].copy()
    by_byte[0xFF] = separator_class
    # bytes.translate takes a quarter of the time of by_byte[data].
    classes = np.frombuffer(bytearray(data.tobytes().translate(by_byte.tobytes())), np.uint8)
    leads = lead_bytes(data)
    if len(leads):
        points, lengths = decode_characters(data, leads)
        of_character = table[points]
        classes[leads] = of_character
        classes[leads + 1] = of_character
        for length in (3, 4):
            long = lengths >= length
            classes[leads[long] + (length - 1)] = of_character[long]
    return classes


def lead_bytes(data: Bytes8) -> NDArray[np.int64]:
    """Where the characters beyond ASCII begin."""
    return np.flatnonzero((data >= 0xC0) & (data < 0xFF))


def decode_characters(data: Bytes8, leads: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Code point and number of bytes of the characters beyond ASCII that begin at leads."""
    last = len(data) - 1
    lead = data[leads].astype(np.int32)
    second, third, fourth = (data[np.minimum(leads + n, last)].astype(np.int32) & 0x3F for n in (1, 2, 3))
    lengths = 2 + (lead >= 0xE0).astype(np.int32) + (lead >= 0xF0)
    points = np.where(
        lengths == 2,
        (lead & 0x1F) << 6 | second,
        np.where(
            lengths == 3,
            (lead & 0x0F) << 12 | second << 6 | third,
            (lead & 0x07) << 18 | second << 12 | third << 6 | fourth,
        ),
    )
    return points, lengths
