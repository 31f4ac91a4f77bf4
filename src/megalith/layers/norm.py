"""Normalisation over the features of a token."""

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalith.layers.initial import ONES, ZEROS
from megalith.layers.products import Again

Normalization = Literal["LayerNorm", "RMSNorm"]


class LayerNorm(nn.Module):
    """Layer normalisation (Ba, Kiros and Hinton 2016): statistics in fp32, output in the type of x."""

    def __init__(self, width: int, epsilon: float, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.empty(width, dtype=torch.float32, device=device))
        self.initial = {"weight": ONES, "bias": ZEROS}
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return _layer_norm(x, self.weight.to(x.dtype), self.bias.to(x.dtype), epsilon=self.epsilon)

    def again(self, x: Tensor) -> Again:
        """How the norm of x is made, and can be made again."""
        return Again(partial(_layer_norm, epsilon=self.epsilon), (x, self.weight.to(x.dtype), self.bias.to(x.dtype)))


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, epsilon: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


class RMSNorm(nn.Module):
    """Division by the root of the mean square (Zhang and Sennrich 2019, arXiv:1910.07467), in fp32; no bias."""

    def __init__(self, width: int, epsilon: float, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32, device=device))
        self.initial = {"weight": ONES}
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (normed * self.weight).to(x.dtype)


def make_norm(
    kind: Normalization, width: int, epsilon: float, *, device: torch.device | str | None = None
) -> nn.Module:
    """A norm of that kind."""
    return (RMSNorm if kind == "RMSNorm" else LayerNorm)(width, epsilon, device=device)
