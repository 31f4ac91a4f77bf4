"""What enters a product, in one process: any function of the input in place of what ranks exchange."""

from collections.abc import Callable

import torch
from torch import Tensor

from megalith.layers.entering import Started


class EntersBy:
    """What enters is the function's value; of as many inputs as num_parts. Counts what its backward passes start."""

    def __init__(self, function: Callable[[Tensor], Tensor], num_parts: int = 1) -> None:
        self.enter = function
        self.num_parts = num_parts
        self.started: list[str] = []
        self._x = torch.empty(0)

    def whole(self, x: Tensor) -> Tensor:
        return self.enter(x)

    def start_whole(self, x: Tensor, grad: Tensor) -> Started:
        self.started.append("whole")
        self._x = x.detach()
        return lambda: self.enter(x)

    def start_sum(self, grad_whole: Tensor) -> Started:
        self.started.append("sum")
        with torch.enable_grad():
            x = self._x.requires_grad_()
            (grad,) = torch.autograd.grad(self.enter(x), x, grad_whole)
        return lambda: grad
