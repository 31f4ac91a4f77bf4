"""The yardstick of MFU."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalith.plan.ceiling import measure_matmul_flops


def test_the_measured_ceiling_is_what_a_product_of_matrices_reaches() -> None:
    flops = measure_matmul_flops(torch.device("cpu"), torch.float32, seconds=0.01)
    assert 1e8 < flops < 1e14


@pytest.mark.parametrize("any_library", [True, False])
def test_both_libraries_have_their_turns_at_the_ceiling(any_library: bool) -> None:
    with Operations() as operations:
        measure_matmul_flops(torch.device("cpu"), torch.float32, seconds=0.01, any_library=any_library)
    assert "aten.mm.out" in operations.seen
    assert ("mkldnn._linear_pointwise.default" in operations.seen) == any_library


class Operations(TorchDispatchMode):
    """While entered, notes the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))
