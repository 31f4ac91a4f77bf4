"""Pairs of sentences with a class each, from the tab-separated files of MNLI and QQP, and the batches made of them.

Both begin with a line of column names. MNLI (Williams et al. 2018, arXiv:1704.05426, as in GLUE): the sentences stand
in columns 8 and 9, counted from 0, the class in the last. QQP: id, qid1, qid2, question1, question2, is_duplicate.

Shape letters: B batch, N pair, T sequence length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.data.tokenizer import Tokenizer

SPECIAL_TOKENS = 3  # [CLS] and two [SEP]


@dataclass(frozen=True)
class Layout:
    """Where a line has what. classes: names, in the order of their numbers. num_columns: None for any that suffice.

    leaves_out: a line of other columns or with an empty sentence is left out, as Megatron-LM does; else it is refused.
    """

    first: int
    second: int
    classes: tuple[str, ...]
    num_columns: int | None = None
    leaves_out: bool = False


LAYOUTS = {
    "MNLI": Layout(8, 9, ("contradiction", "entailment", "neutral")),
    "QQP": Layout(3, 4, ("0", "1"), num_columns=6, leaves_out=True),
}


@dataclass(frozen=True)
class Pair:
    """Two sentences and the number of their class."""

    first: str
    second: str
    label: int


def read_pairs(paths: Sequence[str], layout: Layout, *, warn: Callable[[str], object]) -> list[Pair]:
    """The pairs of all files in order. warn: called once for each file of which lines are left out.

    Raises ValueError naming file and line for a class that is none, and unless the layout leaves such lines out for
    other columns or an empty sentence; and for a file without pairs.
    """
    pairs: list[Pair] = []
    for path in paths:
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        if len(numbered) < 2:
            raise ValueError(f"{path}: expected a line of column names and lines of pairs, found {len(numbered)} lines")
        names = [column.strip() for column in numbered[0][1].split("\t")]
        if not _fault(names, layout) and names[-1] in layout.classes:
            raise ValueError(
                f"{path}, line {numbered[0][0]}: is a pair; put a line with the names of the columns in front"
            )
        left_out: list[str] = []
        for number, line in numbered[1:]:
            columns = [column.strip() for column in line.split("\t")]
            if fault := _fault(columns, layout):
                if not layout.leaves_out:
                    raise ValueError(f"{path}, line {number}: {fault}")
                left_out.append(f"line {number}: {fault}")
                continue
            if columns[-1] not in layout.classes:
                wanted = f"expected one of {', '.join(layout.classes)} in the last column"
                raise ValueError(f"{path}, line {number}: {wanted}, found {columns[-1]!r}")
            pairs.append(Pair(columns[layout.first], columns[layout.second], layout.classes.index(columns[-1])))
        if left_out:
            count = len(numbered) - 1
            if len(left_out) == count:
                raise ValueError(f"{path}: none of its {count} lines is a pair, the first is {left_out[0]}")
            verb = "is" if len(left_out) == 1 else "are"
            warn(f"{path}: {len(left_out)} of {count} lines {verb} left out, the first is {left_out[0]}.")
    return pairs


def _fault(columns: Sequence[str], layout: Layout) -> str | None:
    """Why columns are no pair of sentences, if they are not."""
    wanted = layout.num_columns or layout.second + 2
    if len(columns) < wanted or (layout.num_columns is not None and len(columns) > wanted):
        least = "" if layout.num_columns is not None else " or more"
        return f"expected {wanted}{least} columns with tabs between them, found {len(columns)}"
    if not columns[layout.first] or not columns[layout.second]:
        return f"the {'second' if columns[layout.first] else 'first'} sentence is empty"
    return None


class ClassBatches:
    """Batches of pairs with a class each, for an encoder with a head for classes; what a Loader reads from.

    length: tokens of a sample. A longer pair loses its end, but for the last [SEP].
    """

    def __init__(self, pairs: Sequence[Pair], tokenizer: Tokenizer, *, length: int) -> None:
        self.tokens = np.full((len(pairs), length), tokenizer.pad, np.int32)
        self.types = np.zeros((len(pairs), length), np.int8)
        self.sizes = np.zeros(len(pairs), np.int64)  # tokens that are no padding
        self.labels = np.array([pair.label for pair in pairs], np.int64)
        firsts = tokenizer.encode_batch([pair.first for pair in pairs])
        seconds = tokenizer.encode_batch([pair.second for pair in pairs])
        for row, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
            tokens = np.concatenate([[tokenizer.cls], first, [tokenizer.sep], second])[: length - 1]
            size = len(tokens) + 1
            self.tokens[row, : size - 1], self.tokens[row, size - 1] = tokens, tokenizer.sep
            self.types[row, min(len(first) + 2, size - 1) : size] = 1
            self.sizes[row] = size

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: NDArray[np.int64], samples: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Each with B first: tokens and types, int64 BT; padding, int32 BT, 1 where a token is real; classes, int64;
        class_mask, float32, 1, or 0 where an index is -1; samples, int64."""
        length = self.tokens.shape[1]
        return {
            "tokens": self.tokens[indices].astype(np.int64),
            "types": self.types[indices].astype(np.int64),
            "padding": (np.arange(length) < self.sizes[indices, None]).astype(np.int32),
            "classes": self.labels[indices],
            "class_mask": (indices >= 0).astype(np.float32),
            "samples": np.asarray(samples, np.int64),
        }
