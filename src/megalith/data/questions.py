"""Questions with their answers, to be found in passages: TSV for evaluation, DPR's JSON for training."""

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalith.data.evidence import read_table
from megalith.files import Location

LONGEST_LIST = 1 << 20  # characters of a list of answers
UNREADABLE = (ValueError, SyntaxError, RecursionError, MemoryError, TypeError)  # of a text that is no literal


@dataclass(frozen=True)
class Question:
    """A question and what counts as its answer."""

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Evidence:
    """A passage to learn from."""

    title: str
    text: str


@dataclass(frozen=True)
class TrainingQuestion:
    """A question, the passage that answers it, and some that do not: hard ones, which look as if, and others."""

    text: str
    positive: Evidence
    hard: tuple[Evidence, ...]
    others: tuple[Evidence, ...]


def read_questions(path: Location) -> list[Question]:
    """The questions of a TSV: question, and the answers as a list in Python's or JSON's notation.

    The list is parsed as a literal; nothing is executed. Raises ValueError naming the file, the line and the fault.
    """
    questions = []
    for line, row in read_table(path):
        if len(row) < 2:
            raise ValueError(f"{path}, line {line}: has one column; a question and a list of its answers are needed")
        try:
            if len(row[1]) > LONGEST_LIST:
                raise ValueError("it is too long")
            answers = _list_of(row[1].strip())
        except UNREADABLE as error:
            raise ValueError(f"{path}, line {line}: {row[1][:60]!r} is no list of answers") from error
        if not isinstance(answers, list | tuple) or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"{path}, line {line}: {row[1][:60]!r} is no list of texts")
        questions.append(Question(row[0], tuple(answers)))
    if not questions:
        raise ValueError(f"{path}: holds no question")
    return questions


def _list_of(text: str) -> Any:
    """What stands there in JSON's notation; else in Python's, in which some escapes of JSON mean something else."""
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text)


def read_training_questions(paths: Sequence[Location]) -> list[TrainingQuestion]:
    """The questions of DPR's JSON files, without the question mark at their end; those without a positive are left out.

    Each file is a list of objects with question, positive_ctxs, hard_negative_ctxs and negative_ctxs, and these lists
    of objects with title and text. Raises ValueError naming the file and the entry that is wrong.
    """
    questions: list[TrainingQuestion] = []
    for path in paths:
        try:
            entries = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: is no JSON ({error})") from error
        if not isinstance(entries, list):
            raise ValueError(f"{path}: is no list of questions; DPR's training files are wanted")
        for number, entry in enumerate(entries):
            try:
                question = _question_of(entry)
            except (KeyError, TypeError) as error:
                raise ValueError(f"{path}, entry {number}: is no question with passages ({error!r:.80})") from error
            if question is not None:
                questions.append(question)
    if not questions:
        raise ValueError(f"{', '.join(map(str, paths))}: hold no question with a positive passage")
    return questions


def _question_of(entry: Any) -> TrainingQuestion | None:
    positives, hard, others = (
        tuple(_evidence_of(passage) for passage in (entry[name] if name == "positive_ctxs" else entry.get(name, ())))
        for name in ("positive_ctxs", "hard_negative_ctxs", "negative_ctxs")
    )
    text = _text(entry["question"]).removesuffix("?")
    return TrainingQuestion(text, positives[0], hard, others) if positives else None


def _evidence_of(passage: Any) -> Evidence:
    return Evidence(_text(passage["title"]), _text(passage["text"]))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no text")
    return value
