"""The order of samples is a pure function of how many were drawn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.data.order import CyclicOrder, OnceOrder, Order, RoundOrder, SingleOrder, deal, sample_counts


@given(
    total=st.integers(1, 60),
    cyclic=st.booleans(),
    cuts=st.lists(st.integers(0, 13), max_size=12),
    start=st.integers(0, 9),
)
def test_the_order_does_not_depend_on_how_it_is_cut_into_steps(
    total: int, cyclic: bool, cuts: list[int], start: int
) -> None:
    def order() -> Order:
        return CyclicOrder(total) if cyclic else SingleOrder(1000)

    whole = order().global_indices(start, sum(cuts)).tolist()
    pieces, consumed, kept = [], start, order()
    for count in cuts:
        pieces += kept.global_indices(consumed, count).tolist()
        # Resumed from the number alone.
        assert order().global_indices(consumed, count).tolist() == pieces[len(pieces) - count :]
        consumed += count
    assert pieces == whole


def test_all_samples_are_measured_once_and_places_behind_them_have_none() -> None:
    order = OnceOrder(5)
    assert [order.global_indices(first, 4).tolist() for first in (0, 4, 8)] == [[0, 1, 2, 3], [4, -1, -1, -1], [-1] * 4]


def test_an_evaluation_begins_anew_after_the_last_sample() -> None:
    assert [RoundOrder(5).global_indices(first, 4).tolist() for first in (0, 4)] == [[0, 1, 2, 3], [4, 0, 1, 2]]


@given(total=st.integers(1, 50), micro=st.integers(1, 3), replicas=st.integers(1, 3))
def test_every_epoch_of_the_cyclic_order_draws_each_sample_once(total: int, micro: int, replicas: int) -> None:
    group = micro * replicas
    whole = total // group * group
    if not whole:
        with pytest.raises(ValueError, match="too small for micro_batch_size"):
            CyclicOrder(total, micro_batch_size=micro, data_parallel=replicas)
        return
    order = CyclicOrder(total, micro_batch_size=micro, data_parallel=replicas)
    epochs = order.global_indices(0, 3 * whole).reshape(3, whole)
    assert (np.sort(epochs, axis=1) == np.arange(whole)).all()
    # Steps may go back and forth between epochs.
    assert np.array_equal(order.global_indices(0, whole), epochs[0])


def test_our_cyclic_order_is_megatrons_on_one_replica_where_batches_come_out_even() -> None:
    reference = CyclicOrder(24, micro_batch_size=4, data_parallel=1)
    assert np.array_equal(CyclicOrder(24).global_indices(8, 72), reference.global_indices(8, 72))


def test_only_the_last_epochs_are_remembered() -> None:
    order = CyclicOrder(10)
    for step in range(20):
        order.global_indices(5 * step, 10)
    assert sorted(order._permutations) == [9, 10]


def test_epochs_differ() -> None:
    first, second = CyclicOrder(100).global_indices(0, 200).reshape(2, 100)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(("consumed", "count"), [(0, 26), (25, 1), (20, 6)])
def test_the_end_of_a_single_pass_is_a_clear_error(consumed: int, count: int) -> None:
    with pytest.raises(ValueError, match=r"but the data set ends after 25; ask for fewer steps"):
        SingleOrder(25).global_indices(consumed, count)


@pytest.mark.parametrize("order", [SingleOrder(25), CyclicOrder(25)])
@pytest.mark.parametrize(("consumed", "count"), [(-1, 5), (0, -5)])
def test_negative_numbers_are_refused(order: Order, consumed: int, count: int) -> None:
    with pytest.raises(ValueError, match="must be 0 or more"):
        order.global_indices(consumed, count)


@pytest.mark.parametrize(("consumed", "count"), [(3, 6), (6, 3)])
def test_megatrons_cyclic_order_refuses_positions_of_other_sizes(consumed: int, count: int) -> None:
    with pytest.raises(ValueError, match="micro_batch_size=2 x data_parallel=3"):
        CyclicOrder(25, micro_batch_size=2, data_parallel=3).global_indices(consumed, count)


@given(microbatches=st.integers(0, 4), micro=st.integers(1, 4), replicas=st.integers(1, 4))
def test_replicas_share_out_a_step_whatever_their_number(microbatches: int, micro: int, replicas: int) -> None:
    step = np.arange(microbatches * micro * replicas)
    dealt = deal(step, micro_batch_size=micro, data_parallel=replicas)
    assert dealt.shape == (microbatches, replicas, micro)
    assert sorted(dealt.reshape(-1).tolist()) == step.tolist()
    assert (np.diff(dealt, axis=2) == 1).all()


def test_a_step_that_cannot_be_dealt_evenly_is_refused() -> None:
    with pytest.raises(ValueError, match="10 samples do not make whole microbatches"):
        deal(np.arange(10), micro_batch_size=2, data_parallel=2)


def test_a_run_measured_in_samples_asks_for_just_these() -> None:
    counts = sample_counts(train_iters=10, train_samples=999, global_batch_size=64, eval_interval=4, eval_iters=5)
    assert (counts.train, counts.valid, counts.test) == (999, 3 * 5 * 64, 5 * 64)
