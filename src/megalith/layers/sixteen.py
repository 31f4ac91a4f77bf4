"""Layers in 16 bits on GPUs, as one would write their backward passes by hand.

Gradients of weights leave their products in fp32, where autograd would round them to 16 bits and widen them again, and
are added up there (accumulate.py). The gradient of a bias is a sum over rows of what a kernel is writing anyway, so
that kernel adds it up: behind GELU, and where the gradients of queries, keys and values come together (columns.py).

Shape letters: B batch, T token, N rows, I inputs, O outputs, H heads, K head width, F inner features.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalith.kernels import HAS_TRITON
from megalith.layers.accumulate import gradient_by_weight


def suits_sixteen(x: Tensor, weight_OI: Tensor) -> bool:
    """Whether a product is one of 16 bits on a GPU with a weight that is trained in fp32."""
    return x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16) and weight_OI.dtype == torch.float32


def sixteen_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, narrow_OI: Tensor | None = None) -> Tensor:
    """x weight^T + bias; gradients flow to all three, those of weight and bias in their own fp32.

    narrow, here and below: the weight in the type of x, if it is at hand.
    """
    y: Tensor = _Linear.apply(x, weight_OI, bias_O, narrow_OI)
    return y


@dataclass(frozen=True)
class SixteenJoined:
    """A product and what follows it at once, as one operation with one backward pass; needs Triton."""

    x: Tensor
    weight: Tensor  # OI
    bias: Tensor  # O
    narrow: Tensor | None  # OI

    def gelu(self, *, tanh: bool) -> Tensor:
        """gelu(x weight^T + bias)."""
        y: Tensor = _LinearGelu.apply(self.x, self.weight, self.bias, self.narrow, tanh)
        return y

    def heads(self, head_width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, BTHK each, of weights that hold those of each head in turn."""
        q_BTHK, k_BTHK, v_BTHK = _Heads.apply(self.x, self.weight, self.bias, self.narrow, head_width)
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


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, narrow_OI: Tensor | None) -> Tensor:
        weight = weight_OI.to(x.dtype) if narrow_OI is None else narrow_OI
        ctx.save_for_backward(x, weight, weight_OI)
        return F.linear(x, weight, None if bias_O is None else bias_O.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        grad_bias = grad_y.flatten(0, -2).sum(0, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        return *_by_input_and_weight(ctx, grad_y), grad_bias, None


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_FI: Tensor, bias_F: Tensor, narrow_FI: Tensor | None, tanh: bool) -> Tensor:
        weight = weight_FI.to(x.dtype) if narrow_FI is None else narrow_FI
        before = F.linear(x, weight, bias_F.to(x.dtype))
        ctx.save_for_backward(x, weight, weight_FI, before)
        ctx.tanh = tanh
        return gelu_of(before, tanh)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        from megalith.layers.columns import gelu_backward

        before = ctx.saved_tensors[-1]
        seen = gelu_backward(grad_y, before, ctx.tanh)
        return *_by_input_and_weight(ctx, seen.matrix), seen.sums, None, None


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor, narrow_OI: Tensor | None, head_width: int
    ) -> tuple[Tensor, ...]:
        weight = weight_OI.to(x.dtype) if narrow_OI is None else narrow_OI
        ctx.save_for_backward(x, weight, weight_OI)
        q_BTHK, k_BTHK, v_BTHK = F.linear(x, weight, bias_O.to(x.dtype)).unflatten(-1, (-1, 3, head_width)).unbind(-2)
        return q_BTHK, k_BTHK, v_BTHK

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        from megalith.layers.columns import join_heads

        seen = join_heads(grad_q, grad_k, grad_v)
        return *_by_input_and_weight(ctx, seen.matrix), seen.sums, None, None


def _by_input_and_weight(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of the weight; the context has saved x, the weight in 16 bits, and the weight."""
    x, narrow_OI, weight_OI, *_ = ctx.saved_tensors
    grad_x = grad_y @ narrow_OI if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[1]:
        return grad_x, None
    return grad_x, gradient_by_weight(weight_OI, grad_y.flatten(0, -2), x.flatten(0, -2))
