"""Matrix product and bias."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megalith.layers.entering import Entering, Factor
from megalith.layers.initial import ZEROS, Initial
from megalith.layers.norm import LayerNorm, RMSNorm
from megalith.layers.products import Again, entered_linears, linear
from megalith.layers.sixteen import SixteenJoined, sixteen_linears, suits_sixteen


class Joined(Protocol):
    """A product and what follows it at once, as one operation."""

    def gelu(self, *, tanh: bool) -> Tensor:
        """GELU of the product."""

    def heads(self, head_width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, BTHK each, of weights that hold those of each head in turn."""


class Product(Protocol):
    """x weight^T + bias of each factor in an arithmetic of its own. narrow: what `rounded` made of the weight, if it is
    at hand. enter: of x.
    """

    def __call__(self, x: Tensor, factors: Sequence[Factor], enter: Entering | None = None) -> tuple[Tensor, ...]: ...

    def joined(
        self, x: Tensor, weight: Tensor, bias: Tensor, narrow: Any = None, enter: Entering | None = None
    ) -> Joined:
        """As one with what follows; x is of 16 bits and on a GPU."""

    def rounded(self, weight: Tensor) -> Any:
        """The weight as both passes take it."""


class Linear(nn.Module):
    """x W^T + b, with fp32 weights that are cast to the type of x, so that their gradients arrive in fp32.

    Seams for tensor parallelism: enter, of the input; leave is applied to the product before the bias is added, so that
    partial products can be summed first. Seam for other arithmetic: product. Seam for pipelines:
    split_backward, for backward passes that want the gradients of inputs first and those of weights later. Seam for
    several microbatches: narrow, the weight in 16 bits or as product rounds it, which is not rounded again where it is
    at hand.
    """

    def __init__(
        self, inputs: int, outputs: int, weight: Initial, *, bias: bool = True, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=torch.float32, device=device)) if bias else None
        self.initial = {"weight": weight, "bias": ZEROS}
        self.enter: Entering | None = None
        self.leave: Callable[[Tensor], Tensor] | None = None
        self.product: Product | None = None
        self.split_backward = False
        self.narrow: Any = None

    def forward(self, x: Tensor, again: Again | None = None) -> Tensor:
        """again: how the backward pass can make x again instead of keeping it."""
        if self.leave is None:
            return products_of(x, [self], self.enter, again)[0]
        product = self.leave(_multiply(x, [self], self.enter, again, with_bias=False)[0])
        return product if self.bias is None else product + self.bias.to(x.dtype)

    def joined(self, x: Tensor) -> Joined | None:
        """The product as one with what a caller makes of it next; None where that gains nothing: for that it must be
        of 16 or 8 bits on a GPU, and get but a bias.
        """
        if self.leave is not None or self.bias is None or self.split_backward or not suits_sixteen(x, self.weight):
            return None
        if self.product is None:
            return SixteenJoined(x, self.weight, self.bias, self.narrow, self.enter)
        return self.product.joined(x, self.weight, self.bias, self.narrow, self.enter)


def products_of(
    x: Tensor, linears: Sequence[Linear], enter: Entering | None, again: Again | None = None
) -> tuple[Tensor, ...]:
    """The products of one input, alike in arithmetic, which enters them together. again: as of `Linear`."""
    return _multiply(x, linears, enter, again, with_bias=True)


def _multiply(
    x: Tensor, linears: Sequence[Linear], enter: Entering | None, again: Again | None, *, with_bias: bool
) -> tuple[Tensor, ...]:
    first = linears[0]
    if first.split_backward and enter is not None:
        # torch's pipelines take the gradients by inputs and by weights apart; what is exchanged belongs to the former.
        x, enter, again = enter.enter(x), None, None
    factors = [Factor(linear.weight, linear.bias if with_bias else None, linear.narrow) for linear in linears]
    if first.product is not None:
        return first.product(x, factors, enter)
    if not first.split_backward and suits_sixteen(x, first.weight):
        return sixteen_linears(x, factors, enter)
    narrow = [Factor(weight.to(x.dtype), None if b is None else b.to(x.dtype)) for weight, b, _ in factors]
    if enter is not None:
        return entered_linears(x, narrow, enter, again)
    return tuple(linear(x, weight, bias, again) for weight, bias, _ in narrow)


def split_backward_passes(model: nn.Module) -> None:
    """Let the backward passes of the model's products and norms come in two halves; in place."""
    for module in model.modules():
        if isinstance(module, Linear | LayerNorm | RMSNorm):
            module.split_backward = True
