"""Matrix products of 8-bit floating point numbers, for GPUs that multiply them at twice the rate of 16-bit ones.

Every tensor that enters a product is scaled by its own largest magnitude and rounded to 8 bits (Micikevicius et al.
2022, arXiv:2209.05433); the product is summed and given back in more. Weights, their gradients, the optimizer and
everything between the products stay as they are. On the CPU torch computes the same products, slowly.

On a GPU a gradient's largest magnitude and the bias's gradient are seen by the kernel that writes it, or by one that
reads it once (columns.py).

Shape letters: B batch, T token, M rows (tokens), N output features, K input features, H heads, D head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalith.layers.block import Block
from megalith.layers.linear import Linear
from megalith.layers.sixteen import gelu_of, has_kernels

# e4m3: 4 bits of exponent and 3 of mantissa for everything; hybrid: e5m2, with more range, for gradients of outputs.
Float8Format = Literal["e4m3", "hybrid"]
_GRADIENTS = {"e4m3": torch.float8_e4m3fn, "hybrid": torch.float8_e5m2}
MULTIPLE = 16  # of rows and features, by which the hardware's products go
NOT_AT_HAND = (None, None, None)  # in place of a Weight8


def use_float8(model: nn.Module, form: Float8Format) -> None:
    """Let the matrix products inside the model's blocks be computed in 8 bits; in place.

    Layers whose features are no multiple of 16 keep their type, as embeddings, norms, attention's scores and the output
    layer do.
    """
    for module in model.modules():
        if isinstance(module, Block):
            for layer in module.modules():
                if isinstance(layer, Linear) and not any(size % MULTIPLE for size in layer.weight.shape):
                    layer.product = Float8(form)


@dataclass(frozen=True)
class Float8:
    """The products of a `Linear` in 8 bits."""

    form: Float8Format

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, narrow: "Weight8 | None" = None) -> Tensor:
        return float8_linear(x, weight, bias, narrow, form=self.form)

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor, narrow: "Weight8 | None" = None) -> "Float8Joined":
        return Float8Joined(x, weight, bias, narrow, self.form)

    def rounded(self, weight: Tensor) -> "Weight8":
        """Once for several microbatches; compiled on a GPU, where it would be a dozen passes over the weight."""
        return (_compiled_rounding() if weight.is_cuda else weight_in_8_bits)(weight)


class Weight8(NamedTuple):
    """A weight in 8 bits, NK: as the forward pass takes it, by rows; as the backward pass does; its scale."""

    by_rows: Tensor
    by_columns: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Float8Joined:
    """A product and what follows it at once, as one operation with one backward pass; needs Triton."""

    x: Tensor
    weight: Tensor  # NK
    bias: Tensor  # N
    narrow: Weight8 | None
    form: Float8Format

    def gelu(self, *, tanh: bool) -> Tensor:
        """gelu(x W^T + b)."""
        if not _rows_fit(self.x):
            return F.gelu(_as_it_is(self.x, self.weight, self.bias), approximate="tanh" if tanh else "none")
        y: Tensor = _Float8Gelu.apply(self.x, self.weight, self.bias, self.form, tanh, *(self.narrow or NOT_AT_HAND))
        return y

    def heads(self, head_width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, BTHD each, of weights that hold those of each head in turn."""
        if not _rows_fit(self.x):
            return _parts_of(_as_it_is(self.x, self.weight, self.bias), head_width)
        q_BTHD, k_BTHD, v_BTHD = _Float8Heads.apply(
            self.x, self.weight, self.bias, self.form, head_width, *(self.narrow or NOT_AT_HAND)
        )
        return q_BTHD, k_BTHD, v_BTHD


def float8_linear(
    x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, narrow: Weight8 | None = None, *, form: Float8Format
) -> Tensor:
    """x W^T + b with 8-bit factors, in the type of x; rows that are no multiple of 16 are multiplied as they are.

    The gradients of weight and bias are fp32. narrow: the weight in 8 bits, if it is at hand.
    """
    if not _rows_fit(x):
        return _as_it_is(x, weight_NK, bias_N)
    y: Tensor = _Float8Linear.apply(x, weight_NK, bias_N, form, *(narrow or NOT_AT_HAND))
    return y


def in_8_bits(x: Tensor, kind: torch.dtype, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x divided by its scale and rounded to the 8-bit type, and the scale: a fp32 scalar.

    largest: the largest magnitude in x, if it is known.
    """
    most = torch.finfo(kind).max
    largest = x.abs().amax().float() if largest is None else largest
    scale = largest.clamp(min=torch.finfo(torch.float32).tiny * most) / most
    return (x.float() / scale).clamp(-most, most).to(kind), scale


def weight_in_8_bits(weight_NK: Tensor) -> Weight8:
    """The hardware wants the left factor of a product by rows and the right one by columns, of both passes."""
    by_rows, scale = in_8_bits(weight_NK, torch.float8_e4m3fn)
    return Weight8(by_rows, by_rows.t().contiguous().t(), scale)


@cache
def _compiled_rounding() -> Any:
    return torch.compile(weight_in_8_bits, dynamic=False)


def _rows_fit(x: Tensor) -> bool:
    return (x.numel() // x.shape[-1]) % MULTIPLE == 0


def _as_it_is(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    return F.linear(x, weight_NK.to(x.dtype), None if bias_N is None else bias_N.to(x.dtype))


def _parts_of(joined: Tensor, head_width: int) -> tuple[Tensor, Tensor, Tensor]:
    q_BTHD, k_BTHD, v_BTHD = joined.unflatten(-1, (-1, 3, head_width)).unbind(-2)
    return q_BTHD, k_BTHD, v_BTHD


class _Float8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, form: Float8Format, *narrow: Tensor | None
    ) -> Tensor:
        return _forward(ctx, x, weight_NK, bias_N, form, narrow)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        if grad_y.is_cuda and grad_y.dtype != torch.float32 and has_kernels():
            from megalith.layers.columns import look_at

            seen = look_at(grad_y)
            grad_bias, largest = seen.sums, seen.largest.amax()
        else:
            grad_bias, largest = grad_y.flatten(0, -2).sum(0, dtype=torch.float32), grad_y.abs().amax().float()
        return *_by_input_and_weight(ctx, grad_y, largest), grad_bias if ctx.needs_input_grad[2] else None, *(None,) * 4


class _Float8Gelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor, form: Float8Format, tanh: bool, *narrow: Tensor | None
    ) -> Tensor:
        before = _forward(ctx, x, weight_NK, bias_N, form, narrow, and_keep=True)
        ctx.tanh = tanh
        return gelu_of(before, tanh)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        from megalith.layers.columns import gelu_backward

        seen = gelu_backward(grad_y, ctx.saved_tensors[-1], ctx.tanh)
        return *_by_input_and_weight(ctx, seen.matrix, seen.largest.amax()), seen.sums, *(None,) * 5


class _Float8Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_NK: Tensor,
        bias_N: Tensor,
        form: Float8Format,
        head_width: int,
        *narrow: Tensor | None,
    ) -> tuple[Tensor, ...]:
        return _parts_of(_forward(ctx, x, weight_NK, bias_N, form, narrow), head_width)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        from megalith.layers.columns import join_heads

        seen = join_heads(grad_q, grad_k, grad_v)
        return *_by_input_and_weight(ctx, seen.matrix, seen.largest.amax()), seen.sums, *(None,) * 5


def _forward(
    ctx: Any,
    x: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    form: Float8Format,
    narrow: Sequence[Tensor | None],
    *,
    and_keep: bool = False,
) -> Tensor:
    """The product; the context keeps what the backward pass needs, and_keep: and the product itself, last."""
    x8_MK, x_scale = in_8_bits(x.flatten(0, -2), torch.float8_e4m3fn)
    by_rows, by_columns, weight_scale = narrow
    if by_rows is None or weight_scale is None:
        by_rows, weight_scale = in_8_bits(weight_NK, torch.float8_e4m3fn)
    ctx.form, ctx.dtype, ctx.shape = form, x.dtype, x.shape
    # The hardware's products add a bias of 16 bits on their way out.
    inside = bias_N is not None and x.dtype != torch.float32
    bias = bias_N.to(x.dtype) if bias_N is not None and inside else None
    y = _product(x8_MK, by_rows.t(), x_scale, weight_scale, x.dtype, bias_N=bias, fast=True)
    y = y.view(*x.shape[:-1], y.shape[-1])
    y = y if bias_N is None or inside else y + bias_N
    kept = (by_rows if by_columns is None else by_columns, weight_scale)
    ctx.is_turned = by_columns is not None
    ctx.save_for_backward(x8_MK, x_scale, *kept, *((y,) if and_keep else ()))
    return y


def _by_input_and_weight(ctx: Any, grad_y: Tensor, largest: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of the weight. largest: the largest magnitude in grad_y."""
    x8_MK, x_scale, weight8_NK, weight_scale, *_ = ctx.saved_tensors
    grad8_MN, grad_scale = in_8_bits(grad_y.flatten(0, -2), _GRADIENTS[ctx.form], largest)
    grad_x: Tensor | None = None
    grad_weight: Tensor | None = None
    if ctx.needs_input_grad[0]:
        by_columns = weight8_NK if ctx.is_turned else weight8_NK.t().contiguous().t()
        grad_x = _product(grad8_MN, by_columns, grad_scale, weight_scale, ctx.dtype, fast=False)
        grad_x = grad_x.view(ctx.shape)
    if ctx.needs_input_grad[1]:
        by_columns, grad8_NM = x8_MK.t().contiguous().t(), grad8_MN.t().contiguous()
        grad_weight = _product(grad8_NM, by_columns, grad_scale, x_scale, torch.float32, fast=False)
    return grad_x, grad_weight


def _product(
    left: Tensor,
    right: Tensor,
    left_scale: Tensor,
    right_scale: Tensor,
    dtype: torch.dtype,
    *,
    bias_N: Tensor | None = None,
    fast: bool,
) -> Tensor:
    """fast: sum in less than fp32, as only outputs bear; on GPUs."""
    product: Tensor = torch._scaled_mm(
        left, right, left_scale, right_scale, bias=bias_N, out_dtype=dtype, use_fast_accum=fast and left.is_cuda
    )
    return product
