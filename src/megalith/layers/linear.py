"""Matrix product and bias."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megalith.layers.initial import ZEROS, Initial
from megalith.layers.products import Again, linear
from megalith.layers.sixteen import sixteen_linear, suits_sixteen


class Linear(nn.Module):
    """x W^T + b, with fp32 weights that are cast to the type of x, so that their gradients arrive in fp32.

    Seams for tensor parallelism: enter is applied to the input; leave to the product before the bias is added, so that
    partial products can be summed first. Seam for other arithmetic: product(x, weight, bias). Seam for pipelines:
    split_backward, for backward passes that want the gradients of inputs first and those of weights later. Seam for
    several microbatches: narrow, the weight in 16 bits, which is not rounded again where it is at hand.
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
        self.product: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None
        self.split_backward = False
        self.narrow: Tensor | None = None

    def forward(self, x: Tensor, again: Again | None = None) -> Tensor:
        """again: how the backward pass can make x again instead of keeping it."""
        if self.enter is not None:
            x, again = self.enter(x), None
        if self.leave is None:
            return self._multiply(x, self.bias, again)
        product = self.leave(self._multiply(x, None, again))
        return product if self.bias is None else product + self.bias.to(x.dtype)

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
        """What enters the product, weight, bias, narrow weight, if it is one in 16 bits on a GPU and gets but a bias.

        So that a caller can compute what follows together with it.
        """
        if self.leave is not None or self.bias is None or not self._is_by_hand(x):
            return None
        return x if self.enter is None else self.enter(x), self.weight, self.bias, self.narrow

    def _is_by_hand(self, x: Tensor) -> bool:
        return self.product is None and not self.split_backward and suits_sixteen(x, self.weight)

    def _multiply(self, x: Tensor, bias: Tensor | None, again: Again | None) -> Tensor:
        if self._is_by_hand(x):
            return sixteen_linear(x, self.weight, bias, self.narrow)
        narrow = None if bias is None else bias.to(x.dtype)
        if self.product is not None:
            return self.product(x, self.weight, narrow)
        return linear(x, self.weight.to(x.dtype), narrow, again)


def split_backward_passes(model: nn.Module) -> None:
    """Let the backward passes of the model's products come in two halves; in place."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.split_backward = True
