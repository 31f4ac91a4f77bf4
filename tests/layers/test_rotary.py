"""Queries and keys turn by their places: as complex numbers do, by the distance alone, in fp32."""

import pytest
import torch
from torch import Tensor

from megalith.layers.rotary import rotate, rotation_at

B, T, H, K = 2, 5, 3, 8


def draw(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, T, H, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def places(first: int = 0) -> Tensor:
    return torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]]) + first


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("width", [8, 4])
def test_pairs_of_features_turn_as_complex_numbers(width: int, dtype: torch.dtype, rounding: float) -> None:
    x = draw(1, dtype)
    turned = rotate(x, rotation_at(places(1000), width=width, base=500.0))
    assert turned.dtype == dtype
    wide, half = x.double(), width // 2
    angles = places(1000)[:, :, None, None] * 500.0 ** (-2 * torch.arange(half, dtype=torch.float64) / width)
    complex_ = torch.complex(wide[..., :half], wide[..., half:width]) * torch.polar(torch.ones_like(angles), angles)
    # An angle of a thousand is told in fp32 to within 6e-5.
    torch.testing.assert_close(turned[..., :half].double(), complex_.real, rtol=rounding, atol=2e-4 + rounding)
    torch.testing.assert_close(turned[..., half:width].double(), complex_.imag, rtol=rounding, atol=2e-4 + rounding)
    assert torch.equal(turned[..., width:], x[..., width:])


def test_products_depend_on_the_distance_alone() -> None:
    def scores(first: int) -> Tensor:
        rotation = rotation_at(places(first), width=K, base=10000.0)
        return torch.einsum("bthk,bshk->bhts", rotate(draw(1), rotation), rotate(draw(2), rotation))

    torch.testing.assert_close(scores(7), scores(0), rtol=0, atol=2e-5)
    assert not torch.allclose(scores(0)[0], scores(0)[1], atol=0.1)
