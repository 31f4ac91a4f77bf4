"""Matrix products of 8-bit floating point numbers, for GPUs that multiply them at twice the rate of 16-bit ones.

Every tensor that enters a product is scaled by its own largest magnitude and rounded to 8 bits (Micikevicius et al.
2022, arXiv:2209.05433); the product is summed and given back in more. Weights, their gradients, the optimizer and
everything between the products stay as they are. On the CPU torch computes the same products, slowly.

Shape letters: M rows (tokens), N output features, K input features.
"""

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalith.layers.block import Block
from megalith.layers.linear import Linear

# e4m3: 4 bits of exponent and 3 of mantissa for everything; hybrid: e5m2, with more range, for gradients of outputs.
Float8Format = Literal["e4m3", "hybrid"]
_GRADIENTS = {"e4m3": torch.float8_e4m3fn, "hybrid": torch.float8_e5m2}
MULTIPLE = 16  # of rows and features, by which the hardware's products go


def use_float8(model: nn.Module, form: Float8Format) -> None:
    """Let the matrix products inside the model's blocks be computed in 8 bits; in place.

    Layers whose features are no multiple of 16 keep their type, as embeddings, norms, attention's scores and the output
    layer do.
    """
    for module in model.modules():
        if isinstance(module, Block):
            for layer in module.modules():
                if isinstance(layer, Linear) and not any(size % MULTIPLE for size in layer.weight.shape):
                    layer.product = partial(float8_linear, form=form)


def float8_linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, *, form: Float8Format) -> Tensor:
    """x W^T + b with 8-bit factors, in the type of x; rows that are no multiple of 16 are multiplied as they are.

    The gradient of the weight is fp32.
    """
    x_MK = x.flatten(0, -2)
    if len(x_MK) % MULTIPLE:
        return F.linear(x, weight_NK.to(x.dtype), bias_N)
    # The hardware's products add a bias of 16 bits on their way out.
    inside = bias_N is not None and x.dtype != torch.float32
    product: Tensor = _Float8Product.apply(x_MK, weight_NK, bias_N if inside else None, form)
    product = product.unflatten(0, x.shape[:-1])
    return product if bias_N is None or inside else product + bias_N


def in_8_bits(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """x divided by its scale and rounded to the 8-bit type, and the scale: a fp32 scalar."""
    largest = torch.finfo(kind).max
    scale = x.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny * largest) / largest
    return (x.float() / scale).clamp(-largest, largest).to(kind), scale


class _Float8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, form: Float8Format) -> Tensor:
        x8_MK, x_scale = in_8_bits(x_MK, torch.float8_e4m3fn)
        weight8_NK, weight_scale = in_8_bits(weight_NK, torch.float8_e4m3fn)
        ctx.save_for_backward(x8_MK, x_scale, weight8_NK, weight_scale)
        ctx.form, ctx.dtype = form, x_MK.dtype
        return _product(x8_MK, weight8_NK.t(), x_scale, weight_scale, x_MK.dtype, bias_N=bias_N, fast=True)

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x8_MK, x_scale, weight8_NK, weight_scale = ctx.saved_tensors
        grad8_MN, grad_scale = in_8_bits(grad_MN, _GRADIENTS[ctx.form])
        # The hardware wants the left factor by rows and the right one by columns.
        weight8_by_columns = weight8_NK.t().contiguous().t()
        grad_x = _product(grad8_MN, weight8_by_columns, grad_scale, weight_scale, ctx.dtype, fast=False)
        x8_by_columns = x8_MK.t().contiguous().t()
        grad8_NM = grad8_MN.t().contiguous()
        grad_weight = _product(grad8_NM, x8_by_columns, grad_scale, x_scale, torch.float32, fast=False)
        return grad_x, grad_weight, grad_MN.sum(0) if ctx.needs_input_grad[2] else None, None


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
