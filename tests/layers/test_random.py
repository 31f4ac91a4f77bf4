"""The numbers drawn by counter look random in every direction that training could notice, and are the same everywhere.

Statistics are compared with their standard error under independence; seeds are fixed, so a test cannot fail by chance.
"""

import math
import zlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megalith.layers.random import (
    dropout_rows,
    fill_normal,
    fill_uniform,
    keep_mask,
    key,
    mix,
    number_words,
    rows_for,
    uniform_at,
)

PROBABILITIES = [0.01, 0.1, 0.5]


def dropped(probability: float, *, role: str = "attention", seed: int = 1234) -> Tensor:
    """float BTW: 1 where dropped, less its mean."""
    rows = rows_for(dropout_rows(seed, torch.arange(16), 128), key("layer", 0, role))
    return (~keep_mask(rows, number_words(256), probability)).double() - probability


def deviation(products: Tensor, variance: float) -> float:
    """The sum in standard errors, for independent terms of mean 0."""
    return float(products.sum()) / math.sqrt(variance * products.numel())


def test_keys_depend_on_all_parts_and_on_where_one_ends() -> None:
    parts: list[tuple[int | str, ...]] = [(1,), (2,), ("1",), (1, 2), (12,), ("1", "2"), ("12",), ("", "12"), (1, "2")]
    keys = {key(*each) for each in parts}
    assert len(keys) == len(parts)
    assert all(-(2**63) <= each < 2**63 for each in keys)


def test_keys_are_the_same_in_every_process() -> None:
    # Made once by hashlib.blake2b(digest_size=8) of length and text of each part. Python's own hash is salted.
    assert key(1234, "layers.3.attention.qkv.weight") == -4494245647520086293


def test_mixing_is_one_to_one_and_each_input_bit_flips_half_of_the_output() -> None:
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    assert mix(words).unique().numel() == words.numel()
    for bit in range(32):
        flip = torch.tensor(1 << bit).to(torch.int32)
        changed = mix(words) ^ mix(words ^ flip)
        share = torch.stack([(changed >> place & 1).double().mean() for place in range(32)])
        assert float((share - 0.5).abs().max()) < 0.05, bit


def test_mixing_is_the_published_hash() -> None:
    # By hand with Python's integers: shifts 16, 15, 15 and multipliers 0x21F0AAAD, 0xD35A2D97.
    def by_hand(word: int) -> int:
        word = (word ^ word >> 16) * 0x21F0AAAD % 2**32
        word = (word ^ word >> 15) * 0xD35A2D97 % 2**32
        return word ^ word >> 15

    words = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xDEADBEEF]
    mixed = mix(torch.tensor(words).to(torch.int32)).to(torch.int64) % 2**32
    assert mixed.tolist() == [by_hand(word) for word in words]


@pytest.mark.parametrize("probability", PROBABILITIES)
def test_masks_drop_the_given_share_of_every_token_and_feature(probability: float) -> None:
    mask = dropped(probability)
    variance = probability * (1 - probability)
    assert abs(deviation(mask, variance)) < 3
    # Shares per token and per feature scatter as independent draws do: chi-square, in units of its standard error.
    for dims, count in (((2,), 256), ((0, 1), 2048)):
        chi_square = mask.mean(dims).square() / (variance / count)
        # Its variance is 2 plus the excess kurtosis of one draw, divided by the count.
        scatter = 2 + (1 / variance - 6) / count
        assert abs(deviation(chi_square - 1, scatter)) < 3.5


@pytest.mark.parametrize("probability", PROBABILITIES)
def test_masks_of_neighbours_layers_roles_and_seeds_are_independent(probability: float) -> None:
    mask = dropped(probability)
    others = {
        "next feature": (mask[..., 1:], mask[..., :-1]),
        "feature 64 on": (mask[..., 64:], mask[..., :-64]),
        "next token": (mask[:, 1:], mask[:, :-1]),
        "next sample": (mask[1:], mask[:-1]),
        "other role": (mask, dropped(probability, role="feed-forward")),
        "other seed": (mask, dropped(probability, seed=1235)),
    }
    variance = (probability * (1 - probability)) ** 2
    for name, (left, right) in others.items():
        assert abs(deviation(left * right, variance)) < 3.5, name
    # The exclusive or of a token's and a feature's word sums to 0 over a rectangle; the hash must not show it.
    corners = mask[:, 1:, 1:] * mask[:, :-1, 1:] * mask[:, 1:, :-1] * mask[:, :-1, :-1]
    assert abs(deviation(corners, variance**2)) < 3.5


@pytest.mark.parametrize("bit", range(0, 32, 3))
def test_masks_of_words_that_differ_in_one_bit_are_independent(bit: int) -> None:
    rows = torch.arange(1 << 16, dtype=torch.int32)
    words = torch.tensor([0, 1 << bit]).to(torch.int32)
    mask = (~keep_mask(rows, words, 0.5)).double() - 0.5
    assert abs(deviation(mask[:, 0] * mask[:, 1], 0.25**2)) < 3.5


def test_rows_depend_on_sample_and_place_alone() -> None:
    samples = torch.tensor([5, 2**40 + 5, 0, 2**33])
    rows = dropout_rows(1234, samples, 32)
    assert rows.dtype == torch.int32
    assert torch.equal(dropout_rows(1234, samples[[2]], 32), rows[[2]])
    assert torch.equal(dropout_rows(1234, samples, 8, first_place=16), rows[:, 16:24])
    assert rows.unique().numel() == rows.numel()


def test_no_two_of_many_samples_share_their_masks() -> None:
    rows = rows_for(dropout_rows(1234, torch.arange(1 << 16), 1), key("layer", 0, "attention"))
    assert rows.unique().numel() == 1 << 16


def test_masks_have_the_bits_that_they_always_had() -> None:
    rows = rows_for(dropout_rows(1234, torch.tensor([5, 2**40 + 5]), 64, first_place=3), key("layers", 2, "attention"))
    mask = keep_mask(rows, number_words(96), 0.1)
    assert [zlib.crc32(tensor.numpy().tobytes()) for tensor in (rows, mask)] == [1918006115, 1232170877]


def test_a_probability_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"probability 1.0 is not in \[0, 1\)"):
        keep_mask(torch.zeros(1, dtype=torch.int32), number_words(1), 1.0)


def test_normal_numbers_have_the_moments_and_distribution_of_a_normal() -> None:
    draws = torch.empty(1 << 18, dtype=torch.float64)
    fill_normal(draws, key(1234, "weight"), std=1.0)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(deviation(draws**power - moment, variance)) < 3.5, power
    # Kolmogorov and Smirnov: below 1.63 in 99 of 100 cases.
    ordered = 0.5 * (1 + torch.erf(draws.sort().values / math.sqrt(2)))
    steps = (torch.arange(len(draws)) + 0.5) / len(draws)
    assert float((ordered - steps).abs().max()) * math.sqrt(len(draws)) < 1.63
    assert abs(deviation(draws[1:] * draws[:-1], 1)) < 3.5


def test_uniform_numbers_fill_their_range_evenly() -> None:
    draws = torch.empty(1 << 18, dtype=torch.float64)
    fill_uniform(draws, key(1234, "weight"), bound=0.5)
    assert -0.5 < float(draws.min()) < -0.499
    assert 0.499 < float(draws.max()) < 0.5
    counts = torch.histc(draws, bins=64, min=-0.5, max=0.5)
    expected = len(draws) / 64
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - 63) < 3.5 * math.sqrt(2 * 63)


def test_weights_of_different_names_are_independent() -> None:
    draws = torch.empty(2, 1 << 18, dtype=torch.float64)
    fill_normal(draws[0], key(1234, "layers.0.attention.qkv.weight"), std=1.0)
    fill_normal(draws[1], key(1234, "layers.1.attention.qkv.weight"), std=1.0)
    assert abs(deviation(draws[0] * draws[1], 1)) < 3.5


@pytest.mark.parametrize(
    "fill",
    [lambda part, **at: fill_normal(part, 7, std=0.02, **at), lambda part, **at: fill_uniform(part, 7, bound=1, **at)],
)
def test_a_shard_drawn_alone_is_bitwise_the_slice_of_the_whole(fill: Callable[..., None]) -> None:
    whole = torch.empty(12, 10, 6)
    fill(whole)
    for rows, columns, deep in ((slice(0, 3), slice(0, 10), slice(0, 6)), (slice(5, 12), slice(3, 4), slice(2, 5))):
        expected = whole[rows, columns, deep]
        shard = torch.empty(expected.shape)
        fill(shard, whole=whole.shape, offset=(rows.start, columns.start, deep.start))
        assert torch.equal(shard, expected)


def test_a_shard_is_the_slice_also_where_the_weight_is_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, shard = torch.empty(50, 13), torch.empty(50, 13)
    fill_normal(whole, 7, std=1.0)
    monkeypatch.setattr("megalith.layers.random._CHUNK", 17)
    fill_normal(shard, 7, std=1.0)
    assert torch.equal(shard, whole)


def test_shards_of_weights_with_more_than_2_to_32_elements_are_all_different() -> None:
    shape = (3 * 2**20, 2**12)  # 12.9e9 elements
    offsets = [(0, 0), (2**20, 0), (2**21, 0), (3 * 2**20 - 1, 0)]
    shards = torch.empty(4, 1, 2**12)
    for shard, offset in zip(shards, offsets, strict=True):
        fill_normal(shard, 7, std=1.0, whole=shape, offset=offset)
    # Rows 2^20 and 2^21 begin at elements 2^32 and 2^33: what counts in 32 bits would repeat there.
    assert len({tuple(shard.flatten().tolist()) for shard in shards}) == 4
    assert abs(float(shards.mean())) < 3 / math.sqrt(shards.numel())


def test_weights_have_the_bits_that_they_always_had() -> None:
    # Made by the first version, in pieces of 2^18: a run's seed must go on to mean the same weights.
    whole, shard, even = torch.empty(300001), torch.empty(1000, 77), torch.empty(1000, 77)
    fill_normal(whole, key(1234, "weight", "layers.0.attention.qkv.weight"), std=0.02)
    fill_normal(shard, key(7), std=0.5, whole=[5000, 100], offset=[1234, 5])
    fill_uniform(even, key(7), bound=0.5, whole=[5000, 100], offset=[1234, 5])
    digests = [zlib.crc32(tensor.numpy().tobytes()) for tensor in (whole, shard, even)]
    assert digests == [2452564417, 1242170691, 2343538528]


def test_a_shard_outside_the_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 2\) at offset \(7, 0\) does not lie inside \(10, 2\)"):
        fill_normal(torch.empty(4, 2), 7, std=1.0, whole=(10, 2), offset=(7, 0))


def test_single_uniform_numbers_are_in_the_open_unit_interval_and_differ_by_index() -> None:
    draws = torch.tensor([uniform_at(key(1, "sample"), index) for index in range(2000)])
    assert 0 < float(draws.min()) < 0.01
    assert 0.99 < float(draws.max()) < 1
    assert abs(deviation(draws - 0.5, 1 / 12)) < 3


def test_masks_survive_the_compiler() -> None:
    rows = dropout_rows(1234, torch.arange(2), 8)
    compiled = torch.compile(keep_mask, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(rows, number_words(16), 0.3), keep_mask(rows, number_words(16), 0.3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_masks_and_weights_are_the_same_on_a_gpu() -> None:
    samples = torch.arange(5)
    rows = dropout_rows(1234, samples, 64)
    on_gpu = dropout_rows(1234, samples.cuda(), 64)
    assert torch.equal(on_gpu.cpu(), rows)
    words = number_words(128, device=torch.device("cuda"))
    assert torch.equal(keep_mask(on_gpu, words, 0.1).cpu(), keep_mask(rows, number_words(128), 0.1))
    weight, weight_on_gpu = torch.empty(1 << 20), torch.empty(1 << 20, device="cuda")
    fill_normal(weight, 7, std=0.02)
    fill_normal(weight_on_gpu, 7, std=0.02)
    # The last bit of a logarithm may differ before the rounding to fp32: at most a few elements in 10^9.
    assert int((weight_on_gpu.cpu() != weight).sum()) <= 1
