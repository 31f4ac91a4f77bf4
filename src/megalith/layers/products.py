"""Matrix products in fp32 on the CPU by oneDNN, whose kernels are as fast on one maker's processors as on another's.

torch sends its own products to MKL, which is 5 to 15 % slower on AMD's (Zen 4), and half as fast on Zen 5. The choice
depends on processor, type, device and size, never on a measurement, so that a run gives the same bits each time.

Shape letters: N rows, I inputs, O outputs.
"""

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megalith.layers.entering import Entering, Factor

# Multiplications from which a product goes to oneDNN: starting one costs more than a small product.
LEAST = 1 << 22


class Again(NamedTuple):
    """How the backward pass can make a product's input again instead of keeping it: make(*of), with the same bits."""

    make: Callable[..., Tensor]
    of: tuple[Tensor, ...]  # what is kept anyway


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, again: Again | None = None) -> Tensor:
    """x weight^T + bias over the last dimension of x; gradients flow to all three.

    again: of x; followed where the product goes to oneDNN.
    """
    if not suits_onednn(x, weight_OI):
        return F.linear(x, weight_OI, bias_O)
    y: Tensor = _Linear.apply(x, weight_OI, bias_O, *((None, x) if again is None else (again.make, *again.of)))
    return y


def entered_linears(
    x: Tensor, factors: Sequence[Factor], enter: Entering, again: Again | None = None
) -> tuple[Tensor, ...]:
    """The products of one input, of which each of several ranks computes a part; weights are in the type of x.

    again: of x; followed in fp32 on a CPU, where the compiler does not choose itself.
    """
    is_followed = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()
    if not torch.is_grad_enabled():
        # Without gradients torch 2.13's compiler passes no ctx where a forward pass has as many names as arguments, and
        # _EnteredLinears has with one factor.
        return _products(enter.whole(x), [factor.weight for factor in factors], [factor.bias for factor in factors])
    make, of = (None, ()) if again is None or not is_followed else again
    flat = [part for factor in factors for part in (factor.weight, factor.bias)]
    products: tuple[Tensor, ...] = _EnteredLinears.apply(x, enter, make, len(factors), *flat, *of)
    return products


def suits_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether a product goes to oneDNN: a large one in fp32 on the CPU, where the compiler does not choose itself."""
    return (
        left.device.type == "cpu"
        and left.dtype == right.dtype == torch.float32
        and left.numel() * right.shape[0] >= LEAST
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
    )


@cache
def leaves_half_to_onednn() -> bool:
    """Whether MKL uses half of the width of this processor's vector units, so that no product should go to it.

    On AMD's processors it runs code for 256 bits. Zen 4 takes 512 bits in two halves and loses nothing by it; Zen 5,
    the first of them with AVX-VNNI beside AVX-512, is left half idle (docs/LOG.md).
    """
    has = torch.cpu.get_capabilities()
    return is_amds() and bool(has.get("avx512_f") and has.get("avx_vnni"))


@cache
def is_amds() -> bool:
    """Whether this processor is AMD's."""
    return "AMD" in torch.cpu.get_capabilities().get("cpu_name", "")


@cache
def multiplies_bf16_without_amx() -> bool:
    """Whether this processor has AVX-512's instructions for products of bf16, and not those of AMX."""
    return bool(torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported())


@cache
def lacks_avx512() -> bool:
    """Whether this is an x86-64 without AVX-512.

    There oneDNN computes gradients that are 3072 or 5120 wide at 0.55 to 0.65 of the rate of MKL, though those of the
    next power of two at more than MKL's (docs/LOG.md).
    """
    has = torch.cpu.get_capabilities()
    return has.get("architecture") == "x86_64" and not has.get("avx512_f")


def has_instructions_for(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies numbers of a type itself, as far as can be told: only for x86-64."""
    if dtype == torch.float32 or platform.machine() != "x86_64":
        return True
    if dtype == torch.bfloat16:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.cpu._is_amx_fp16_supported())


def times_transposed(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x weight^T + bias by oneDNN, in new memory and without gradients; for what `suits_onednn`."""
    if not (weight_OI.is_contiguous() or weight_OI.t().is_contiguous()):
        # From a view with gaps it would multiply by its reference code, 2000 times as slowly.
        weight_OI = weight_OI.contiguous()
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")
    return y


def linear_without_gradients(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x weight^T + bias, by oneDNN where MKL would leave half of the processor idle, else as torch does it."""
    if suits_onednn(x, weight_OI) and leaves_half_to_onednn():
        return times_transposed(x, weight_OI, bias_O)
    return F.linear(x, weight_OI, bias_O)


@contextmanager
def batches_by_onednn(left: Tensor) -> Iterator[None]:
    """While it lasts batches of products in fp32 on a CPU go to oneDNN, where MKL would leave half of it idle."""
    suits = left.device.type == "cpu" and left.dtype == torch.float32 and multiplies_batches_by_onednn()
    with _as_if_rounding_to_bf16() if suits else nullcontext():
        yield


@cache
def multiplies_batches_by_onednn() -> bool:
    """Whether this processor is one for `batches_by_onednn`, and oneDNN keeps all bits of what it multiplies.

    torch sends batches in fp32 to oneDNN only where it is allowed to round them to bf16. For processors without AMX
    oneDNN has no such code and multiplies in fp32; should that change, a product shows it.
    """
    if not leaves_half_to_onednn() or torch.cpu._is_amx_tile_supported() or not torch.backends.mkldnn.is_available():
        return False
    number = 1 + 2.0**-12
    with _as_if_rounding_to_bf16():
        product = torch.bmm(torch.full((4, 128, 64), number), torch.ones(4, 64, 128))
    return bool((product == 64 * number).all())


@contextmanager
def _as_if_rounding_to_bf16() -> Iterator[None]:
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, make: Callable[..., Tensor] | None, *of: Tensor
    ) -> Tensor:
        ctx.make = make
        ctx.save_for_backward(weight_OI, *of)
        return times_transposed(x, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        weight_OI, *of = ctx.saved_tensors
        grad_NO = grad_y.reshape(-1, grad_y.shape[-1])
        grad_weight = None
        if ctx.needs_input_grad[1]:
            x = of[0] if ctx.make is None else ctx.make(*of)
            grad_weight = _gradient_by_weight(grad_NO, x.reshape(-1, x.shape[-1]), weight_OI)
            del x
        grad_x = _gradient_by_input(grad_y, weight_OI) if ctx.needs_input_grad[0] else None
        grad_bias = grad_NO.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, *(None for _ in of)


class _EnteredLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, enter: Entering, make: Callable[..., Tensor] | None, count: int, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, biases, of = tensors[: 2 * count : 2], tensors[1 : 2 * count : 2], tensors[2 * count :]
        ctx.enter, ctx.make, ctx.count = enter, make, count
        ctx.save_for_backward(*weights, *(of or (x,)))
        return _products(enter.whole(x), weights, biases)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        weights, of = saved[: ctx.count], saved[ctx.count :]
        started = ctx.enter.start_whole(of[0] if ctx.make is None else ctx.make(*of), grads[0])
        summed = None
        if ctx.needs_input_grad[0]:
            by_input = [_by_input(grad, weight_OI) for grad, weight_OI in zip(grads, weights, strict=True)]
            summed = ctx.enter.start_sum(sum(by_input[1:], by_input[0]))
            del by_input
        whole_NI = started().flatten(0, -2)
        del started
        by_factor: list[Tensor | None] = []
        for number, (grad, weight_OI) in enumerate(zip(grads, weights, strict=True)):
            grad_NO = grad.flatten(0, -2)
            needs_weight, needs_bias = ctx.needs_input_grad[4 + 2 * number : 6 + 2 * number]
            by_factor.append(_by_weight(grad_NO, whole_NI, weight_OI) if needs_weight else None)
            by_factor.append(grad_NO.sum(0) if needs_bias else None)
        beside = of if ctx.make is not None else ()
        return None if summed is None else summed(), None, None, None, *by_factor, *(None for _ in beside)


def _products(whole: Tensor, weights: Sequence[Tensor | None], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    products = []
    for weight_OI, bias_O in zip(weights, biases, strict=True):
        assert weight_OI is not None
        multiply = times_transposed if suits_onednn(whole, weight_OI) else F.linear
        products.append(multiply(whole, weight_OI, bias_O))
    return tuple(products)


def _by_input(grad: Tensor, weight_OI: Tensor) -> Tensor:
    if suits_onednn(grad, weight_OI.t()):
        return _gradient_by_input(grad, weight_OI)
    return grad @ weight_OI


def _by_weight(grad_NO: Tensor, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    if suits_onednn(grad_NO.t(), x_NI.t()):
        return _gradient_by_weight(grad_NO, x_NI, weight_OI)
    return grad_NO.t() @ x_NI


def _gradient_by_input(grad: Tensor, weight_OI: Tensor) -> Tensor:
    """grad weight over the last dimension of grad."""
    if _narrows(weight_OI) and lacks_avx512():
        return torch.matmul(grad, weight_OI)
    return times_transposed(grad, weight_OI.t())


def _gradient_by_weight(grad_NO: Tensor, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """grad^T x. Where a layer narrows, oneDNN is 4 to 8 % faster at it; where it widens, MKL is mostly as fast."""
    if leaves_half_to_onednn() or (_narrows(weight_OI) and not lacks_avx512()):
        return times_transposed(grad_NO.t(), x_NI.t())
    return torch.mm(grad_NO.t(), x_NI)


def _narrows(weight_OI: Tensor) -> bool:
    return weight_OI.shape[1] > weight_OI.shape[0]
