"""A split gives every document to exactly one part."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.data.split import parse_split, split_documents


@given(
    shares=st.lists(st.floats(0, 1e6), min_size=1, max_size=4).filter(lambda shares: sum(shares[:3]) > 0),
    num_documents=st.integers(0, 10**7),
)
def test_parts_follow_each_other_and_cover_all_documents(shares: list[float], num_documents: int) -> None:
    train, valid, test = split_documents(",".join(map(repr, shares)), num_documents).values()
    assert train.start == 0 and train.stop == valid.start and valid.stop == test.start and test.stop == num_documents
    assert train.start <= train.stop <= valid.stop <= test.stop


@given(shares=st.tuples(st.integers(1, 99), st.integers(1, 99), st.integers(1, 99)))
def test_parts_have_their_shares_up_to_rounding(shares: tuple[int, int, int]) -> None:
    parts = split_documents("/".join(map(str, shares)), 100_000)
    for share, part in zip(shares, parts.values(), strict=True):
        assert abs(len(part) - 100_000 * share / sum(shares)) <= 1.5


def test_rounding_never_takes_documents_from_before_the_first() -> None:
    """Half of 3 is rounded to 2 twice: one too many, which the empty training part cannot give back."""
    assert split_documents("0,1,1", 3) == {"train": range(0, 0), "valid": range(0, 1), "test": range(1, 3)}


@pytest.mark.parametrize(
    ("split", "shares"),
    [("969, 30, 1", (0.969, 0.03, 0.001)), ("90/5/5", (0.9, 0.05, 0.05)), ("7", (1, 0, 0)), ("1,0,1,9", (0.5, 0, 0.5))],
)
def test_shares_are_written_in_several_ways(split: str, shares: tuple[float, float, float]) -> None:
    assert parse_split(split) == pytest.approx(shares)


@pytest.mark.parametrize("split", ["-1,2,1", "nan,1,1", "inf,1,1", "1,,2", "0", "1e308,1e308,1", "90;10", "1,2,3,x"])
def test_shares_without_a_meaning_are_refused(split: str) -> None:
    with pytest.raises(ValueError, match=r"number|add up"):
        parse_split(split)
