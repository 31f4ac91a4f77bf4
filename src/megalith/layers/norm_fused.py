"""Backward passes of norms in one pass over memory, for GPUs: the sums over rows for weight and bias are kept in
registers while rows go by, and what comes back beside the norm, by the residual, is added on the way.

Each program takes every so many rows; the sums of programs, in fp32, are added in one order, so that a run gives the
same bits each time. Loaded only where it is used, as attend_fused.py is.

Shape letters: N rows, C features, P programs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of a multiprocessor, as many as registers let in for rows of 768 to 2048 features (ptxas, sm_90: 80 a thread).
WARPS = 24


class Gradients(NamedTuple):
    """Those by what a norm is of, in its type, and by its weight and bias in fp32."""

    x: Tensor
    weight: Tensor
    bias: Tensor


def norm_backward(
    grad_y: Tensor, beside: Tensor, x: Tensor, weight_C: Tensor, mean: Tensor | None, inverse: Tensor
) -> Gradients:
    """Of y = (x - mean) inverse weight + bias, over the last dimension of x; beside is added to the gradient by x.

    mean and inverse: one number a row. inverse: one over the root of the variance, or without a mean of the mean square
    (RMSNorm). weight: in fp32; LayerNorm, which has a mean, takes it in the type of x.
    """
    grad_x, sums_2C = _norm_backward_op(grad_y, beside, x, weight_C, mean, inverse)
    return Gradients(grad_x, *sums_2C.unbind())


@torch.library.custom_op("megalith::norm_backward", mutates_args=())
def _norm_backward_op(
    grad_y: Tensor, beside: Tensor, x: Tensor, weight_C: Tensor, mean: Tensor | None, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    grad_y, beside, x = grad_y.contiguous(), beside.contiguous(), x.contiguous()
    width, padded, warps = x.shape[-1], triton.next_power_of_2(x.shape[-1]), warps_for(x.shape[-1])
    rows = x.numel() // width
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    programs = max(1, min(rows, processors * (WARPS // warps)))
    grad_x, sums_P2C = torch.empty_like(x), torch.empty(programs, 2, width, dtype=torch.float32, device=x.device)
    _norm_backward[(programs,)](
        grad_y, beside, x, weight_C, inverse if mean is None else mean, inverse, grad_x, sums_P2C, rows, width,
        CENTERED=mean is not None, PADDED=padded, num_warps=warps,
    )  # fmt: skip
    return grad_x, sums_P2C.sum(0)


@_norm_backward_op.register_fake
def _(
    grad_y: Tensor, beside: Tensor, x: Tensor, weight_C: Tensor, mean: Tensor | None, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    sums_2C = torch.empty(2, x.shape[-1], dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), sums_2C


def warps_for(width: int) -> int:
    """Of a program, so that a thread holds 8 features of a row, or more of rows that are longer than 4096."""
    of_eight: int = triton.next_power_of_2(width) // 256
    return min(16, max(4, of_eight))


@triton.jit
def _norm_backward(
    grad_y, beside, x, weight, mean, inverse, grad_x, sums, num_rows, width,
    CENTERED: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, PADDED)
    inside = c < width
    scale = tl.load(weight + c, mask=inside, other=0.0)
    if CENTERED:
        scale = scale.to(x.dtype.element_ty)
    scale = scale.to(tl.float32)
    by_weight, by_bias = tl.zeros([PADDED], tl.float32), tl.zeros([PADDED], tl.float32)
    row = tl.program_id(0)
    at = row.to(tl.int64) * width + c
    arriving, passing = tl.load(grad_y + at, mask=inside, other=0.0), tl.load(beside + at, mask=inside, other=0.0)
    before, factor, center = tl.load(x + at, mask=inside, other=0.0), tl.load(inverse + row), tl.load(mean + row)
    for _ in range(row, num_rows, tl.num_programs(0)):
        # What comes next is on its way while this is computed; after the last row one that is there, for nothing.
        next_row = tl.minimum(row + tl.num_programs(0), num_rows - 1)
        next_at = next_row.to(tl.int64) * width + c
        next_arriving = tl.load(grad_y + next_at, mask=inside, other=0.0)
        next_passing = tl.load(beside + next_at, mask=inside, other=0.0)
        next_before = tl.load(x + next_at, mask=inside, other=0.0)
        next_factor, next_center = tl.load(inverse + next_row), tl.load(mean + next_row)

        grad, normed = arriving.to(tl.float32), before.to(tl.float32)
        by_bias += grad
        scaled = grad * scale
        if CENTERED:
            # Before the other sum, or Triton 3.6 takes 91 to 95 registers a thread.
            shift = tl.sum(scaled, 0) / width
            normed = tl.where(inside, normed - center, 0.0)
        normed *= factor
        by_weight += grad * normed
        made = scaled - normed * (tl.sum(scaled * normed, 0) / width)
        if CENTERED:
            made -= shift
        made = made * factor + passing.to(tl.float32)
        tl.store(grad_x + at, made.to(grad_x.dtype.element_ty), mask=inside)

        row, at, arriving, passing, before = next_row, next_at, next_arriving, next_passing, next_before
        factor, center = next_factor, next_center
    place = sums + tl.program_id(0).to(tl.int64) * 2 * width + c
    tl.store(place, by_weight, mask=inside)
    tl.store(place + width, by_bias, mask=inside)
