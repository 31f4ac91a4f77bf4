"""Whether a passage answers a question, by words and by patterns."""

import time

import pytest

from megalith.evaluate.answers import PatternMatch, WordMatch, hits_at, words_of


def test_words_are_runs_of_letters_and_digits_and_single_marks() -> None:
    assert words_of("J. R.\u00a0R. (1892-1973), caf\u00e9 \u4e2d\u6587\u0000") == [
        *("j", ".", "r", ".", "r", ".", "(", "1892", "-", "1973", ")", ",", "cafe\u0301", "\u4e2d\u6587")
    ]


@pytest.mark.parametrize(
    ("answers", "passage", "found"),
    [
        (["Neil Armstrong"], "In 1969 NEIL  ARMSTRONG landed.", True),
        (["Neil Armstrong"], "Neil A. Armstrong landed.", False),
        (["arm"], "Neil Armstrong", False),
        (["no such", "landed"], "He landed.", True),
        (["caf\u00e9"], "the cafe\u0301 there", True),
        (["cafe"], "the caf\u00e9 there", False),
        (["U.S."], "in the U. S. of A", True),
        (["a b"], "a. b", False),
        ([""], "anything", False),
        ([], "anything", False),
        (["."], "the end.", True),
    ],
)
def test_an_answer_is_found_as_whole_words_in_order(answers: list[str], passage: str, found: bool) -> None:
    assert WordMatch(answers)(passage) is found


@pytest.mark.parametrize(
    ("pattern", "passage", "found"),
    [
        (r"19(68|69)", "in 1969", True),
        (r"^second", "first\nSecond line", True),
        ("caf\u00e9", "CAFE\u0301", True),
        (r"19(68|69)$", "in 1970", False),
    ],
)
def test_a_pattern_is_searched_without_regard_to_case(pattern: str, passage: str, found: bool) -> None:
    assert PatternMatch([pattern])(passage) is found


def test_a_pattern_that_would_take_for_ever_is_given_up_and_counted() -> None:
    match = PatternMatch([r"^(a|aa)+$"], seconds=0.05)
    began = time.process_time()
    assert match("a" * 200 + "b") is False
    assert match.given_up == 1
    assert time.process_time() - began < 10


def test_an_answer_without_words_is_none_as_a_pattern_either() -> None:
    assert not PatternMatch(["", " "])("a passage of words")
    assert PatternMatch(["", "pass.ge"])("a passage of words")


def test_what_is_no_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="is nested too deeply"):
        PatternMatch(["a" + "(" * 450 + ")" * 450])
    with pytest.raises(ValueError, match=r"'\(a' is no regular expression: missing \)"):
        PatternMatch(["(a"])
    with pytest.raises(ValueError, match="has 3000 characters, 2000 fit"):
        PatternMatch(["a" * 3000])


def test_hits_grow_with_the_number_of_passages_looked_at() -> None:
    assert hits_at([0, None, 2, 2], 4) == [1, 1, 3, 3]
    assert hits_at([], 2) == [0, 0]
