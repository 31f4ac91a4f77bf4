"""A loader gives every replica its part of every step, in the background or not, and hides no error."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from megalith.data.loader import Loader
from megalith.data.order import CyclicOrder, SingleOrder


class Counted:
    """A source whose batches say which samples they are; reading one with a forbidden index fails."""

    def __init__(self, size: int = 1000, forbidden: int = -1, seconds: float = 0.0) -> None:
        self.size, self.forbidden, self.seconds = size, forbidden, seconds
        self.read_by: list[str] = []

    def __len__(self) -> int:
        return self.size

    def read(self, indices: NDArray[np.int64], samples: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        self.read_by.append(threading.current_thread().name)
        time.sleep(self.seconds)
        if self.forbidden in indices:
            raise ValueError(f"sample {self.forbidden} cannot be read")
        tokens_BT = indices[:, None] * 10 + np.arange(4)
        return {"tokens": tokens_BT, "samples": samples.copy()}


def background_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("megalith-loader")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not background_threads()


def samples_of(batches: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    return [batch["samples"].tolist() for batch in batches]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_replicas_get_the_stretches_of_each_microbatch(prefetch: int) -> None:
    for replica in range(2):
        with Loader(
            Counted(), SingleOrder(1000), micro_batch_size=2, replica=replica, data_parallel=2, prefetch=prefetch
        ) as loader:
            for step in range(5):
                start = 12 * step
                batches = loader.step_batch(start, 3)
                expected = [[start + 4 * number + 2 * replica + place for place in range(2)] for number in range(3)]
                assert samples_of(batches) == expected
                assert [batch["tokens"][:, 0].tolist() for batch in batches] == [[10 * x for x in e] for e in expected]
                assert all(batch["tokens"].shape == (2, 4) and batch["tokens"].is_contiguous() for batch in batches)


@given(
    steps=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    prefetch=st.integers(0, 2),
    cyclic=st.booleans(),
    micro=st.sampled_from([1, 2, 3]),
    data_parallel=st.sampled_from([1, 2, 4]),
)
def test_a_step_has_the_same_samples_on_any_number_of_replicas(
    steps: list[int], prefetch: int, cyclic: bool, micro: int, data_parallel: int
) -> None:
    order = CyclicOrder(37) if cyclic else SingleOrder(1000)
    with ExitStack() as opened:
        loaders = [
            opened.enter_context(
                Loader(
                    Counted(),
                    order,
                    micro_batch_size=micro,
                    replica=replica,
                    data_parallel=data_parallel,
                    prefetch=prefetch,
                )
            )
            for replica in range(data_parallel)
        ]
        consumed = 0
        for multiple in steps:
            size = 24 * multiple
            batches = [b for loader in loaders for b in loader.step_batch(consumed, size // (micro * data_parallel))]
            drawn = {
                int(sample): int(tokens[0]) // 10
                for batch in batches
                for sample, tokens in zip(batch["samples"], batch["tokens"], strict=True)
            }
            assert len(drawn) == size == sum(len(batch["samples"]) for batch in batches)
            expected = order.global_indices(consumed, size).tolist()
            assert [drawn[position] for position in range(consumed, consumed + size)] == expected
            consumed += size


def test_the_next_step_is_read_while_this_one_is_computed() -> None:
    source = Counted()
    with Loader(source, SingleOrder(1000), micro_batch_size=1, replica=0, data_parallel=1, prefetch=2) as loader:
        loader.step_batch(0, 4)
        deadline = time.monotonic() + 10
        while len(source.read_by) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(source.read_by) == 3
        assert samples_of(loader.step_batch(4, 4)) == [[4], [5], [6], [7]]
        assert samples_of(loader.step_batch(8, 4)) == [[8], [9], [10], [11]]
        assert len(background_threads()) == 1
    assert len(set(source.read_by)) == 1 and source.read_by[0].startswith("megalith-loader")


def test_steps_that_were_not_guessed_are_read_all_the_same() -> None:
    with Loader(Counted(), SingleOrder(1000), micro_batch_size=2, replica=0, data_parallel=1) as loader:
        for consumed, num_microbatches in [(0, 2), (4, 2), (8, 3), (14, 1), (0, 2), (500, 1), (4, 2)]:
            batches = loader.step_batch(consumed, num_microbatches)
            assert [sample for samples in samples_of(batches) for sample in samples] == list(
                range(consumed, consumed + 2 * num_microbatches)
            )


def test_wrong_guesses_are_not_kept() -> None:
    with Loader(Counted(), SingleOrder(1000), micro_batch_size=1, replica=0, data_parallel=1, prefetch=3) as loader:
        for consumed in (0, 300, 100, 700, 200):
            loader.step_batch(consumed, 5)
            assert sorted(loader._ready) == [(consumed + 5 * ahead, 5) for ahead in (1, 2, 3)]


def test_without_prefetch_no_thread_is_made() -> None:
    source = Counted()
    with Loader(source, SingleOrder(9), micro_batch_size=1, replica=0, data_parallel=1, prefetch=0) as loader:
        loader.step_batch(0, 1)
        assert not background_threads()
    assert source.read_by == [threading.current_thread().name]


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_an_error_is_raised_by_the_step_that_it_belongs_to(prefetch: int) -> None:
    source = Counted(forbidden=5)
    with Loader(source, SingleOrder(9), micro_batch_size=1, replica=0, data_parallel=1, prefetch=prefetch) as loader:
        assert samples_of(loader.step_batch(3, 2)) == [[3], [4]]
        for _ in range(2):
            with pytest.raises(ValueError, match="sample 5 cannot be read"):
                loader.step_batch(5, 2)
        assert samples_of(loader.step_batch(7, 2)) == [[7], [8]]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_end_of_the_data_is_an_error_only_for_the_step_beyond_it(prefetch: int) -> None:
    with Loader(
        Counted(9), SingleOrder(9), micro_batch_size=1, replica=0, data_parallel=1, prefetch=prefetch
    ) as loader:
        assert samples_of(loader.step_batch(6, 3)) == [[6], [7], [8]]
        with pytest.raises(ValueError, match="the data set ends after 9"):
            loader.step_batch(9, 3)


def test_closing_does_not_wait_for_steps_that_nobody_wants() -> None:
    loader = Loader(
        Counted(seconds=0.1), SingleOrder(10**6), micro_batch_size=1, replica=0, data_parallel=1, prefetch=50
    )
    loader.step_batch(0, 1)
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 2
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        loader.step_batch(1, 1)


@pytest.mark.parametrize("sizes", [(2, 2, 1, 1), (-1, 2, 1, 1), (0, 1, 0, 1), (0, 1, 1, -1)])
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int, int]) -> None:
    replica, data_parallel, micro, prefetch = sizes
    with pytest.raises(ValueError, match=f"replica={replica} .*micro_batch_size={micro}"):
        Loader(
            Counted(),
            SingleOrder(9),
            micro_batch_size=micro,
            replica=replica,
            data_parallel=data_parallel,
            prefetch=prefetch,
        )


def test_the_tensors_share_the_memory_of_the_arrays_that_were_read() -> None:
    with Loader(Counted(), SingleOrder(99), micro_batch_size=2, replica=0, data_parallel=1, prefetch=0) as loader:
        first, second = loader.step_batch(0, 2)
        assert second["tokens"].data_ptr() - first["tokens"].data_ptr() == 2 * 4 * 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("prefetch", [0, 1])
def test_pinned_batches_lie_in_page_locked_memory(prefetch: int) -> None:
    with Loader(
        Counted(), SingleOrder(99), micro_batch_size=2, replica=0, data_parallel=1, prefetch=prefetch, pinned=True
    ) as loader:
        for batch in loader.step_batch(0, 2):
            assert all(tensor.is_pinned() for tensor in batch.values())
