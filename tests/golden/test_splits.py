"""Documents are split as Megatron-LM splits them."""

import json
from pathlib import Path
from typing import Any

import pytest

from megalith.data.split import split_documents

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "splits.json").read_text())


@pytest.mark.parametrize("split", sorted({case[0] for case in RECORDED["cases"]}))
def test_bounds_are_identical(split: str) -> None:
    cases = [case for case in RECORDED["cases"] if case[0] == split]
    assert cases
    for _, num_documents, bounds in cases:
        parts = split_documents(split, num_documents)
        assert list(parts) == ["train", "valid", "test"]
        assert [parts["train"].start, *(part.stop for part in parts.values())] == bounds
        assert [part.start for part in parts.values()] == bounds[:-1]


@pytest.mark.parametrize("split", [split for split, _ in RECORDED["errors_for_10_documents"]])
def test_what_fails_there_is_refused_here(split: str) -> None:
    with pytest.raises(ValueError, match=r"number|add up"):
        split_documents(split, 10)
