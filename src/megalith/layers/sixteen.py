"""Layers in 16 bits on GPUs, as one would write their backward passes by hand.

Gradients of weights leave their products in fp32, where autograd would round them to 16 bits and widen them again, and
are added up there (accumulate.py). The gradient of a bias is a sum over rows of what a kernel is writing anyway, so
that kernel adds it up: behind GELU, and where the gradients of queries, keys and values come together (columns.py).

Shape letters: B batch, T token, N rows, I inputs, O outputs, H heads, K head width, F inner features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalith.kernels import HAS_TRITON
from megalith.layers.accumulate import gradient_by_weight
from megalith.layers.entering import Entering, Factor


def suits_sixteen(x: Tensor, weight_OI: Tensor) -> bool:
    """Whether a product is one of 16 bits on a GPU with a weight that is trained in fp32."""
    return x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16) and weight_OI.dtype == torch.float32


def sixteen_linears(x: Tensor, factors: Sequence[Factor], enter: Entering | None = None) -> tuple[Tensor, ...]:
    """x weight^T + bias of each factor; gradients flow to all three, those of weight and bias in their own fp32.

    narrow, here and below: the weight in the type of x, if it is at hand. enter: of x, where other ranks compute other
    parts of the products.
    """
    products: tuple[Tensor, ...] = _Linears.apply(x, enter, *(part for factor in factors for part in factor))
    return products


@dataclass(frozen=True)
class SixteenJoined:
    """A product and what follows it at once, as one operation with one backward pass; needs Triton."""

    x: Tensor
    weight: Tensor  # OI
    bias: Tensor  # O
    narrow: Tensor | None  # OI
    enter: Entering | None = None

    def gelu(self, *, tanh: bool) -> Tensor:
        """gelu(x weight^T + bias)."""
        y: Tensor = _LinearGelu.apply(self.x, self.enter, self.weight, self.bias, self.narrow, tanh)
        return y

    def heads(self, head_width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, BTHK each, of weights that hold those of each head in turn."""
        q_BTHK, k_BTHK, v_BTHK = _Heads.apply(self.x, self.enter, self.weight, self.bias, self.narrow, head_width)
        return q_BTHK, k_BTHK, v_BTHK


def has_kernels(*, form: str = "tanh") -> bool:
    """Whether the kernels of columns.py can be had, for this form of GELU."""
    return HAS_TRITON and form in ("tanh", "erf")


def gelu_of(x: Tensor, tanh: bool) -> Tensor:
    """GELU with tanh, or with erf."""
    if not tanh or not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh" if tanh else "none")
    # The same as a logistic function, of which Inductor makes 20 instructions an element; of tanh 33, with a branch.
    wide = x.float()
    slope = 2 * math.sqrt(2 / math.pi) * (1 + 0.044715 * wide.square())
    return (wide * torch.sigmoid(wide * slope)).to(x.dtype)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, enter: Entering | None, *factors: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases, narrow = factors[::3], factors[1::3], factors[2::3]
        whole, sixteen = _before_products(ctx, x, enter, weights, narrow)
        ctx.save_for_backward(x, *sixteen, *weights)
        return tuple(
            F.linear(whole, weight_OI, None if bias_O is None else bias_O.to(x.dtype))
            for weight_OI, bias_O in zip(sixteen, biases, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, by_weights = _by_input_and_weights(ctx, ctx.saved_tensors, grads)
        by_factor: list[Tensor | None] = []
        for number, (grad_y, by_weight) in enumerate(zip(grads, by_weights, strict=True)):
            needs_bias = ctx.needs_input_grad[3 + 3 * number]
            by_bias = grad_y.flatten(0, -2).sum(0, dtype=torch.float32) if needs_bias else None
            by_factor += [by_weight, by_bias, None]
        return grad_x, None, *by_factor


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        enter: Entering | None,
        weight_FI: Tensor,
        bias_F: Tensor,
        narrow_FI: Tensor | None,
        tanh: bool,
    ) -> Tensor:
        whole, (weight,) = _before_products(ctx, x, enter, [weight_FI], [narrow_FI])
        before = F.linear(whole, weight, bias_F.to(x.dtype))
        ctx.save_for_backward(x, weight, weight_FI, before)
        ctx.tanh = tanh
        return gelu_of(before, tanh)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        from megalith.layers.columns import gelu_backward

        *saved, before = ctx.saved_tensors
        seen = gelu_backward(grad_y, before, ctx.tanh)
        grad_x, (by_weight,) = _by_input_and_weights(ctx, saved, [seen.matrix])
        return grad_x, None, by_weight, seen.sums, None, None


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        enter: Entering | None,
        weight_OI: Tensor,
        bias_O: Tensor,
        narrow_OI: Tensor | None,
        head_width: int,
    ) -> tuple[Tensor, ...]:
        whole, (weight,) = _before_products(ctx, x, enter, [weight_OI], [narrow_OI])
        ctx.save_for_backward(x, weight, weight_OI)
        joined = F.linear(whole, weight, bias_O.to(x.dtype))
        q_BTHK, k_BTHK, v_BTHK = joined.unflatten(-1, (-1, 3, head_width)).unbind(-2)
        return q_BTHK, k_BTHK, v_BTHK

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        from megalith.layers.columns import join_heads

        seen = join_heads(grad_q, grad_k, grad_v)
        grad_x, (by_weight,) = _by_input_and_weights(ctx, ctx.saved_tensors, [seen.matrix])
        return grad_x, None, by_weight, seen.sums, None, None


def _before_products(
    ctx: Any, x: Tensor, enter: Entering | None, weights: Sequence[Tensor | None], narrow: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor]]:
    """The whole of x, and the weights in its type."""
    sixteen = []
    for weight_OI, at_hand in zip(weights, narrow, strict=True):
        assert weight_OI is not None
        sixteen.append(weight_OI.to(x.dtype) if at_hand is None else at_hand)
    ctx.enter, ctx.count = enter, len(weights)
    return x if enter is None else enter.whole(x), sixteen


def _by_input_and_weights(
    ctx: Any, saved: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of x and of each weight, from those of the products.

    saved: x, the weights in 16 bits, and the weights. needs_input_grad has x first, then enter, then weight, bias and
    narrow of each product.
    """
    x, narrow, weights = saved[0], saved[1 : 1 + ctx.count], saved[1 + ctx.count :]
    needed = ctx.needs_input_grad[2 : 2 + 3 * ctx.count : 3]
    started = None if ctx.enter is None else ctx.enter.start_whole(x, grads[0])
    grad_x = summed = None
    if ctx.needs_input_grad[0]:
        by_input = [grad_y @ narrow_OI for grad_y, narrow_OI in zip(grads, narrow, strict=True)]
        grad_x = sum(by_input[1:], by_input[0])
        summed = None if ctx.enter is None else ctx.enter.start_sum(grad_x)
    whole = x if started is None else started()
    by_weights = [
        gradient_by_weight(weight_OI, grad_y.flatten(0, -2), whole.flatten(0, -2)) if is_needed else None
        for weight_OI, grad_y, is_needed in zip(weights, grads, needed, strict=True)
    ]
    return grad_x if summed is None else summed(), by_weights
