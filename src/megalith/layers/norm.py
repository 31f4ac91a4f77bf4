"""Normalisation over the features of a token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalith.layers.initial import ONES, ZEROS


class LayerNorm(nn.Module):
    """Layer normalisation (Ba, Kiros and Hinton 2016): statistics in fp32, output in the type of x."""

    def __init__(self, width: int, epsilon: float, *, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.empty(width, dtype=torch.float32, device=device))
        self.initial = {"weight": ONES, "bias": ZEROS}
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.epsilon)
