"""What several ranks do with the input of a product that each of them computes a part of, and with its gradient."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

# What was started, and is waited for.
Started = Callable[[], Tensor]


class Entering(Protocol):
    """The input is made whole before the product and, if only a part of it is kept, again for the weight's gradient;
    the gradient by the whole is summed over ranks.

    Both of the backward pass are started before products that do not need them and waited for after these.
    """

    @property
    def num_parts(self) -> int:
        """Of how many inputs as large as this one the whole consists."""

    def enter(self, x: Tensor) -> Tensor:
        """The whole input; gradients flow back, summed."""

    def whole(self, x: Tensor) -> Tensor:
        """The whole input; no gradient."""

    def start_whole(self, x: Tensor, grad: Tensor) -> Started:
        """The whole input again, in a backward pass that was given grad."""

    def start_sum(self, grad_whole: Tensor) -> Started:
        """The gradient by x from this rank's gradient by the whole."""


class Factor(NamedTuple):
    """What a product takes besides its input."""

    weight: Tensor  # OI: outputs, inputs
    bias: Tensor | None  # O
    narrow: object = None  # the weight in the type of the product, if it is at hand
