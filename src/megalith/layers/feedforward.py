"""The feed-forward half of a block."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalith.layers.entering import Entering
from megalith.layers.initial import Initial
from megalith.layers.linear import Linear, products_of
from megalith.layers.products import Again
from megalith.layers.sixteen import has_kernels

# tanh: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))); erf: the exact form; onnx: erf with the divisor 1.41421, as
# Megatron-LM writes it for --onnx-safe.
Gelu = Literal["tanh", "erf", "onnx"]
# gelu and relu (max(x, 0)) stand between two matrices; gated-gelu multiplies the product with a third's GELU, swiglu
# with a third's SiLU, x / (1 + exp(-x)).
Activation = Literal["gelu", "relu", "gated-gelu", "swiglu"]
GATED: tuple[Activation, ...] = ("gated-gelu", "swiglu")


def gelu(x: Tensor, form: Gelu) -> Tensor:
    """The Gaussian error linear unit (Hendrycks and Gimpel 2016) in one of its forms."""
    if form == "onnx":
        return x * 0.5 * (torch.erf(x / 1.41421) + 1)
    return F.gelu(x, approximate="tanh" if form == "tanh" else "none")


class FeedForward(nn.Module):
    """down(gelu(up(x))), from width to inner features and back, without the dropout and residual that follow.

    Or down(relu(up(x))), or with a gate down(gelu(gate(x)) up(x)) or down(silu(gate(x)) up(x)) (GEGLU and SwiGLU,
    Shazeer 2020, arXiv:2002.05202).

    Seam for tensor parallelism: enter, of what up and gate take, so that it is communicated once.
    """

    def __init__(
        self,
        width: int,
        inner: int,
        form: Gelu,
        *,
        up: Initial,
        down: Initial,
        activation: Activation = "gelu",
        bias: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.up = Linear(width, inner, up, bias=bias, device=device)
        self.gate = Linear(width, inner, up, bias=bias, device=device) if activation in GATED else None
        self.down = Linear(inner, width, down, bias=bias, device=device)
        self.form: Gelu = form
        self.activation = activation
        self.enter: Entering | None = None

    def forward(self, x_BTD: Tensor, again: Again | None = None) -> Tensor:
        """again: how the backward pass can make x again instead of keeping it."""
        if self.gate is not None:
            inner_BTF, gate_BTF = products_of(x_BTD, [self.up, self.gate], self.enter, again)
            gated: Tensor = self.down(self._activated(gate_BTF) * inner_BTF)
            return gated
        joined = self.up.joined(x_BTD) if self.activation == "gelu" and has_kernels(form=self.form) else None
        if joined is not None:
            made: Tensor = self.down(joined.gelu(tanh=self.form == "tanh"))
            return made
        down: Tensor = self.down(self._activated(self.up(x_BTD, again)))
        return down

    def _activated(self, x_BTF: Tensor) -> Tensor:
        if self.activation == "relu":
            return F.relu(x_BTF)
        return F.silu(x_BTF) if self.activation == "swiglu" else gelu(x_BTF, self.form)
