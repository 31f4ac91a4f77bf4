"""Passages to be searched: a TSV with a header line and the columns id, text, title, as DPR publishes Wikipedia.

It is read as a stream: Wikipedia's 21 million passages are 13 GB.
"""

import csv
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalith.data.mock import mix_words
from megalith.files import Location

COLUMNS = 3
LARGEST_ID = 2**63 - 1
SHOWN_LINES = 4  # of passages with the same id


@dataclass(frozen=True)
class Passage:
    """One row of the evidence. number: its place among those that are read, from 0. line: of the file, from 1."""

    number: int
    line: int
    id: int
    text: str
    title: str


def read_passages(path: Location, *, sample_rate: float = 1.0, seed: int = 0) -> Iterator[Passage]:
    """The passages in the order of the file; with a sample rate below 1 that share, chosen by row number and seed.

    Raises ValueError naming the file, the line and what is wrong with it.
    """
    number = 0
    rows = read_table(path)
    line, names = next(rows, (1, [""]))
    if names[0].strip().isdecimal():
        raise ValueError(
            f"{path}, line {line}: is a passage, with the id {names[0][:40]}, where names of columns are expected; "
            "put a line of them (id, text, title) in front"
        )
    for place, (line, row) in enumerate(rows):
        if sample_rate < 1 and not _is_chosen(place, sample_rate, seed):
            continue
        if len(row) < COLUMNS:
            raise ValueError(f"{path}, line {line}: has {len(row)} columns; evidence has id, text and title")
        try:
            identity = int(row[0])
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: the id {row[0][:40]!r} is no whole number") from error
        if not 0 <= identity <= LARGEST_ID:
            raise ValueError(f"{path}, line {line}: the id {identity} is not between 0 and {LARGEST_ID}")
        yield Passage(number, line, identity, row[1], row[2])
        number += 1


def check_passages(path: Location, *, sample_rate: float = 1.0, seed: int = 0) -> int:
    """Read all passages once and give their number. 16 bytes of memory for each.

    Raises ValueError as read_passages does, and for an id that several have, naming the lines.
    """
    ids, lines = array("q"), array("q")
    for passage in read_passages(path, sample_rate=sample_rate, seed=seed):
        ids.append(passage.id)
        lines.append(passage.line)
    if not ids:
        raise ValueError(f"{path}: holds no passage")
    ids_N, lines_N = np.frombuffer(ids, np.int64), np.frombuffer(lines, np.int64)
    order = np.argsort(ids_N, kind="stable")
    again = order[1:][ids_N[order[1:]] == ids_N[order[:-1]]]
    if len(again):
        same = lines_N[ids_N == ids_N[again.min()]].tolist()
        shown = ", ".join(map(str, same[:SHOWN_LINES])) + (" and others" if len(same) > SHOWN_LINES else "")
        raise ValueError(
            f"{path}: {len(again)} passages have the id of an earlier one: the first is {ids_N[again.min()]}, in lines "
            f"{shown}. Give each passage an id of its own."
        )
    return len(ids)


def read_table(path: Location) -> Iterator[tuple[int, list[str]]]:
    """Line number and columns of each row of a TSV, in which fields may be quoted; empty lines are none.

    Raises ValueError for a file that cannot be read, or a row that cannot be parsed.
    """
    try:
        with open(Path(path), encoding="utf-8", newline="") as file:
            rows = csv.reader(file, delimiter="\t")
            for row in rows:
                if row:
                    yield rows.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}, after line {rows.line_num}: {error}; a quotation mark may be left open") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start} of a block)") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


def _is_chosen(place: int, share: float, seed: int) -> bool:
    word = mix_words(np.array([place], np.uint64) + mix_words(np.array([seed], np.uint64)))
    return int(word[0]) < share * 2**64
