"""Data sets are blended in Megatron-LM's order."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalith.data.blend import blend_order, parse_data_path, samples_of_each

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "blending.json").read_text())["cases"]


def named(case: dict[str, Any]) -> str:
    return "-".join(case["data_path"][0::2])


@pytest.mark.parametrize("case", CASES, ids=named)
def test_weights_and_requests_are_identical(case: dict[str, Any]) -> None:
    prefixes, weights = parse_data_path(case["data_path"])
    assert prefixes == case["prefixes"]
    assert weights == case["normalized_weights"]
    requests = [samples_of_each(weights, num_samples) for num_samples in case["target"]]
    assert [list(request) for request in zip(*requests, strict=True)] == case["per_dataset_train_valid_test"]


@pytest.mark.parametrize("part", ["train", "valid", "test"])
@pytest.mark.parametrize("case", CASES, ids=named)
def test_the_order_is_bit_identical(case: dict[str, Any], part: str) -> None:
    expected = case["blends"][part]
    blend = blend_order(case["normalized_weights"], expected["size"])
    assert [str(blend.datasets.dtype), str(blend.samples.dtype)] == expected["dtype"]
    assert hashlib.sha256(blend.datasets.tobytes()).hexdigest() == expected["dataset_index_sha256"]
    assert hashlib.sha256(blend.samples.tobytes()).hexdigest() == expected["dataset_sample_index_sha256"]
    largest = [blend.samples[blend.datasets == number].max(initial=-1) for number in range(len(case["prefixes"]))]
    assert [None if value < 0 else value for value in map(int, largest)] == expected["max_sample_index_per_dataset"]
    assert expected["size"] == sum(expected["len_per_dataset"]) == len(blend)
    if "counts" in expected:
        assert np.bincount(blend.datasets).tolist() == expected["counts"]
