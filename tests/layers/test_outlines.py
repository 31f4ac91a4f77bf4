"""What the compiler is told that an operator of ours gives has the types, shapes and strides of what it gives."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megalith.layers import accumulate
from tests.layers.kernels import DEVICE, SIXTEEN, runs_kernels


def draw(*shape: int, dtype: torch.dtype = SIXTEEN) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def check(operator: Any, *arguments: Any) -> None:
    torch.library.opcheck(operator, arguments, test_utils="test_faketensor")


def test_of_gradients_of_weights() -> None:
    check(accumulate._gradient_by_weight_op, draw(40, 24, dtype=torch.float32), draw(9, 40), draw(9, 24))


@runs_kernels
@pytest.mark.parametrize("centered", [True, False])
def test_of_norms(centered: bool) -> None:
    from megalith.layers import norm_fused

    numbers = draw(2, 9, 1, dtype=torch.float32)
    rows = draw(2, 24, 9).transpose(1, 2)
    check(
        norm_fused._norm_backward_op, rows, rows, rows, draw(24, dtype=torch.float32), numbers if centered else None,
        numbers.abs(),
    )  # fmt: skip


@runs_kernels
def test_of_columns() -> None:
    from megalith.layers import columns

    x, heads = draw(2, 300, 70).transpose(1, 2), draw(2, 9, 3, 24)
    check(columns._gelu_backward_op, x, x, True)
    check(columns._look_at_op, x)
    check(columns._join_heads_op, heads, heads, heads)


@runs_kernels
def test_of_attention() -> None:
    from megalith.layers import attend_fused

    q, k = draw(2, 9, 3, 16).transpose(1, 2), draw(2, 3, 12, 16)
    words = torch.arange(2 * 3 * 9, dtype=torch.int32, device=DEVICE).view(2, 3, 9), draw(12).view(torch.int16).int()
    given = (None, *words, False, 0.25, 0.1)
    check(attend_fused._attend, q, k, k, *given)
    o, sums = attend_fused._attend(q, k, k, *given)
    check(attend_fused._attend_backward, o, q, k, k, o, sums, *given)
