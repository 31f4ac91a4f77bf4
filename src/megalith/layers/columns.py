"""Kernels for GPUs that write a matrix and look at it on the way: sums of its columns, which are the gradient of a
bias, and its largest magnitude, by which it is scaled for 8 bits.

Each program takes a stretch of rows of some columns; the sums of stretches, in fp32, are added in one order, so that a
run gives the same bits each time. Loaded only where it is used, as attend_fused.py is.

Shape letters: B batch, T token, H heads, K head width, N rows (B T), C columns, S stretches of rows, P programs.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

STRETCH = 128  # rows that one program adds up
ROWS, COLUMNS = 16, 128  # at a time
GELU_ROWS = 8  # those that are computed and the next: more take so many registers that fewer programs run at once


class Seen(NamedTuple):
    """A matrix that was written, and what was seen of it."""

    matrix: Tensor
    sums: Tensor  # C: of its columns, fp32
    largest: Tensor  # P: the largest magnitude of each program's part, fp32


def gelu_backward(grad_y: Tensor, x: Tensor, tanh: bool) -> Seen:
    """The gradient by x of gelu(x), in the type and shape of x; sums over all but the last dimension.

    tanh: the form 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel 2016), else that with erf.
    """
    return Seen(*_gelu_backward_op(grad_y, x, tanh))


def join_heads(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Seen:
    """BT(H 3 K): for each head in turn its three parts; sums over all B and T."""
    return Seen(*_join_heads_op(q_BTHK, k_BTHK, v_BTHK))


def look_at(x: Tensor) -> Seen:
    """What is to be seen of a matrix that is there already; sums over all but the last dimension."""
    return Seen(x, *_look_at_op(x))


@torch.library.custom_op("megalith::gelu_backward", mutates_args=())
def _gelu_backward_op(grad_y: Tensor, x: Tensor, tanh: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, grad_y = x.contiguous(), grad_y.contiguous()
    grad_x, grid, sums_SC, largest_P = torch.empty_like(x), *_places(x)
    _gelu_backward[grid](
        grad_y, x, grad_x, sums_SC, largest_P, x.numel() // x.shape[-1], x.shape[-1],
        TANH=tanh, STRETCH=STRETCH, ROWS=GELU_ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return grad_x, sums_SC.sum(0), largest_P


@_gelu_backward_op.register_fake
def _(grad_y: Tensor, x: Tensor, tanh: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), *_seen_of(x)


@torch.library.custom_op("megalith::look_at", mutates_args=())
def _look_at_op(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    grid, sums_SC, largest_P = _places(x)
    _look_at[grid](
        x, sums_SC, largest_P, x.numel() // x.shape[-1], x.shape[-1], STRETCH=STRETCH, ROWS=ROWS, COLUMNS=COLUMNS
    )  # fmt: skip
    return sums_SC.sum(0), largest_P


@_look_at_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return _seen_of(x)


@torch.library.custom_op("megalith::join_heads", mutates_args=())
def _join_heads_op(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, width = q_BTHK.shape
    q, k, v = q_BTHK.contiguous(), k_BTHK.contiguous(), v_BTHK.contiguous()
    joined = torch.empty(batch, tokens, 3 * heads * width, dtype=q.dtype, device=q.device)
    grid, sums_SC, largest_P = _places(joined, columns_each=width)
    padded = max(16, 1 << math.ceil(math.log2(width)))
    _join_heads[grid](
        q, k, v, joined, sums_SC, largest_P, batch * tokens, heads,
        WIDTH=width, PADDED=padded, STRETCH=STRETCH, ROWS=2 * ROWS,
    )  # fmt: skip
    return joined, sums_SC.sum(0), largest_P


@_join_heads_op.register_fake
def _(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, width = q_BTHK.shape
    joined = torch.empty(batch, tokens, 3 * heads * width, dtype=q_BTHK.dtype, device=q_BTHK.device)
    return joined, *_seen_of(joined, columns_each=width)


def _places(like: Tensor, columns_each: int = COLUMNS) -> tuple[tuple[int, int], Tensor, Tensor]:
    """The grid of programs; room for the sums of each stretch of rows, SC, and for the largest of each program, P."""
    columns = like.shape[-1]
    grid = (triton.cdiv(columns, columns_each), triton.cdiv(like.numel() // columns, STRETCH))
    sums_SC = torch.empty(grid[1], columns, dtype=torch.float32, device=like.device)
    return grid, sums_SC, torch.empty(grid[0] * grid[1], dtype=torch.float32, device=like.device)


def _seen_of(like: Tensor, columns_each: int = COLUMNS) -> tuple[Tensor, Tensor]:
    """As what is seen of a matrix looks."""
    _, sums_SC, largest_P = _places(like, columns_each)
    return torch.empty_like(sums_SC[0]), largest_P


# 2 sqrt(2 / pi), by which GELU's cubic is the logistic function's; 1 / sqrt(2), 1 / sqrt(2 pi), and log2(e).
TWO_ROOT_2_OVER_PI = tl.constexpr(1.5957691216057308)
ROOT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _slope(x, TANH):
    """The derivative of GELU."""
    if TANH:
        # (1 + tanh(z)) / 2 is the logistic function of 2 z.
        square = x * x
        power = x * ((-TWO_ROOT_2_OVER_PI * LOG2_E) * (1 + 0.044715 * square))
        half = 1 / (1 + tl.exp2(tl.minimum(power, 126.0)))
        slope = half + (half - half * half) * (x * (TWO_ROOT_2_OVER_PI * (1 + 3 * 0.044715 * square)))
    else:
        slope = 0.5 * (1 + tl.erf(x * ROOT_HALF)) + x * DENSITY * tl.exp(-0.5 * x * x)
    return slope


@triton.jit
def _tile(start, c, num_rows, num_columns, STRETCH, ROWS: tl.constexpr):
    """Where some rows of the program's stretch have these columns in memory, and which of them there are."""
    n = tl.program_id(1) * STRETCH + start + tl.arange(0, ROWS)
    at = n[:, None].to(tl.int64) * num_columns + c[None, :]
    return at, (n[:, None] < num_rows) & (c[None, :] < num_columns)


@triton.jit
def _put_seen(sums, largest, total, most, c, num_columns):
    """What the program has seen of its stretch of these columns."""
    tl.store(sums + tl.program_id(1).to(tl.int64) * num_columns + c, tl.sum(total, 0), mask=c < num_columns)
    tl.store(largest + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.max(tl.max(most, 1), 0))


@triton.jit
def _gelu_backward(
    grad_y, x, grad_x, sums, largest, num_rows, num_columns,
    TANH: tl.constexpr, STRETCH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total, most = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    at, inside = _tile(0, c, num_rows, num_columns, STRETCH, ROWS)
    before, arriving = tl.load(x + at, mask=inside, other=0.0), tl.load(grad_y + at, mask=inside, other=0.0)
    for start in range(0, STRETCH, ROWS):
        # What comes next is on its way while this is computed.
        next_at, next_inside = _tile(start + ROWS, c, num_rows, num_columns, STRETCH, ROWS)
        next_inside = next_inside & (start + ROWS < STRETCH)
        next_before = tl.load(x + next_at, mask=next_inside, other=0.0)
        next_arriving = tl.load(grad_y + next_at, mask=next_inside, other=0.0)
        made = arriving.to(tl.float32) * _slope(before.to(tl.float32), TANH)
        tl.store(grad_x + at, made.to(grad_x.dtype.element_ty), mask=inside)
        total += made
        most = tl.maximum(most, tl.abs(made))
        at, inside, before, arriving = next_at, next_inside, next_before, next_arriving
    _put_seen(sums, largest, total, most.to(grad_x.dtype.element_ty).to(tl.float32), c, num_columns)


@triton.jit
def _look_at(
    x, sums, largest, num_rows, num_columns, STRETCH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total, most = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, STRETCH, ROWS):
        at, inside = _tile(start, c, num_rows, num_columns, STRETCH, ROWS)
        taken = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        total += taken
        most = tl.maximum(most, tl.abs(taken))
    _put_seen(sums, largest, total, most, c, num_columns)


@triton.jit
def _join_heads(
    q, k, v, joined, sums, largest, num_rows, heads,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, STRETCH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head, part = tl.program_id(0) // 3, tl.program_id(0) % 3
    source = q
    if part == 1:
        source = k
    if part == 2:
        source = v
    features = tl.arange(0, PADDED)
    total, most = tl.zeros([ROWS, PADDED], tl.float32), tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(0, STRETCH, ROWS):
        n = (tl.program_id(1) * STRETCH + start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (n[:, None] < num_rows) & (features[None, :] < WIDTH)
        taken = tl.load(source + (n[:, None] * heads + head) * WIDTH + features[None, :], mask=inside, other=0.0)
        at = (n[:, None] * heads * 3 + tl.program_id(0)) * WIDTH + features[None, :]
        tl.store(joined + at, taken, mask=inside)
        total += taken.to(tl.float32)
        most = tl.maximum(most, tl.abs(taken.to(tl.float32)))
    place = (tl.program_id(1).to(tl.int64) * heads * 3 + tl.program_id(0)) * WIDTH + features
    tl.store(sums + place, tl.sum(total, 0), mask=features < WIDTH)
    tl.store(largest + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.max(tl.max(most, 1), 0))
