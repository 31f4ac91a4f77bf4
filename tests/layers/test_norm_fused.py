"""Norms beside a residual as GPUs take them: one pass gives the gradients that autograd gives."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megalith.layers import norm as norms
from megalith.layers.attention import AttentionShape
from megalith.layers.block import Block, BlockShape
from megalith.layers.initial import Initial, draw_weights
from megalith.layers.linear import split_backward_passes
from megalith.layers.mask import make_mask
from megalith.layers.norm import LayerNorm, RMSNorm, make_norm
from tests.layers.kernels import BACKEND, DEVICE, SIXTEEN, runs_kernels

ROUNDING = torch.finfo(SIXTEEN).eps

pytestmark = runs_kernels


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def made(kind: Any, width: int) -> LayerNorm | RMSNorm:
    norm = make_norm(kind, width, 1e-5, device=DEVICE)
    assert isinstance(norm, LayerNorm | RMSNorm)
    with torch.no_grad():
        for number, parameter in enumerate(norm.parameters()):
            parameter.copy_((numbers(width, seed=number) + 1).to(SIXTEEN))
    return norm


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "suits_fused", lambda x: x.dtype == SIXTEEN)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
# More rows than programs, fewer, and widths that are no power of two.
@pytest.mark.parametrize("shape", [(3, 11, 200), (1, 1, 64), (2, 9, 1600)])
def test_gradients_are_those_of_autograd(kind: str, shape: tuple[int, ...]) -> None:
    from megalith.layers.norm_fused import norm_backward

    x, slopes, beside = ((3 * numbers(*shape, seed=seed) + 1).to(SIXTEEN) for seed in (5, 6, 7))
    wide = x.double().requires_grad_()
    weights = list(made(kind, shape[-1]).double().parameters())
    formula: Any = nn.functional.layer_norm if kind == "LayerNorm" else nn.functional.rms_norm
    y = formula(wide, shape[-1:], *weights, eps=1e-5)
    expected = torch.autograd.grad([wide * 1, y], [wide, *weights], [beside.double(), slopes.double()])

    mean = x.double().mean(-1, keepdim=True) if kind == "LayerNorm" else None
    spread = (x.double() - (0 if mean is None else mean)).square().mean(-1, keepdim=True)
    inverse = (spread + 1e-5).rsqrt().float()
    found = norm_backward(
        slopes, beside, x, weights[0].detach().to(SIXTEEN), None if mean is None else mean.float(), inverse
    )
    assert found.x.dtype == SIXTEEN and found.weight.dtype == found.bias.dtype == torch.float32
    # Rounded once, on its way out.
    error = (found.x.double() - expected[0]).abs() - ROUNDING / 2 * expected[0].abs()
    assert float(error.max()) < 1e-5
    for gradient, wanted in zip((found.weight, found.bias), expected[1:], strict=False):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-4)


def test_sums_come_in_one_order() -> None:
    norm = made("LayerNorm", 96)
    x, slopes = numbers(50, 96, seed=5).to(SIXTEEN).requires_grad_(), numbers(50, 96, seed=6).to(SIXTEEN)
    first, second = (
        torch.autograd.grad(list(norm.beside(x)), [x, *norm.parameters()], [slopes, slopes]) for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.filterwarnings("default")  # the compiler has warnings of its own
@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "in one graph"])
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_a_blocks_gradients_are_those_of_autograd(kind: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    std = Initial("normal", 0.2)
    shape = BlockShape(
        AttentionShape(32, 2, 16, std, std), 64, "tanh", 1e-5, 0.0, 0.0, False, False, SIXTEEN, normalization=kind
    )
    block = Block(shape, number=0, stack="decoder", device=DEVICE)
    draw_weights(block, 7)
    x = numbers(2, 20, 32, seed=5).to(SIXTEEN).requires_grad_()
    trained = [x, *block.parameters()]
    outcomes = []
    for fused in (True, False):
        asked: list[Tensor] = []

        def suits(x: Tensor, fused: bool = fused, asked: list[Tensor] = asked) -> bool:
            asked.append(x)
            return fused

        monkeypatch.setattr(norms, "suits_fused", suits)
        forward = torch.compile(block, backend=BACKEND, fullgraph=True) if fused and compiled else block
        y = forward(x, make_mask(20, causal=True))
        outcomes.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), trained)])
        assert len(asked) == 2 or (fused and compiled)
    for found, expected in zip(*outcomes, strict=True):
        assert found.dtype == expected.dtype
        error = (found.double() - expected.double()).abs().max()
        assert float(error) <= 4 * ROUNDING * float(expected.double().abs().max())


@pytest.mark.parametrize("why", ["the norm is the residual", "backward passes are split"])
def test_a_norm_is_left_alone(why: str) -> None:
    std, is_residual = Initial("normal", 0.2), why == "the norm is the residual"
    shape = BlockShape(AttentionShape(32, 2, 16, std, std), 64, "tanh", 1e-5, 0.0, 0.0, False, is_residual, SIXTEEN)
    block = Block(shape, number=0, stack="decoder", device=DEVICE)
    draw_weights(block, 7)
    x = numbers(2, 20, 32, seed=5).to(SIXTEEN).requires_grad_()
    if not is_residual:
        assert block._fork(x, block.attention_norm)[0] is not x
        split_backward_passes(block)
    passing, entering = block._fork(x, block.attention_norm)
    assert passing is x and torch.equal(entering, block.attention_norm(x))
