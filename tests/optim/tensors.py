"""An optimizer's tensors as they are, whatever they are kept in."""

import torch
from torch import Tensor, nn

from megalith.optim.groups import readable_tensors


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """By the names `exp_avg.PARAMETER`, ...; copies of moments in fewer bits, the tensors themselves of all others."""
    readable = readable_tensors(model, optimizer)
    return {name: tensor if read is None else read() for name, (tensor, read) in readable.items()}
