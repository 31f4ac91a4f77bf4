"""The feed-forward half of a block."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalith.layers.initial import Initial
from megalith.layers.linear import Linear

# tanh: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))); erf: the exact form; onnx: erf with the divisor 1.41421, as
# Megatron-LM writes it for --onnx-safe.
Gelu = Literal["tanh", "erf", "onnx"]


def gelu(x: Tensor, form: Gelu) -> Tensor:
    """The Gaussian error linear unit (Hendrycks and Gimpel 2016) in one of its forms."""
    if form == "onnx":
        return x * 0.5 * (torch.erf(x / 1.41421) + 1)
    return F.gelu(x, approximate="tanh" if form == "tanh" else "none")


class FeedForward(nn.Module):
    """down(gelu(up(x))), from width to inner features and back, without the dropout and residual that follow."""

    def __init__(
        self, width: int, inner: int, form: Gelu, *, up: Initial, down: Initial, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.up = Linear(width, inner, up, device=device)
        self.down = Linear(inner, width, down, device=device)
        self.form: Gelu = form

    def forward(self, x_BTD: Tensor) -> Tensor:
        down: Tensor = self.down(gelu(self.up(x_BTD), self.form))
        return down
