"""Matrix product and bias."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megalith.layers.initial import ZEROS, Initial
from megalith.layers.products import Again, linear


class Linear(nn.Module):
    """x W^T + b, with fp32 weights that are cast to the type of x, so that their gradients arrive in fp32.

    Seams for tensor parallelism: enter is applied to the input; leave to the product before the bias is added, so that
    partial products can be summed first. Seam for other arithmetic: product(x, weight, bias).
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

    def forward(self, x: Tensor, again: Again | None = None) -> Tensor:
        """again: how the backward pass can make x again instead of keeping it."""
        if self.enter is not None:
            x, again = self.enter(x), None
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.leave is None:
            return self._multiply(x, bias, again)
        product = self.leave(self._multiply(x, None, again))
        return product if bias is None else product + bias

    def _multiply(self, x: Tensor, bias: Tensor | None, again: Again | None) -> Tensor:
        if self.product is not None:
            return self.product(x, self.weight, bias)
        return linear(x, self.weight.to(x.dtype), bias, again)
