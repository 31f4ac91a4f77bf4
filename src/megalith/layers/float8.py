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
from megalith.layers.entering import Entering, Factor
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

    def __call__(self, x: Tensor, factors: Sequence[Factor], enter: Entering | None = None) -> tuple[Tensor, ...]:
        return float8_linears(x, factors, enter, form=self.form)

    def joined(
        self, x: Tensor, weight: Tensor, bias: Tensor, narrow: "Weight8 | None" = None, enter: Entering | None = None
    ) -> "Float8Joined":
        return Float8Joined(x, weight, bias, narrow, self.form, enter)

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
    enter: Entering | None = None

    def gelu(self, *, tanh: bool) -> Tensor:
        """gelu(x W^T + b)."""
        if not _rows_fit(self.x, self.enter):
            return F.gelu(self._as_it_is(), approximate="tanh" if tanh else "none")
        y: Tensor = _Float8Gelu.apply(self.x, self.enter, self.form, self.weight, self.bias, *self._rounded(), tanh)
        return y

    def heads(self, head_width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, BTHD each, of weights that hold those of each head in turn."""
        if not _rows_fit(self.x, self.enter):
            return _parts_of(self._as_it_is(), head_width)
        q_BTHD, k_BTHD, v_BTHD = _Float8Heads.apply(
            self.x, self.enter, self.form, self.weight, self.bias, *self._rounded(), head_width
        )
        return q_BTHD, k_BTHD, v_BTHD

    def _rounded(self) -> Sequence[Tensor | None]:
        return self.narrow or NOT_AT_HAND

    def _as_it_is(self) -> Tensor:
        return _as_they_are(self.x, [Factor(self.weight, self.bias)], self.enter)[0]


def float8_linears(
    x: Tensor, factors: Sequence[Factor], enter: Entering | None = None, *, form: Float8Format
) -> tuple[Tensor, ...]:
    """x W^T + b of each factor with 8-bit factors, in the type of x; rows that are no multiple of 16 are multiplied as
    they are.

    The gradients of weight and bias are fp32. narrow, in a factor: the weight in 8 bits, if it is at hand. enter: of x,
    where other ranks compute other parts of the products.
    """
    if not _rows_fit(x, enter):
        return _as_they_are(x, factors, enter)
    flat = [part for weight, bias, narrow in factors for part in (weight, bias, *(narrow or NOT_AT_HAND))]  # type: ignore[misc]
    products: tuple[Tensor, ...] = _Float8Linears.apply(x, enter, form, *flat)
    return products


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


def _rows_fit(x: Tensor, enter: Entering | None) -> bool:
    rows = x.numel() // x.shape[-1] * (1 if enter is None else enter.num_parts)
    return rows % MULTIPLE == 0


def _as_they_are(x: Tensor, factors: Sequence[Factor], enter: Entering | None) -> tuple[Tensor, ...]:
    x = x if enter is None else enter.enter(x)
    return tuple(
        F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)) for weight, bias, _ in factors
    )


def _parts_of(joined: Tensor, head_width: int) -> tuple[Tensor, Tensor, Tensor]:
    q_BTHD, k_BTHD, v_BTHD = joined.unflatten(-1, (-1, 3, head_width)).unbind(-2)
    return q_BTHD, k_BTHD, v_BTHD


class _Float8Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, enter: Entering | None, form: Float8Format, *factors: Tensor | None
    ) -> tuple[Tensor, ...]:
        products, kept = _forward(ctx, x, enter, form, factors)
        ctx.save_for_backward(*kept)
        return tuple(products)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if grads[0].is_cuda and grads[0].dtype != torch.float32 and has_kernels():
            from megalith.layers.columns import look_at

            seen = [look_at(grad_y) for grad_y in grads]
            sums, largest = [one.sums for one in seen], [one.largest.amax() for one in seen]
        else:
            sums = [grad_y.flatten(0, -2).sum(0, dtype=torch.float32) for grad_y in grads]
            largest = [grad_y.abs().amax().float() for grad_y in grads]
        grad_x, by_weights = _by_input_and_weights(ctx, ctx.saved_tensors, grads, largest)
        by_factor: list[Tensor | None] = []
        for number, (by_weight, by_bias) in enumerate(zip(by_weights, sums, strict=True)):
            needs_bias = ctx.needs_input_grad[FIRST + 1 + EACH * number]
            by_factor += [by_weight, by_bias if needs_bias else None, *NOT_AT_HAND]
        return grad_x, None, None, *by_factor


class _Float8Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, enter: Entering | None, form: Float8Format, *factor_and_tanh: Any) -> Tensor:
        *factor, tanh = factor_and_tanh
        (before,), kept = _forward(ctx, x, enter, form, factor)
        ctx.save_for_backward(*kept, before)
        ctx.tanh = tanh
        return gelu_of(before, tanh)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        from megalith.layers.columns import gelu_backward

        *saved, before = ctx.saved_tensors
        seen = gelu_backward(grad_y, before, ctx.tanh)
        grad_x, (by_weight,) = _by_input_and_weights(ctx, saved, [seen.matrix], [seen.largest.amax()])
        return grad_x, None, None, by_weight, seen.sums, *NOT_AT_HAND, None


class _Float8Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, enter: Entering | None, form: Float8Format, *factor_and_width: Any
    ) -> tuple[Tensor, ...]:
        *factor, head_width = factor_and_width
        (joined,), kept = _forward(ctx, x, enter, form, factor)
        ctx.save_for_backward(*kept)
        return _parts_of(joined, head_width)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        from megalith.layers.columns import join_heads

        seen = join_heads(grad_q, grad_k, grad_v)
        grad_x, (by_weight,) = _by_input_and_weights(ctx, ctx.saved_tensors, [seen.matrix], [seen.largest.amax()])
        return grad_x, None, None, by_weight, seen.sums, *NOT_AT_HAND, None


# Where these functions have what: x, enter and form; then of each factor weight, bias and a Weight8.
FIRST, EACH = 3, 5


def _forward(
    ctx: Any, x: Tensor, enter: Entering | None, form: Float8Format, factors: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """The products, and what the backward pass needs."""
    whole = x if enter is None else enter.whole(x)
    x8_MK, x_scale = in_8_bits(whole.flatten(0, -2), torch.float8_e4m3fn)
    ctx.enter, ctx.form, ctx.dtype, ctx.shape, ctx.count = enter, form, x.dtype, whole.shape, len(factors) // EACH
    ctx.is_turned = factors[3] is not None
    # What comes from other ranks comes again.
    ctx.is_part = enter is not None and enter.num_parts > 1
    products, kept = [], [x if ctx.is_part else x8_MK, x_scale]
    for number in range(ctx.count):
        weight_NK, bias_N, by_rows, by_columns, weight_scale = factors[EACH * number : EACH * (number + 1)]
        assert weight_NK is not None
        if by_rows is None or weight_scale is None:
            by_rows, weight_scale = in_8_bits(weight_NK, torch.float8_e4m3fn)
        # The hardware's products add a bias of 16 bits on their way out.
        inside = bias_N is not None and x.dtype != torch.float32
        bias = bias_N.to(x.dtype) if bias_N is not None and inside else None
        y = _product(x8_MK, by_rows.t(), x_scale, weight_scale, x.dtype, bias_N=bias, fast=True)
        y = y.view(*whole.shape[:-1], y.shape[-1])
        products.append(y if bias_N is None or inside else y + bias_N)
        kept += [by_rows if by_columns is None else by_columns, weight_scale]
    return products, kept


def _by_input_and_weights(
    ctx: Any, saved: Sequence[Tensor], grads: Sequence[Tensor], largest: Sequence[Tensor]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of x and of each weight. saved: what `_forward` gave for it. largest: the largest magnitude in each
    of grads."""
    x, x_scale, *kept = saved
    started = ctx.enter.start_whole(x, grads[0]) if ctx.is_part else None
    rounded = [in_8_bits(g.flatten(0, -2), _GRADIENTS[ctx.form], m) for g, m in zip(grads, largest, strict=True)]
    grad_x = summed = None
    if ctx.needs_input_grad[0]:
        for number, (grad8_MN, grad_scale) in enumerate(rounded):
            weight8_NK, weight_scale = kept[2 * number : 2 * number + 2]
            by_columns = weight8_NK if ctx.is_turned else weight8_NK.t().contiguous().t()
            by_input = _product(grad8_MN, by_columns, grad_scale, weight_scale, ctx.dtype, fast=False)
            grad_x = by_input if grad_x is None else grad_x + by_input
        assert grad_x is not None
        grad_x = grad_x.view(ctx.shape)
        summed = None if ctx.enter is None else ctx.enter.start_sum(grad_x)
    x8_MK = x if started is None else in_8_bits(started().flatten(0, -2), torch.float8_e4m3fn)[0]
    x8_by_columns = x8_MK.t().contiguous().t()
    by_weights: list[Tensor | None] = []
    for number, (grad8_MN, grad_scale) in enumerate(rounded):
        needed = ctx.needs_input_grad[FIRST + EACH * number]
        grad8_NM = grad8_MN.t().contiguous() if needed else None
        by_weights.append(
            None
            if grad8_NM is None
            else _product(grad8_NM, x8_by_columns, grad_scale, x_scale, torch.float32, fast=False)
        )
    return grad_x if summed is None else summed(), by_weights


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
