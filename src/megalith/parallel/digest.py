"""A number that stands for the bits of a tensor, at the speed of memory."""

import torch
from torch import Tensor

ROW = 256  # words of 8 bytes that are added up before they are weighted
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)


@torch.no_grad()
def digest(tensor: Tensor) -> Tensor:
    """int64, on the tensor's device: another number if any one bit is another, and almost surely if several are.

    Rows of words are added up without carry beyond 64 bits and weighted by odd numbers, so a flipped bit cannot vanish.
    """
    data = tensor.detach().reshape(-1).view(torch.uint8)
    if data.numel() % 8:
        data = torch.nn.functional.pad(data, (0, -data.numel() % 8))
    words = (data.clone() if data.storage_offset() % 8 else data).view(torch.int64)
    whole = words.numel() // ROW * ROW
    sums = torch.cat([words[:whole].view(-1, ROW).sum(1), words[whole:].sum().reshape(1)])
    return (sums * (torch.arange(1, 2 * len(sums), 2, device=sums.device) * _ODD)).sum()
