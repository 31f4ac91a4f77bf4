"""Normalisation over the features of a token."""

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalith.kernels import HAS_TRITON
from megalith.layers.initial import ONES, ZEROS
from megalith.layers.products import Again

Normalization = Literal["LayerNorm", "RMSNorm"]
# Features whose sums a GPU's kernel keeps in registers (norm_fused.py).
LONGEST_SUMMED = 8192


class LayerNorm(nn.Module):
    """Layer normalisation (Ba, Kiros and Hinton 2016): statistics in fp32, output in the type of x.

    Seam for pipelines: split_backward, as of `Linear`.
    """

    def __init__(self, width: int, epsilon: float, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.empty(width, dtype=torch.float32, device=device))
        self.initial = {"weight": ONES, "bias": ZEROS}
        self.epsilon = epsilon
        self.split_backward = False

    def forward(self, x: Tensor) -> Tensor:
        return _layer_norm(x, self.weight.to(x.dtype), self.bias.to(x.dtype), epsilon=self.epsilon)

    def again(self, x: Tensor) -> Again:
        """How the norm of x is made, and can be made again."""
        return Again(partial(_layer_norm, epsilon=self.epsilon), (x, self.weight.to(x.dtype), self.bias.to(x.dtype)))

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, for what goes on beside the norm, and its norm: on a GPU one pass gives the gradients by both."""
        return _beside(self, x, self.weight, self.bias)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, epsilon: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


class RMSNorm(nn.Module):
    """Division by the root of the mean square (Zhang and Sennrich 2019, arXiv:1910.07467), in fp32; no bias.

    Beside x the backward pass keeps one number for each token. Seam for pipelines: split_backward, as of `Linear`.
    """

    def __init__(self, width: int, epsilon: float, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32, device=device))
        self.initial = {"weight": ONES}
        self.epsilon = epsilon
        self.split_backward = False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _RMSNorm.apply(x, self.weight, self.epsilon)
        return y

    def again(self, x: Tensor) -> Again:
        """How the norm of x is made, and can be made again."""
        return Again(partial(_rms_norm, epsilon=self.epsilon), (x, self.weight))

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, for what goes on beside the norm, and its norm: on a GPU one pass gives the gradients by both."""
        return _beside(self, x, self.weight, None)


def _rms_norm(x: Tensor, weight: Tensor, *, epsilon: float) -> Tensor:
    return _scaled(x, _inverse_rms(x, epsilon), weight)


def _scaled(x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    y = x.float() * inverse * weight
    # Where a conversion that changes nothing ends a forward pass, torch 2.11's compiler makes all gradients zero.
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    """fp32, one for each token: what its features are multiplied by."""
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        inverse = _inverse_rms(x, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return _scaled(x, inverse, weight)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        grad, normed = grad_y.float(), x.float() * inverse
        grad_weight = (grad * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        grad = grad * weight
        grad_x = inverse * (grad - normed * (grad * normed).mean(-1, keepdim=True))
        return grad_x.to(x.dtype), grad_weight, None


def suits_fused(x: Tensor) -> bool:
    """Whether a norm's backward pass is one kernel of our own: in 16 bits on a GPU."""
    in_16_bits = x.dtype in (torch.float16, torch.bfloat16)
    return x.device.type == "cuda" and in_16_bits and HAS_TRITON and x.shape[-1] <= LONGEST_SUMMED


def _beside(norm: LayerNorm | RMSNorm, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    # A pipeline that splits backward passes asks an operation for one gradient, as if it had one output.
    if norm.split_backward or not suits_fused(x):
        return x, norm(x)
    passing, y = _Beside.apply(x, weight, bias, norm.epsilon)
    return passing, y


class _Beside(torch.autograd.Function):
    """x, and LayerNorm of it, or without a bias RMSNorm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
        mean: Tensor | None
        if bias is None:
            mean, inverse = None, _inverse_rms(x, epsilon)
            y = _scaled(x, inverse, weight)
        else:
            narrow = weight.to(x.dtype), bias.to(x.dtype)
            y, mean, inverse = torch.native_layer_norm(x, weight.shape, *narrow, epsilon)
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight, mean, inverse)
        return x.view_as(x), y

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        from megalith.layers.norm_fused import norm_backward

        made = norm_backward(grad_y, grad_x, *ctx.saved_tensors)
        return made.x, made.weight, made.bias if ctx.has_bias else None, None


def make_norm(
    kind: Normalization, width: int, epsilon: float, *, device: torch.device | str | None = None
) -> nn.Module:
    """A norm of that kind."""
    return (RMSNorm if kind == "RMSNorm" else LayerNorm)(width, epsilon, device=device)
