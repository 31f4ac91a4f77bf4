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


@pytest.mark.parametrize(("has_instructions", "rows"), [(True, 1024), (False, 256)])
def test_products_in_fp16_are_small_where_a_processor_computes_them_one_by_one(
    monkeypatch: pytest.MonkeyPatch, has_instructions: bool, rows: int
) -> None:
    monkeypatch.setattr("megalith.layers.products.has_instructions_for", lambda dtype: has_instructions)
    multiplied: list[int] = []

    def noted(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> None:
        multiplied.append(len(left))

    monkeypatch.setattr(torch, "mm", noted)
    measure_libraries(torch.device("cpu"), torch.float16, seconds=0.001)
    assert set(multiplied) == {rows}
