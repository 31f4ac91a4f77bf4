"""Blends against the rule applied sample by sample."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from megalith.data import blend
from megalith.data.blend import BlendedDataset, blend_order, normalize, parse_data_path, samples_of_each


def by_the_rule(weights: list[float], size: int) -> tuple[list[int], list[int]]:
    """Data sets and samples, one position after the other."""
    taken = [0] * len(weights)
    datasets, samples = [], []
    for position in range(size):
        behind = [weight * max(position, 1) - count for weight, count in zip(weights, taken, strict=True)]
        chosen = behind.index(max(behind))
        datasets.append(chosen)
        samples.append(taken[chosen])
        taken[chosen] += 1
    return datasets, samples


# Equal, ordinary, tiny and zero weights.
WEIGHTS = st.lists(
    st.one_of(st.sampled_from([0.0, 1.0, 1e-3, 1e-6]), st.floats(1e-3, 1.0)), min_size=1, max_size=9
).filter(any)


@given(weights=WEIGHTS, size=st.integers(0, 700), warm_up=st.sampled_from([1, 3, 20, 1024]))
def test_segments_side_by_side_give_the_order_of_the_rule(weights: list[float], size: int, warm_up: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # With short warm-ups most segments begin wrongly and have to be walked again.
        patch.setattr(blend, "SHORTEST_WARM_UP", warm_up)
        patch.setattr(blend, "BLOCK", 64)
        result = blend_order(normalize(weights), size)
    assert (result.datasets.tolist(), result.samples.tolist()) == by_the_rule(normalize(weights), size)


def test_a_long_blend_of_uneven_weights_is_exact() -> None:
    random = np.random.default_rng(0)
    weights = normalize([*random.dirichlet([0.3] * 20), 1e-5, 2e-5, 0.0])
    datasets, samples = by_the_rule(weights, 60_000)
    result = blend_order(weights, 60_000)
    assert np.array_equal(result.datasets, datasets) and np.array_equal(result.samples, samples)


def test_more_data_sets_than_a_byte_can_number_are_blended() -> None:
    weights = normalize([1.0 + number % 7 for number in range(300)])
    datasets, samples = by_the_rule(weights, 2500)
    result = blend_order(weights, 2500)
    assert result.datasets.dtype == np.uint16
    assert np.array_equal(result.datasets, datasets) and np.array_equal(result.samples, samples)


def test_a_blend_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="a blend of 0 data sets"):
        blend_order([], 5)


@pytest.mark.parametrize(
    ("data_path", "message"),
    [
        ([], "must be one prefix"),
        (["0.5", "a", "0.5"], "must be one prefix, or weight prefix"),
        (["a", "0.5"], "'a' stands where a weight must be"),
        (["-1", "a", "2", "b"], "weights="),
        (["0", "a", "0", "b"], "weights="),
        (["nan", "a", "1", "b"], "weights="),
        (["inf", "a", "1", "b"], "weights="),
    ],
)
def test_a_data_path_without_a_meaning_is_refused(data_path: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_data_path(data_path)


def test_a_data_path_is_one_prefix_or_weighted_ones() -> None:
    assert parse_data_path([" corpus "]) == (["corpus"], [1.0])
    assert parse_data_path(["3", "a", "1", " b"]) == (["a", "b"], [0.75, 0.25])


def test_each_data_set_is_asked_for_a_little_more_than_its_share() -> None:
    assert samples_of_each([0.25, 0.75, 0.0], 1000) == [252, 754, 0]


class Numbered:
    """Rows that say where they are from: [number, index, number]."""

    def __init__(self, number: int, size: int, dtype: str = "uint16") -> None:
        self.number, self.size, self.dtype = number, size, dtype

    def __len__(self) -> int:
        return self.size

    def batch(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        assert len(indices) and indices.min() >= 0 and indices.max() < self.size
        numbers = np.full(len(indices), self.number)
        return np.stack([numbers, indices, numbers], axis=1).astype(self.dtype)


def test_rows_come_from_the_data_sets_in_the_blends_order() -> None:
    blended = BlendedDataset([Numbered(0, 31), Numbered(1, 71)], [0.3, 0.7])
    assert len(blended) == 102 and blended.repeated == 0
    positions = np.random.default_rng(1).permutation(102)
    rows = blended.batch(positions)
    datasets, samples = by_the_rule([0.3, 0.7], 102)
    assert rows[:, 0].tolist() == [datasets[position] for position in positions]
    assert rows[:, 1].tolist() == [samples[position] for position in positions]
    assert rows.dtype == np.uint16


def test_a_data_set_that_runs_out_begins_anew_and_is_counted() -> None:
    blended = BlendedDataset([Numbered(0, 10), Numbered(1, 90)], [0.5, 0.5])
    rows = blended.batch(np.arange(100))
    assert blended.repeated == 40
    assert rows[rows[:, 0] == 0][:, 1].tolist() == 5 * list(range(10))


def test_rows_of_different_dtypes_become_wide() -> None:
    blended = BlendedDataset([Numbered(0, 10), Numbered(70000, 10, "int32")], [0.5, 0.5])
    assert blended.batch(np.arange(4)).tolist() == [[0, 0, 0], [70000, 0, 70000], [0, 1, 0], [70000, 1, 70000]]


@pytest.mark.parametrize("positions", [[-1], [20], [0, 25]])
def test_positions_beyond_the_blend_are_refused(positions: list[int]) -> None:
    with pytest.raises(ValueError, match="of a blend that has 20"):
        BlendedDataset([Numbered(0, 10), Numbered(1, 10)], [1, 1]).batch(np.array(positions))


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="data set 1 of the blend has no sample"):
        BlendedDataset([Numbered(0, 10), Numbered(1, 0)], [0.5, 0.5])
