"""Products in 16 bits as GPUs take them: the gradients of weights and biases are fp32, and are those of autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalith.layers import sixteen
from megalith.layers.attention import AttentionShape
from megalith.layers.block import Block, BlockShape
from megalith.layers.entering import Factor
from megalith.layers.initial import Initial, draw_weights
from megalith.layers.mask import make_mask
from megalith.layers.norm import Normalization
from tests.layers.kernels import BACKEND, DEVICE, SIXTEEN, runs_kernels


def numbers(*shape: int, seed: int, dtype: torch.dtype = SIXTEEN) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(DEVICE, dtype).requires_grad_()


def assert_near(found: Tensor, expected: Tensor, *, error: float = 4.0) -> None:
    """Within so many steps of 16 bits, of the largest."""
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    assert float((found - expected).abs().max()) <= error * torch.finfo(SIXTEEN).eps * float(expected.abs().max())


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_products_gradients_are_those_of_autograd_and_not_rounded(with_bias: bool) -> None:
    x, weight = numbers(2, 9, 24, seed=1), numbers(40, 24, seed=2, dtype=torch.float32)
    bias = numbers(40, seed=3, dtype=torch.float32) if with_bias else None
    slopes = numbers(2, 9, 40, seed=4).detach()
    trained = [x, weight] if bias is None else [x, weight, bias]
    (y,) = sixteen.sixteen_linears(x, [Factor(weight, bias)])
    grads = torch.autograd.grad(y, trained, slopes)
    exact = F.linear(x.double(), weight.to(SIXTEEN).double(), None if bias is None else bias.to(SIXTEEN).double())
    expected = torch.autograd.grad(exact, trained, slopes.double())
    assert y.dtype == grads[0].dtype == SIXTEEN
    assert_near(y, exact)
    for found, wanted in zip(grads, expected, strict=True):
        assert_near(found, wanted)
    for found in grads[1:]:
        assert found.dtype == torch.float32 and not torch.equal(found, found.to(SIXTEEN).float())


@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("is_compiling", [True, False])
@pytest.mark.parametrize("dtype", [SIXTEEN, torch.float32])
def test_gelu_is_its_formula_for_the_compiler_too(
    dtype: torch.dtype, is_compiling: bool, tanh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiling)
    x = torch.linspace(-6, 6, 4001).to(DEVICE, dtype)
    expected = F.gelu(x.double(), approximate="tanh" if tanh else "none")
    torch.testing.assert_close(sixteen.gelu_of(x, tanh).double(), expected, rtol=torch.finfo(dtype).eps, atol=2e-6)


@runs_kernels
@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("shape", [(3, 70, 200), (1, 5, 16)])
def test_gelus_slopes_are_added_up_on_the_way(tanh: bool, shape: tuple[int, int, int]) -> None:
    from megalith.layers.columns import gelu_backward

    x, slopes = numbers(*shape, seed=1).detach() * 3, numbers(*shape, seed=2).detach()
    made, sums, largest = gelu_backward(slopes, x, tanh)
    wide = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(F.gelu(wide, approximate="tanh" if tanh else "none"), wide, slopes.double())
    assert made.dtype == SIXTEEN and sums.dtype == torch.float32
    assert_near(made, expected, error=1.0)
    # Before they are rounded.
    torch.testing.assert_close(sums.double(), expected.sum((0, 1)), rtol=1e-5, atol=1e-5)
    assert float(largest.max()) == float(made.abs().max())


@runs_kernels
@pytest.mark.parametrize("other", range(3))
@pytest.mark.parametrize(("tokens", "heads", "width"), [(70, 3, 24), (9, 2, 16)])
def test_heads_come_together_and_are_added_up(tokens: int, heads: int, width: int, other: int) -> None:
    from megalith.layers.columns import join_heads

    # As attention's backward pass leaves them, and one of them otherwise.
    parts = [numbers(2, tokens, heads, width, seed=seed).detach() for seed in (1, 2, 3)]
    parts[other] = parts[other].transpose(1, 2).contiguous().transpose(1, 2)
    joined, sums, largest = join_heads(*parts)
    assert torch.equal(joined, torch.stack(parts, 3).flatten(2))
    torch.testing.assert_close(sums, joined.float().sum((0, 1)), rtol=1e-5, atol=1e-4)
    assert float(largest.max()) == float(joined.abs().max())


@runs_kernels
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(2, 70, 200), (1, 5, 16)])
def test_a_matrix_is_looked_at_in_one_pass(shape: tuple[int, int, int], transposed: bool) -> None:
    from megalith.layers.columns import look_at

    x = numbers(*shape, seed=1).detach() - 1
    x = x.transpose(1, 2) if transposed else x
    matrix, sums, largest = look_at(x)
    assert matrix is x and float(largest.max()) == float(x.abs().max())
    torch.testing.assert_close(sums, x.float().sum((0, 1)), rtol=1e-5, atol=1e-4)


@runs_kernels
@pytest.mark.filterwarnings("default")  # the compiler has warnings of its own
@pytest.mark.parametrize("norm", [None, "RMSNorm"])  # a LayerNorm's bias of keys has a gradient of rounding alone
@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "in one graph"])
def test_a_blocks_gradients_are_those_of_autograd(
    compiled: bool, norm: Normalization | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    std = Initial("normal", 0.2)
    shape = BlockShape(
        AttentionShape(32, 2, 16, std, std, norm=norm), 64, "tanh", 1e-5, 0.0, 0.0, False, False, SIXTEEN
    )
    block = Block(shape, number=0, stack="decoder", device=DEVICE)
    draw_weights(block, 7)
    x = numbers(2, 20, 32, seed=5)
    trained = [x, *block.parameters()]

    def run(*, by_hand: bool) -> list[Tensor]:
        asked = []

        def suits(x: Tensor, weight: Tensor) -> bool:
            asked.append(weight)
            return by_hand and x.dtype == SIXTEEN

        monkeypatch.setattr("megalith.layers.linear.suits_sixteen", suits)
        forward = torch.compile(block, backend=BACKEND, fullgraph=True) if by_hand and compiled else block
        y = forward(x, make_mask(20, causal=True))
        grads = torch.autograd.grad(y.float().square().sum(), trained)
        assert asked or (by_hand and compiled)
        return [y.detach(), *grads]

    for found, expected in zip(run(by_hand=True), run(by_hand=False), strict=True):
        assert found.dtype == expected.dtype
        assert_near(found, expected, error=10.0)


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_weight_that_was_rounded_before_gives_the_same(with_bias: bool) -> None:
    x, weight = numbers(2, 9, 24, seed=1), numbers(40, 24, seed=2, dtype=torch.float32)
    bias = numbers(40, seed=3, dtype=torch.float32) if with_bias else None
    trained = [x, weight] if bias is None else [x, weight, bias]
    outcomes = []
    for narrow in (None, weight.detach().to(SIXTEEN)):
        (y,) = sixteen.sixteen_linears(x, [Factor(weight, bias, narrow)])
        outcomes.append([y, *torch.autograd.grad(y.sum(), trained)])
    for found, wanted in zip(*outcomes, strict=True):
        assert torch.equal(found, wanted)
