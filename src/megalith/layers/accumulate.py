"""Gradients of weights in fp32 from products in 16 bits, which add to the gradient that is there by themselves.

Autograd would leave the gradient of each microbatch in memory of its own and add it in another pass, 12 bytes a weight.
While `accumulating` is entered, a product takes the gradient out of the parameter, adds to it and gives it back as its
own: autograd meets a parameter without a gradient, and takes that one over as it is.

Shape letters: N rows, I inputs, O outputs.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Parameters whose gradients may be taken, by where they lie: what is computed again is given another tensor there.
_by_place: dict[int, nn.Parameter] = {}


@contextmanager
def accumulating(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """While entered, backward passes may take the gradients of these weights and add to them.

    `torch.autograd.grad` would then give the sum with what was there; nothing else may read gradients between a
    product's backward pass and the end of autograd's.
    """
    entered = {weight.data_ptr(): weight for weight in weights}
    _by_place.update(entered)
    try:
        yield
    finally:
        for place in entered:
            del _by_place[place]


def gradient_by_weight(weight_OI: Tensor, grad_NO: Tensor, x_NI: Tensor) -> Tensor:
    """grad^T x in fp32, OI, and what the weight's gradient was before, if it may be taken."""
    gradient_OI: Tensor = _gradient_by_weight_op(weight_OI, grad_NO, x_NI)
    return gradient_OI


def multiply(weight_OI: Tensor, grad_NO: Tensor, x_NI: Tensor) -> Tensor:
    """`gradient_by_weight`, where nothing is traced."""
    parameter = _by_place.get(weight_OI.data_ptr())
    if parameter is None or parameter.grad is None or parameter.shape != weight_OI.shape:
        return product_in_fp32(grad_NO.t(), x_NI)
    total_OI, parameter.grad = parameter.grad, None
    add_product_in_fp32(total_OI, grad_NO.t(), x_NI)
    return total_OI


# To the compiler it is a function of its arguments; what it takes from a parameter has no other reader.
_gradient_by_weight_op = torch.library.custom_op("megalith::gradient_by_weight", multiply, mutates_args=())


@_gradient_by_weight_op.register_fake
def _(weight_OI: Tensor, grad_NO: Tensor, x_NI: Tensor) -> Tensor:
    return weight_OI.new_empty(weight_OI.shape, dtype=torch.float32)


def product_in_fp32(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of 16-bit matrices, never rounded to 16 bits where the device can leave it so."""
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def add_product_in_fp32(total: Tensor, left: Tensor, right: Tensor, *, first: bool = False) -> None:
    """total += left @ right, in place; total in fp32, the matrices in 16 bits. first: the product overwrites."""
    if left.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=torch.float32, beta=0 if first else 1, out=total)
        return
    product = product_in_fp32(left, right)
    total.copy_(product) if first else total.add_(product)
