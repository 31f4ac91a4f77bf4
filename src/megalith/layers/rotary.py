"""Rotary positions (Su et al. 2021, arXiv:2104.09864): queries and keys turn by angles that grow with their place.

So their product depends on the distance alone, and there is no table. Feature f of the first half is turned with
feature f of the second, as Llama has it in Hugging Face's weights; the paper turns neighbours.

Shape letters: B batch, T token, H heads, K head width, F pairs of features that are turned.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotation:
    """By how much each token's pairs of features turn; made once for all layers. fp32 BT1F."""

    cosine: Tensor
    sine: Tensor


def rotation_at(positions_BT: Tensor, *, width: int, base: float) -> Rotation:
    """The rotation of tokens at these positions: of pair f the angle position x base^(-2f / width), in fp32.

    width: features that are turned, an even number; those of a head behind them stay.
    """
    exponents_F = torch.arange(0, width, 2, dtype=torch.float32, device=positions_BT.device) / width
    angles_BT1F = positions_BT[:, :, None, None].float() * (1.0 / base**exponents_F)
    return Rotation(angles_BT1F.cos(), angles_BT1F.sin())


def rotate(x_BTHK: Tensor, rotation: Rotation) -> Tensor:
    """Queries or keys, turned in fp32; in the type of x and in new memory."""
    half = rotation.cosine.shape[-1]
    first, second, rest = x_BTHK.split([half, half, x_BTHK.shape[-1] - 2 * half], -1)
    first, second = first.float(), second.float()
    turned = first * rotation.cosine - second * rotation.sine, second * rotation.cosine + first * rotation.sine
    return torch.cat([*(part.to(x_BTHK.dtype) for part in turned), rest], -1)
