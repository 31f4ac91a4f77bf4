"""Models as PyTorch's counter of operations (FlopCounterMode) takes them."""

import torch
from torch import nn


def make_countable(model: nn.Module) -> None:
    """Give the model weights, and attention out of plain products, which the counter knows."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    for module in model.modules():
        if hasattr(module, "attend"):
            module.attend = plain_attention  # type: ignore[assignment]


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """Attention to all keys, whose heads may be fewer; what else the call says is not looked at."""
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    return torch.softmax(q @ k.mT, -1) @ v
