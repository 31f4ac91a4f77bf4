"""Evidence, questions and DPR's training files: read as they are published, refused by line where they are not."""

import json
from pathlib import Path
from typing import Any

import pytest

from megalith.data.evidence import read_passages
from megalith.data.questions import read_questions, read_training_questions


def test_evidence_is_read_with_quotes_and_without_its_header(tmp_path: Path) -> None:
    path = tmp_path / "evidence.tsv"
    path.write_text('id\ttext\ttitle\n7\t"He said ""no"".\tTwice\nover."\tA title\n\n3\tplain\t\n', encoding="utf-8")
    found = [(p.number, p.id, p.text, p.title) for p in read_passages(path)]
    assert found == [(0, 7, 'He said "no".\tTwice\nover.', "A title"), (1, 3, "plain", "")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"7\ta\tb\n8\tc\td\n", "line 1: is a passage, with the id 7, where names of columns are expected"),
        (b"id\ttext\ttitle\n1\tonly two\n", "line 2: has 2 columns; evidence has id, text and title"),
        (b"id\ttext\ttitle\nx\ta\tb\n", "line 2: the id 'x' is no whole number"),
        (b"id\ttext\ttitle\n-4\ta\tb\n", "line 2: the id -4 is not between 0 and"),
        (b"id\ttext\ttitle\n99999999999999999999\ta\tb\n", "line 2: the id 99999999999999999999 is not between"),
        (b'id\ttext\ttitle\n1\t"' + b"a" * 200_000, "field larger than field limit"),
        (b"id\ttext\ttitle\n1\t\xff\tb\n", "is not UTF-8 text"),
    ],
)
def test_evidence_that_is_none_is_refused_by_its_line(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "evidence.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"evidence.tsv.*{said}"):
        list(read_passages(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (lambda p: list(read_passages(p)), read_questions, lambda p: read_training_questions([p])):
        with pytest.raises(ValueError, match=r"nothing: cannot be read \(No such file or directory\)"):
            read(tmp_path / "nothing")


def test_a_sample_of_the_evidence_is_a_share_of_it_and_the_same_each_time(tmp_path: Path) -> None:
    path = tmp_path / "evidence.tsv"
    path.write_text("id\ttext\ttitle\n" + "".join(f"{n}\tt\tt\n" for n in range(2000)), encoding="utf-8")
    chosen = [passage.id for passage in read_passages(path, sample_rate=0.25, seed=5)]
    assert 420 < len(chosen) < 580 and chosen == sorted(chosen)
    assert chosen == [passage.id for passage in read_passages(path, sample_rate=0.25, seed=5)]
    assert chosen != [passage.id for passage in read_passages(path, sample_rate=0.25, seed=6)]
    assert [p.number for p in read_passages(path, sample_rate=0.25, seed=5)] == list(range(len(chosen)))


def test_questions_are_read_with_their_answers(tmp_path: Path) -> None:
    path = tmp_path / "questions.tsv"
    path.write_text('who?\t[\'A\', "B\'s"]\nwhen?\t"[""1969""]"\n', encoding="utf-8")
    found = [(question.text, question.answers) for question in read_questions(path)]
    assert found == [("who?", ("A", "B's")), ("when?", ("1969",))]


@pytest.mark.parametrize("answer", ["AC/DC", "\U0001d4b3 and \u00e9", 'say "x"'])
def test_answers_in_the_notation_of_json_are_what_it_says(answer: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.tsv"
    notation = json.dumps([answer]).replace("/", "\\/").replace('"', '""')
    path.write_text(f'who?\t"{notation}"\n', encoding="utf-8")
    assert read_questions(path)[0].answers == (answer,)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ("__import__('os').system('true')", "line 1: .* is no list of answers"),
        ("[open('x')]", "is no list of answers"),
        ("'one'", "is no list of texts"),
        ("[1, 2]", "is no list of texts"),
        ("[" * 100_000, "is no list of answers"),
        ("-" * 100_000 + "1", "is no list of answers"),
        ("[''", "is no list of answers"),
    ],
)
def test_answers_are_parsed_and_never_executed(answers: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.tsv"
    path.write_text(f"who?\t{answers}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        read_questions(path)


def entry(**changed: Any) -> dict[str, Any]:
    passage = {"title": "T", "text": "t", "score": 3}
    return {
        "question": "who was it?",
        "answers": ["A"],
        "positive_ctxs": [{**passage, "text": "first"}, passage],
        "hard_negative_ctxs": [{**passage, "text": "hard"}],
        "negative_ctxs": [passage, passage],
        **changed,
    }


def test_training_questions_lose_their_mark_and_keep_their_passages(tmp_path: Path) -> None:
    for number, entries in enumerate(([entry(), entry(positive_ctxs=[])], [entry(question="no mark")])):
        (tmp_path / f"{number}.json").write_text(json.dumps(entries))
    first, second = read_training_questions([tmp_path / "0.json", tmp_path / "1.json"])
    assert (first.text, second.text) == ("who was it", "no mark")
    assert first.positive.text == "first"
    assert [len(first.hard), len(first.others)] == [1, 2]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("{}", "is no list of questions"),
        ("[3]", "entry 0: is no question with passages"),
        (json.dumps([entry(), entry(question=3)]), "entry 1: is no question"),
        (json.dumps([entry(negative_ctxs=[{"title": "T"}])]), "entry 0: is no question"),
        (json.dumps([entry(positive_ctxs=None)]), "entry 0: is no question"),
        (json.dumps([entry(positive_ctxs=[])]), "hold no question with a positive passage"),
    ],
)
def test_training_files_that_are_none_are_refused(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(ValueError, match=f"train.json.*{said}"):
        read_training_questions([tmp_path / "train.json"])
