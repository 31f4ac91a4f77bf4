"""Where sentences end."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.data.sentences import split_sentences

CASES = {
    "ends of sentences": ["It rained.", "Did it?", "It did!", "What?!", "So..."],
    "titles": ["Dr. Smith met Mrs. Jones vs. the State.", "She won."],
    "abbreviations inside": ["Use a tool, e.g. Python or i.e. Nothing else.", "Done."],
    "initials": ["J. R. R. Tolkien and George W. Bush met.", "They spoke."],
    "abbreviations that may end": ["He works at Foo Inc.", "The pay is fine, etc.", "It is 5 p.m.", "Go."],
    "abbreviations followed by lower case": ["Foo Inc. is a firm and so on etc. as they say."],
    "numbers of things": ["See Fig. 3, No. 5 and pp. 12 to 14.", "It was on Jan. 5."],
    "numbers": ["It costs 3.50 dollars at www.example.com.", "Version 1.2.3 is out.", "It was 1984.", "20 more came."],
    "quotes": [
        '"Stop!"',
        "(He did.)",
        "\u201cWhy?\u201d",
        "\u2018So.\u2019",
        "He said \u201cyes.\u201d",
        "\u00abBon.\u00bb",
        "Fin.",
    ],
    "speech that goes on": ['"Really?" he asked.', '"Yes!" she said.', '"Oh... well," he said.'],
    "an ellipsis": ["He waited... and went\u2026 on.", "Then\u2026", "Nothing."],
    "a list": ["1. First we go.", "2. Then we stop.", "Done."],
    "Chinese": [
        "\u4eca\u5929\u5f88\u597d\u3002",
        "\u8d70\u5427\uff01",
        "\u300c\u597d\u3002\u300d",
        "\u4ed6\u8bf4\u3002",
    ],
    "Hindi": ["\u092f\u0939 \u090f\u0915 \u0939\u0948\u0964", "\u092f\u0939 \u0926\u094b \u0939\u0948\u0964"],
    "Arabic": ["\u0643\u064a\u0641 \u062d\u0627\u0644\u0643\u061f", "\u0628\u062e\u064a\u0631."],
    "Russian": ["\u041f\u0440\u0438\u0432\u0435\u0442.", "\u041a\u0430\u043a \u0434\u0435\u043b\u0430?"],
}


@pytest.mark.parametrize("name", CASES)
def test_sentences_are_told_apart(name: str) -> None:
    sentences = CASES[name]
    between = "" if name == "Chinese" else " "
    assert split_sentences(between.join(sentences)) == sentences


def test_a_blank_line_ends_a_sentence() -> None:
    assert split_sentences("A heading\n\nThe text\nof it. More\n \nEnd") == [
        "A heading",
        "The text\nof it.",
        "More",
        "End",
    ]


def test_a_list_of_lines_keeps_its_numbers() -> None:
    assert split_sentences("Do this:\n1. Sit.\n2. Wait.") == ["Do this:\n1. Sit.", "2. Wait."]


def test_nothing_has_no_sentence() -> None:
    assert split_sentences("") == split_sentences(" \n\n ") == []


def test_newlines_are_kept_at_the_end_of_the_sentence_before() -> None:
    assert split_sentences("One.\n\n  Two.\nThree. ", keep_newlines=True) == ["One.\n\n  ", "Two.\n", "Three. "]


@given(st.text(st.sampled_from('Ab1.!?\u2026\u3002"\u201d) \n\t'), max_size=60))
def test_sentences_with_their_newlines_are_the_text(text: str) -> None:
    kept = split_sentences(text, keep_newlines=True)
    assert "".join(kept) == text
    assert all(kept)
    assert [sentence.strip() for sentence in kept if sentence.strip()] == split_sentences(text)


@pytest.mark.parametrize("unit", [".", " ", "\n", "a. ", "\n ", '."', "A.B.", "?!", "1. ", "\u3002", ". \n"])
def test_no_text_takes_quadratic_time(unit: str) -> None:
    begin = time.process_time()
    split_sentences(unit * 200_000 + "x")
    assert time.process_time() - begin < 3
