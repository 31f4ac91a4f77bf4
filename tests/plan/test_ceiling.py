"""The yardstick of MFU."""

import pytest
import torch

from megalith.plan.ceiling import measure_layer, measure_libraries, measure_matmul_flops
from tests.calls import Calls


def test_the_measured_ceiling_is_what_a_product_of_matrices_reaches() -> None:
    flops = measure_matmul_flops(torch.device("cpu"), torch.float32, seconds=0.01)
    assert 1e8 < flops < 1e14


@pytest.mark.parametrize(("dtype", "libraries"), [(torch.float32, 2), (torch.float64, 1)])
def test_both_libraries_have_their_turns_at_the_ceiling(dtype: torch.dtype, libraries: int) -> None:
    with Calls() as calls:
        rates = measure_libraries(torch.device("cpu"), dtype, seconds=0.01)
    assert len(rates) == libraries
    assert calls.of(torch.ops.aten.mm.out)
    assert bool(calls.of(torch.ops.mkldnn._linear_pointwise.default)) == (libraries == 2)


def test_the_products_of_a_layer_are_those_that_a_step_takes() -> None:
    with Calls() as calls:
        rate = measure_layer(torch.float32, seconds=0.01)
    assert 1e8 < rate < 1e14
    assert len(calls.of(torch.ops.mkldnn._linear_pointwise.default)) >= 2  # forward, at least
