"""What enters column-parallel products, over the ranks of the tensor axis (`megalith.layers.entering.Entering`).

Backward passes gather a cut sequence again while the gradient by it is computed, and sum that over ranks while the
gradient of the weight is (Korthikanti et al. 2022, arXiv:2205.05198, keep a cut sequence in the same way).
"""

from dataclasses import dataclass

from torch import Tensor

from megalith.layers.entering import Started
from megalith.parallel.collectives import (
    Group,
    all_gather,
    copy_to_group,
    size_of,
    start_gather,
    start_scatter_sum,
    start_sum,
)
from megalith.parallel.sequence import in_a_row, join_for_product


@dataclass(frozen=True)
class Copied:
    """Every rank has all of the input."""

    group: Group
    num_parts: int = 1

    def enter(self, x: Tensor) -> Tensor:
        return copy_to_group(x, self.group)

    def whole(self, x: Tensor) -> Tensor:
        return x

    def start_whole(self, x: Tensor, grad: Tensor) -> Started:
        return lambda: x

    def start_sum(self, grad_whole: Tensor) -> Started:
        return start_sum(grad_whole, self.group)


@dataclass(frozen=True)
class Gathered:
    """Every rank has a part of the tokens, as `megalith.parallel.sequence` cuts them."""

    group: Group

    @property
    def num_parts(self) -> int:
        return size_of(self.group)

    def enter(self, x: Tensor) -> Tensor:
        return join_for_product(x, self.group)

    def whole(self, x: Tensor) -> Tensor:
        return in_a_row(all_gather, x, self.group)

    def start_whole(self, x: Tensor, grad: Tensor) -> Started:
        gathered = start_gather(x.flatten(0, 1), self.group, after=grad)
        return lambda: gathered().unflatten(0, (len(x), -1))

    def start_sum(self, grad_whole: Tensor) -> Started:
        summed = start_scatter_sum(grad_whole.flatten(0, 1), self.group)
        return lambda: summed().unflatten(0, (len(grad_whole), -1))
