"""Whether a passage answers a question: it holds the words of an answer in their order, or a pattern of it is found.

The rules are those by which open-domain question answering is measured (Chen et al. 2017, arXiv:1704.00051). A pattern
may be written so that a search takes for ever, so every search has a time limit.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import regex

# A run of letters, digits and their marks, or any other character that is to be seen.
WORD = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
FLAGS = regex.IGNORECASE | regex.UNICODE | regex.MULTILINE
SECONDS = 0.5  # of one search for a pattern
LONGEST_PATTERN = 2000  # characters


class Match(Protocol):
    """Says which passages answer one question."""

    def __call__(self, passage: str) -> bool: ...


def normalized(text: str) -> str:
    """The text with its characters taken apart into letters and accents (NFD)."""
    return unicodedata.normalize("NFD", text)


def words_of(text: str) -> list[str]:
    """The words and marks of a text, in lower case."""
    return [word.lower() for word in WORD.findall(normalized(text))]


class WordMatch:
    """Whether the words of any answer stand in a passage, one behind the other. An answer without words does not."""

    def __init__(self, answers: Sequence[str]) -> None:
        # No word has a blank in it, so a search in the joined words finds whole words only.
        self._answers = [f" {' '.join(words)} " for answer in answers if (words := words_of(answer))]

    def __call__(self, passage: str) -> bool:
        text = f" {' '.join(words_of(passage))} "
        return any(answer in text for answer in self._answers)


@dataclass
class PatternMatch:
    """Whether any answer, taken as a regular expression, is found in a passage; counts searches that took too long.

    An empty one, which is found everywhere, is no answer. Raises ValueError for what is no regular expression.
    """

    answers: Sequence[str]
    seconds: float = SECONDS
    given_up: int = 0
    _patterns: list["regex.Pattern[str]"] = field(init=False)

    def __post_init__(self) -> None:
        for answer in self.answers:
            if len(answer) > LONGEST_PATTERN:
                raise ValueError(f"the pattern {answer[:40]!r}... has {len(answer)} characters, {LONGEST_PATTERN} fit")
        try:
            self._patterns = [regex.compile(normalized(answer), FLAGS) for answer in self.answers if words_of(answer)]
        except regex.error as error:
            raise ValueError(f"{error.pattern!r:.60} is no regular expression: {error}") from error
        except RecursionError as error:
            raise ValueError(f"a pattern of {list(self.answers)!r:.60} is nested too deeply") from error

    def __call__(self, passage: str) -> bool:
        text = normalized(passage)
        return any(self._found(pattern, text) for pattern in self._patterns)

    def _found(self, pattern: "regex.Pattern[str]", text: str) -> bool:
        try:
            return pattern.search(text, timeout=self.seconds) is not None
        except TimeoutError:
            self.given_up += 1
            return False


def hits_at(ranks: Sequence[int | None], count: int) -> list[int]:
    """For each k from 1 to count, how many questions have an answer among their first k passages.

    ranks: of each question's first passage that answers it, from 0; None: there is none.
    """
    hits = [0] * count
    for rank in ranks:
        if rank is not None:
            for k in range(rank, count):
                hits[k] += 1
    return hits
