"""Products of an input that comes from several ranks: those of the whole, of which the backward pass keeps nothing."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from megalith.layers.entering import Entering, Factor
from megalith.layers.feedforward import FeedForward
from megalith.layers.float8 import Float8Joined, float8_linears, weight_in_8_bits
from megalith.layers.initial import Initial, draw_weights
from megalith.layers.products import Again, entered_linears, linear
from megalith.layers.sixteen import SixteenJoined, sixteen_linears
from tests.layers.entering import EntersBy
from tests.layers.kernels import DEVICE, SIXTEEN, runs_kernels

Products = Callable[[Tensor, Sequence[Factor], Entering | None], tuple[Tensor, ...]]


def plain(x: Tensor, factors: Sequence[Factor], enter: Entering | None) -> tuple[Tensor, ...]:
    if enter is not None:
        return entered_linears(x, factors, enter)
    return tuple(linear(x, weight, bias) for weight, bias, _ in factors)


# Of what types x and the weights are, and how wide: products from 4 million multiplications on go to oneDNN.
ARITHMETICS: dict[str, tuple[Products, torch.dtype, torch.dtype, int]] = {
    "fp32": (plain, torch.float32, torch.float32, 32),
    "fp32, large": (plain, torch.float32, torch.float32, 512),
    "bf16": (plain, torch.bfloat16, torch.bfloat16, 32),
    "sixteen": (sixteen_linears, torch.bfloat16, torch.float32, 32),
    "float8": (partial(float8_linears, form="hybrid"), torch.bfloat16, torch.float32, 32),
}


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


@contextmanager
def keeping() -> Iterator[list[Tensor]]:
    """What is kept for backward passes while it is entered."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        yield kept


def both_halves(x: Tensor) -> Tensor:
    return torch.cat([x, 0.5 * x.flip(1)], 1)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("kind", ARITHMETICS)
def test_products_are_those_of_the_whole_input_which_is_not_kept(kind: str, with_bias: bool, count: int) -> None:
    products, x_type, weight_type, width = ARITHMETICS[kind]
    x = drawn(2, 8, width, seed=1, dtype=x_type)
    weights = [drawn(64, width, seed=2 + n, dtype=weight_type) for n in range(count)]
    biases = [drawn(64, seed=7 + n, dtype=weight_type) if with_bias else None for n in range(count)]
    factors = [Factor(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    slopes = [drawn(2, 16, 64, seed=20 + n, dtype=x_type).detach() for n in range(count)]
    trained = [x, *weights, *(bias for bias in biases if bias is not None)]
    enter = EntersBy(both_halves, num_parts=2)

    with keeping() as kept:
        found = products(x, factors, enter)
    assert not any(tensor.numel() == 2 * x.numel() for tensor in kept)
    grads = torch.autograd.grad(found, trained, slopes)
    assert enter.started == ["whole", "sum"]

    wanted = products(both_halves(x), factors, None)
    for got, expected in zip(found, wanted, strict=True):
        assert torch.equal(got, expected)
    # Of 16 bits the sum of both products' gradients by x is rounded at another place.
    tolerance = 2 * torch.finfo(x_type).eps
    for got, expected in zip(grads, torch.autograd.grad(wanted, trained, slopes), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_what_is_made_again_enters_again() -> None:
    stream = drawn(2, 8, 32, seed=1)
    weight = drawn(64, 32, seed=2)
    slopes, results = drawn(2, 16, 64, seed=3).detach(), []
    for again in (None, Again(torch.tanh, (stream,))):
        x = torch.tanh(stream)
        with keeping() as kept:
            (y,) = entered_linears(x, [Factor(weight, None)], EntersBy(both_halves, 2), again)
        assert any(tensor is x for tensor in kept) == (again is None)
        results.append(torch.autograd.grad(y, [stream, weight], slopes))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


def test_rows_of_the_whole_decide_whether_8_bits_fit() -> None:
    x, weight = drawn(1, 8, 32, seed=1), drawn(16, 32, seed=2)
    whole = both_halves(x)
    (in_eight,) = float8_linears(whole, [Factor(weight, None)], form="e4m3")
    (found,) = float8_linears(x, [Factor(weight, None)], EntersBy(both_halves, 2), form="e4m3")
    assert torch.equal(found, in_eight) and not torch.equal(found, whole @ weight.T)
    (exact,) = float8_linears(x[:, :4], [Factor(weight, None)], EntersBy(both_halves, 2), form="e4m3")
    assert torch.equal(exact, both_halves(x[:, :4]) @ weight.T)


def test_weights_in_8_bits_at_hand_give_the_same() -> None:
    x, weights = drawn(2, 8, 32, seed=1), [drawn(16, 32, seed=2), drawn(16, 32, seed=3)]
    slopes, results = [drawn(2, 16, 16, seed=n).detach() for n in (4, 5)], []
    for narrow in (None, weight_in_8_bits):
        factors = [Factor(w, None, None if narrow is None else narrow(w.detach())) for w in weights]
        found = float8_linears(x, factors, EntersBy(both_halves, 2), form="hybrid")
        results.append([*found, *torch.autograd.grad(found, [x, *weights], slopes)])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


def test_a_gate_and_what_it_multiplies_enter_together() -> None:
    normal = Initial("normal", 0.2)
    layer = FeedForward(16, 32, "tanh", up=normal, down=normal, activation="swiglu", bias=False)
    draw_weights(layer, 1)
    x = drawn(2, 8, 16, seed=1)
    expected = layer(both_halves(x))
    layer.enter = enter = EntersBy(both_halves, 2)
    found = layer(x)
    torch.testing.assert_close(found, expected)
    trained = [x, *layer.parameters()]
    slopes = drawn(2, 16, 16, seed=2).detach()
    grads = torch.autograd.grad(found, trained, slopes)
    assert enter.started == ["whole", "sum"]
    for got, wanted in zip(grads, torch.autograd.grad(expected, trained, slopes), strict=True):
        torch.testing.assert_close(got, wanted)


def gelu_or_heads(kind: str, factor: Factor, x: Tensor, enter: Entering | None) -> tuple[Tensor, ...]:
    arithmetic, follows = kind.split(", ")
    assert factor.bias is not None
    joined = (
        SixteenJoined(x, factor.weight, factor.bias, None, enter)
        if arithmetic == "sixteen"
        else Float8Joined(x, factor.weight, factor.bias, None, "e4m3", enter)
    )
    return (joined.gelu(tanh=True),) if follows == "gelu" else joined.heads(16)


@runs_kernels
@pytest.mark.parametrize("kind", ["sixteen, gelu", "sixteen, heads", "float8, gelu", "float8, heads"])
def test_products_and_what_follows_at_once_are_those_of_the_whole_input(kind: str) -> None:
    x = drawn(2, 8, 32, seed=1, dtype=SIXTEEN).to(DEVICE).detach().requires_grad_()
    weight = drawn(96, 32, seed=2).to(DEVICE).detach().requires_grad_()
    bias = drawn(96, seed=3).to(DEVICE).detach().requires_grad_()
    enter, results = EntersBy(both_halves, 2), []
    for given, entering in ((both_halves(x), None), (x, enter)):
        # What is computed again is asked for once.
        found = torch.utils.checkpoint.checkpoint(
            gelu_or_heads, kind, Factor(weight, bias), given, entering, use_reentrant=False
        )
        slopes = [torch.linspace(-1, 1, one.numel(), device=DEVICE).view_as(one).to(SIXTEEN) for one in found]
        grads = torch.autograd.grad(found, [x, weight, bias], slopes)
        results.append([*(one.detach() for one in found), *grads])
    assert enter.started == ["whole", "sum"]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))
