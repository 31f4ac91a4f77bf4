"""Rotary positions (Su et al. 2021, arXiv:2104.09864): queries and keys turn by angles that grow with their place.

So their product depends on the distance alone, and there is no table. Feature f of the first half is turned with
feature f of the second, as Llama has it in Hugging Face's weights; the paper turns neighbours.

Shape letters: B batch, T token, H heads, K head width, F pairs of features that are turned.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Of Llama 3.1: the tokens of its texts before they became longer, and how often a pair of features turns in these.
FIRST_LENGTH, FEW_TURNS, MANY_TURNS = 8192, 1.0, 4.0


@dataclass(frozen=True, eq=False)
class Rotation:
    """By how much each token's pairs of features turn; made once for all layers. fp32 BT1F."""

    cosine: Tensor
    sine: Tensor


def rotation_at(positions_BT: Tensor, *, width: int, base: float, stretch: float = 1.0) -> Rotation:
    """The rotation of tokens at these positions: of pair f the angle position x base^(-2f / width), in fp32.

    width: features that are turned, an even number; those of a head behind them stay. stretch: see `stretched`.
    """
    exponents_F = torch.arange(0, width, 2, dtype=torch.float32, device=positions_BT.device) / width
    speeds_F = 1.0 / base**exponents_F
    if stretch != 1:
        speeds_F = stretched(speeds_F, stretch)
    angles_BT1F = positions_BT[:, :, None, None].float() * speeds_F
    return Rotation(angles_BT1F.cos(), angles_BT1F.sin())


def stretched(speeds_F: Tensor, factor: float) -> Tensor:
    """Angles a place as Llama 3.1 has them for long texts: pairs that turned less than once in its first length turn
    that much slower, those that turned four times as before, and those between by both in parts (Grattafiori et al.
    2024, arXiv:2407.21783, and the model's published code).
    """
    turns_F = speeds_F * (FIRST_LENGTH / (2 * math.pi))
    kept_F = ((turns_F - FEW_TURNS) / (MANY_TURNS - FEW_TURNS)).clamp(0, 1)
    return speeds_F * (kept_F + (1 - kept_F) / factor)


def rotate(x_BTHK: Tensor, rotation: Rotation) -> Tensor:
    """Queries or keys, turned in fp32; in the type of x and in new memory."""
    half = rotation.cosine.shape[-1]
    first, second, rest = x_BTHK.split([half, half, x_BTHK.shape[-1] - 2 * half], -1)
    first, second = first.float(), second.float()
    turned = first * rotation.cosine - second * rotation.sine, second * rotation.cosine + first * rotation.sine
    return torch.cat([*(part.to(x_BTHK.dtype) for part in turned), rest], -1)
