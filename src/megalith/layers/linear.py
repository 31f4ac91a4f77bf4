"""Matrix product and bias."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megalith.layers.initial import ZEROS, Initial
from megalith.layers.norm import LayerNorm, RMSNorm
from megalith.layers.products import Again, linear
from megalith.layers.sixteen import SixteenJoined, sixteen_linear, suits_sixteen


class Joined(Protocol):
    """A product and what follows it at once, as one operation."""

    def gelu(self, *, tanh: bool) -> Tensor:
        """GELU of the product."""

    def heads(self, head_width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, BTHK each, of weights that hold those of each head in turn."""


class Product(Protocol):
    """x weight^T + bias in an arithmetic of its own. narrow: what `rounded` made of the weight, if it is at hand."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, narrow: Any = None) -> Tensor: ...

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor, narrow: Any = None) -> Joined:
        """As one with what follows; x is of 16 bits and on a GPU."""

    def rounded(self, weight: Tensor) -> Any:
        """The weight as both passes take it."""


class Linear(nn.Module):
    """x W^T + b, with fp32 weights that are cast to the type of x, so that their gradients arrive in fp32.

    Seams for tensor parallelism: enter is applied to the input; leave to the product before the bias is added, so that
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
        self.enter: Callable[[Tensor], Tensor] | None = None
        self.leave: Callable[[Tensor], Tensor] | None = None
        self.product: Product | None = None
        self.split_backward = False
        self.narrow: Any = None

    def forward(self, x: Tensor, again: Again | None = None) -> Tensor:
        """again: how the backward pass can make x again instead of keeping it."""
        if self.enter is not None:
            x, again = self.enter(x), None
        if self.leave is None:
            return self._multiply(x, self.bias, again)
        product = self.leave(self._multiply(x, None, again))
        return product if self.bias is None else product + self.bias.to(x.dtype)

    def joined(self, x: Tensor) -> Joined | None:
        """The product as one with what a caller makes of it next; None where that gains nothing: for that it must be
        of 16 or 8 bits on a GPU, and get but a bias.
        """
        if self.leave is not None or self.bias is None or self.split_backward or not suits_sixteen(x, self.weight):
            return None
        x = x if self.enter is None else self.enter(x)
        if self.product is None:
            return SixteenJoined(x, self.weight, self.bias, self.narrow)
        return self.product.joined(x, self.weight, self.bias, self.narrow)

    def _is_by_hand(self, x: Tensor) -> bool:
        return self.product is None and not self.split_backward and suits_sixteen(x, self.weight)

    def _multiply(self, x: Tensor, bias: Tensor | None, again: Again | None) -> Tensor:
        if self._is_by_hand(x):
            return sixteen_linear(x, self.weight, bias, self.narrow)
        if self.product is not None:
            return self.product(x, self.weight, bias, self.narrow)
        return linear(x, self.weight.to(x.dtype), None if bias is None else bias.to(x.dtype), again)


def split_backward_passes(model: nn.Module) -> None:
    """Let the backward passes of the model's products and norms come in two halves; in place."""
    for module in model.modules():
        if isinstance(module, Linear | LayerNorm | RMSNorm):
            module.split_backward = True
