"""What the microbatches of a step in 16 or 8 bits share: rounded weights, and the gradients that they add up.

Weights of blocks are rounded once for all microbatches instead of in each of them. They are there while an engine runs
and at no other time, so that nobody meets rounded weights of yesterday; and they take the place of the copies that each
block would keep for its backward pass.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from megalith.layers.accumulate import accumulating
from megalith.layers.block import Block
from megalith.layers.linear import Linear
from megalith.parallel.step import Batch, Engine, Timers


class Narrowed:
    """An engine whose parts have their products' weights at hand while it runs: in dtype, or as the products round."""

    def __init__(self, engine: Engine, parts: Iterable[nn.Module], dtype: torch.dtype) -> None:
        self._engine = engine
        self._dtype = dtype
        linears = [linear for part in parts for linear in linears_of(part)]
        self._plain = [linear for linear in linears if linear.product is None]
        self._others = [linear for linear in linears if linear.product is not None]

    def run(self, microbatches: Sequence[Batch], *, backward: bool, timers: Timers) -> Tensor:
        """What the engine gives."""
        weights = [linear.weight.detach() for linear in self._plain]
        narrow = [torch.empty_like(weight, dtype=self._dtype) for weight in weights]
        if weights:
            torch._foreach_copy_(narrow, weights)
        for linear, weight in zip(self._plain, narrow, strict=True):
            linear.narrow = weight
        for linear in self._others:
            if linear.product is not None:
                linear.narrow = linear.product.rounded(linear.weight.detach())
        try:
            return self._engine.run(microbatches, backward=backward, timers=timers)
        finally:
            for linear in (*self._plain, *self._others):
                linear.narrow = None


class AddedUp:
    """An engine whose products add to the gradients of the microbatches before; see layers/accumulate.py."""

    def __init__(self, engine: Engine, parts: Iterable[nn.Module]) -> None:
        self._engine = engine
        self._weights = [linear.weight for part in parts for linear in linears_of(part)]

    def run(self, microbatches: Sequence[Batch], *, backward: bool, timers: Timers) -> Tensor:
        """What the engine gives."""
        with accumulating(self._weights):
            return self._engine.run(microbatches, backward=backward, timers=timers)


def linears_of(part: nn.Module) -> list[Linear]:
    """The products of a part's blocks that would round their weight by themselves."""
    blocks = [module for module in part.modules() if isinstance(module, Block)]
    linears = [module for block in blocks for module in block.modules() if isinstance(module, Linear)]
    return [linear for linear in linears if not linear.split_backward]
