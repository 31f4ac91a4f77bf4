"""Index maps against a plain walk over the documents, and the arithmetic of epochs against counting."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from megalith.data import index_maps
from megalith.data.index_maps import IndexMaps, build_index_maps, plan_epochs


def walk(doc_idx: list[int], lengths: list[int], sequence_length: int, num_samples: int) -> list[list[int]]:
    """The sample index as Megatron-LM's description has it: go along the documents, counting off tokens."""
    rows = [[0, 0]]
    place = offset = 0
    for _ in range(num_samples):
        wanted = sequence_length + 1
        while True:
            left = lengths[doc_idx[place]] - offset
            if wanted <= left:
                # The sample's last token is also the next one's first.
                offset += wanted - 1
                break
            wanted -= left
            place += 1
            offset = 0
        rows.append([place, offset])
    return rows


def shuffle(values: list[int], draws: np.random.RandomState) -> None:
    """The legacy shuffle, in place: masked 32-bit draws, again while too large."""
    for last in range(len(values) - 1, 0, -1):
        mask = (1 << last.bit_length()) - 1
        while (other := int(draws.randint(0, 2**32, dtype=np.uint32)) & mask) > last:
            pass
        values[last], values[other] = values[other], values[last]


def built(lengths: list[int], num_samples: int, sequence_length: int, seed: int = 1) -> IndexMaps:
    return build_index_maps(
        np.arange(len(lengths), dtype=np.int32),
        np.array(lengths, np.int32),
        num_samples=num_samples,
        sequence_length=sequence_length,
        seed=seed,
    )


LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)


@given(lengths=LENGTHS, num_samples=st.integers(0, 60), sequence_length=st.integers(1, 40), block=st.integers(1, 20))
def test_samples_start_where_a_walk_finds_them(
    lengths: list[int], num_samples: int, sequence_length: int, block: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_maps, "BLOCK", block)
        maps = built(lengths, num_samples, sequence_length)
    assert len(maps) >= num_samples
    assert maps.sample_idx.tolist() == walk(maps.doc_idx.tolist(), lengths, sequence_length, len(maps))


@given(lengths=LENGTHS, num_samples=st.integers(0, 60), sequence_length=st.integers(1, 40), seed=st.integers(0, 9))
def test_shuffles_are_the_documented_ones(
    lengths: list[int], num_samples: int, sequence_length: int, seed: int
) -> None:
    maps = built(lengths, num_samples, sequence_length, seed)
    draws = np.random.RandomState(seed)
    documents, plan = list(range(len(lengths))), maps.plan
    last = 1 if maps.separate_last_epoch else 0
    first_documents, last_documents = documents * (maps.epochs - last), documents * last
    shuffle(first_documents, draws)
    shuffle(last_documents, draws)
    assert maps.doc_idx.tolist() == first_documents + last_documents
    end = plan.samples_before_last_epoch if maps.separate_last_epoch else plan.samples
    first_samples, last_samples = list(range(end)), list(range(end, plan.samples))
    shuffle(first_samples, draws)
    shuffle(last_samples, draws)
    assert maps.shuffle_idx.tolist() == first_samples + last_samples


@given(tokens=st.integers(1, 200), num_samples=st.integers(0, 300), sequence_length=st.integers(1, 100))
def test_the_fewest_epochs_are_found(tokens: int, num_samples: int, sequence_length: int) -> None:
    epochs = 1
    while (epochs * tokens - 1) // sequence_length < num_samples:
        epochs += 1
    plan = plan_epochs(tokens, num_samples=num_samples, sequence_length=sequence_length)
    assert plan.epochs == epochs
    assert plan.samples == (epochs * tokens - 1) // sequence_length
    if epochs == 1:
        assert not plan.separate_last_epoch
    else:
        assert plan.last_epoch_samples == num_samples - ((epochs - 1) * tokens - 1) // sequence_length
        assert plan.separate_last_epoch == (plan.last_epoch_samples < int(0.80 * ((tokens - 1) // sequence_length)))


def test_a_part_draws_only_from_its_documents() -> None:
    lengths = np.array([5, 9, 7, 8, 6], np.int32)
    documents = np.array([2, 3], np.int32)
    maps = build_index_maps(documents, lengths, num_samples=20, sequence_length=4, seed=3)
    assert sorted(set(maps.doc_idx.tolist())) == [2, 3]
    assert maps.plan.tokens_per_epoch == 15


def test_very_many_samples_take_wide_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """2^32 samples cannot be made here; the limit can be moved."""

    assert np.iinfo(np.uint32).max - 1 == index_maps.WIDE_SAMPLES
    monkeypatch.setattr(index_maps, "WIDE_SAMPLES", 29)
    plan = plan_epochs(29, num_samples=0, sequence_length=1)
    assert index_maps.shuffle_samples(plan, np.random.RandomState(0)).dtype == np.uint32
    plan = plan_epochs(30, num_samples=0, sequence_length=1)
    assert index_maps.shuffle_samples(plan, np.random.RandomState(0)).dtype == np.int64


@pytest.mark.parametrize(
    ("lengths", "num_samples", "sequence_length", "message"),
    [
        ([0, 0], 5, 8, "5 samples cannot be drawn from documents without a token"),
        ([], 5, 8, "5 samples cannot be drawn from documents without a token"),
        ([4], 5, 0, "sequence_length=0"),
        ([4], -1, 8, "num_samples=-1"),
        ([1] * 9, 2**31, 1, "more than the 2\\^31 places of an index map"),
    ],
)
def test_what_cannot_be_built_is_refused(
    lengths: list[int], num_samples: int, sequence_length: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        built(lengths, num_samples, sequence_length)


@pytest.mark.parametrize("documents", [[0, 3], [-1, 1]])
def test_documents_that_do_not_exist_are_refused(documents: list[int]) -> None:
    ids: NDArray[np.int32] = np.array(documents, np.int32)
    with pytest.raises(ValueError, match="are not all among the 3 items"):
        build_index_maps(ids, np.array([1, 2, 3], np.int32), num_samples=1, sequence_length=1, seed=0)


@pytest.mark.parametrize(("num_documents", "length"), [(1_000_000, 6), (100, 60_000), (1, 3_000_000)])
def test_memory_is_in_proportion_to_the_result(num_documents: int, length: int) -> None:
    documents = np.arange(num_documents, dtype=np.int32)
    lengths = np.full(num_documents, length, np.int32)
    tracemalloc.start()
    try:
        maps = build_index_maps(documents, lengths, num_samples=500_000, sequence_length=16, seed=1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    result = maps.doc_idx.nbytes + maps.sample_idx.nbytes + maps.shuffle_idx.nbytes
    blocks = 16 * 8 * index_maps.BLOCK
    assert peak < 1.5 * result + blocks, (peak, result)
