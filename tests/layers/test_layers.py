"""The small layers against torch's own formulas, in fp32 and 16 bits, and their seams."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalith.layers.dropout import drop
from megalith.layers.embedding import Embedding
from megalith.layers.feedforward import FeedForward, Gelu, gelu
from megalith.layers.initial import Initial, draw_weights
from megalith.layers.linear import Linear
from megalith.layers.norm import LayerNorm, RMSNorm
from megalith.layers.random import dropout_rows, key
from tests.layers.entering import EntersBy

NORMAL = Initial("normal", 0.5)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_computes_in_the_type_of_its_input_and_keeps_fp32_gradients(dtype: torch.dtype) -> None:
    linear = Linear(8, 6, NORMAL)
    draw_weights(linear, 1)
    with torch.no_grad():
        linear.bias.copy_(draw(6))  # type: ignore[union-attr]
    x = draw(3, 5, 8, dtype=dtype)
    y = linear(x)
    assert y.dtype == dtype
    assert linear.bias is not None
    expected = x.float() @ linear.weight.T + linear.bias
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps)
    y.float().square().sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_that_of_torch(dtype: torch.dtype) -> None:
    norm = RMSNorm(8, 1e-6)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * draw(8))
    x = draw(3, 5, 8, dtype=dtype)
    expected = F.rms_norm(x.double(), (8,), norm.weight.double(), 1e-6)
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x).double(), expected, rtol=torch.finfo(dtype).eps * 4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_rms_norm_are_those_of_its_formula(dtype: torch.dtype) -> None:
    norm = RMSNorm(8, 1e-6)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * draw(8))
    x, grad = draw(3, 5, 8, dtype=dtype).requires_grad_(), draw(5, 8, 3).permute(2, 0, 1).to(dtype)
    norm(x).backward(grad)
    wide, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    F.rms_norm(wide, (8,), weight, 1e-6).backward(grad.double())
    assert x.grad is not None and x.grad.dtype == dtype and wide.grad is not None
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=torch.finfo(dtype).eps * 4, atol=1e-6)
    assert norm.weight.grad is not None and norm.weight.grad.dtype == torch.float32
    torch.testing.assert_close(norm.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-5)


def test_a_linear_cut_over_inputs_adds_the_bias_once() -> None:
    whole, half = Linear(8, 6, NORMAL), Linear(4, 6, NORMAL)
    draw_weights(whole, 1)
    assert whole.bias is not None and half.bias is not None
    with torch.no_grad():
        whole.bias.copy_(draw(6))
        half.bias.copy_(whole.bias)
        half.weight.copy_(whole.weight[:, :4])
    x = draw(2, 8)
    half.enter = EntersBy(lambda x: x[:, :4])
    half.leave = lambda product: product + x[:, 4:] @ whole.weight[:, 4:].T
    torch.testing.assert_close(half(x), whole(x))


def test_a_linear_without_bias_has_one_parameter() -> None:
    linear = Linear(8, 6, NORMAL, bias=False)
    draw_weights(linear, 1)
    assert [name for name, _ in linear.named_parameters()] == ["weight"]
    assert torch.equal(linear(draw(2, 8)), draw(2, 8) @ linear.weight.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_norm_has_fp32_statistics_and_the_type_of_its_input(dtype: torch.dtype) -> None:
    norm = LayerNorm(64, 1e-5)
    draw_weights(norm, 1)
    # Far from 0, so that statistics in 16 bits would be useless.
    x = (100 + draw(3, 64)).to(dtype)
    y = norm(x)
    assert y.dtype == dtype
    double = x.double()
    expected = (double - double.mean(-1, keepdim=True)) / (double.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=max(4 * torch.finfo(dtype).eps, 2e-5))


def test_embedding_gives_rows_of_its_table() -> None:
    embedding = Embedding(10, 4, NORMAL)
    draw_weights(embedding, 1)
    ids = torch.tensor([[3, 0], [9, 3]])
    assert torch.equal(embedding(ids), embedding.weight[ids])


FORMS: dict[Gelu, str] = {"tanh": "0.5x(1+tanh)", "erf": "exact", "onnx": "exact, divisor 1.41421"}


@pytest.mark.parametrize("form", FORMS)
def test_gelu_is_its_formula(form: Gelu) -> None:
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    divisor = 1.41421 if form == "onnx" else math.sqrt(2)
    expected = 0.5 * x * (1 + (torch.tanh(inner) if form == "tanh" else torch.erf(x / divisor)))
    torch.testing.assert_close(gelu(x, form), expected, rtol=1e-12, atol=1e-12)


def test_feed_forward_is_two_products_around_a_gelu() -> None:
    layer = FeedForward(8, 32, "erf", up=NORMAL, down=NORMAL)
    draw_weights(layer, 1)
    x = draw(2, 3, 8)
    torch.testing.assert_close(layer(x), F.gelu(x @ layer.up.weight.T) @ layer.down.weight.T)


def test_a_gate_multiplies_the_product_with_a_third_ones_silu() -> None:
    layer = FeedForward(8, 32, "tanh", up=NORMAL, down=NORMAL, activation="swiglu", bias=False)
    draw_weights(layer, 1)
    assert layer.gate is not None
    x = draw(2, 3, 8)
    gate = x @ layer.gate.weight.T
    expected = (gate * torch.sigmoid(gate) * (x @ layer.up.weight.T)) @ layer.down.weight.T
    torch.testing.assert_close(layer(x), expected)
    layer.enter = EntersBy(lambda x: 2 * x)
    torch.testing.assert_close(layer(0.5 * x), expected)


def test_dropout_keeps_the_mean_and_drops_the_same_features_again() -> None:
    rows = dropout_rows(1234, torch.arange(4), 64)
    x = torch.ones(4, 64, 256, requires_grad=True)
    dropped = drop(x, rows, 0.25, key("here"))
    assert set(dropped.detach().unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert float(dropped.detach().mean()) == pytest.approx(1, abs=4 * math.sqrt(1 / 3 / x.numel()))
    assert torch.equal(drop(x, rows, 0.25, key("here")), dropped)
    assert not torch.equal(drop(x, rows, 0.25, key("there")), dropped)
    (grad,) = torch.autograd.grad(dropped.sum(), x)
    assert torch.equal(grad, dropped)


def test_dropout_of_a_token_does_not_depend_on_what_is_beside_it() -> None:
    rows = dropout_rows(1234, torch.arange(4), 64)
    x = torch.ones(4, 64, 32)
    dropped = drop(x, rows, 0.25, key("here"))
    assert torch.equal(drop(x[2:3, 16:32], rows[2:3, 16:32], 0.25, key("here")), dropped[2:3, 16:32])


def test_without_rows_or_probability_nothing_is_dropped() -> None:
    x = torch.ones(1, 2, 3)
    assert drop(x, None, 0.5, 7) is x
    assert drop(x, dropout_rows(1, torch.arange(1), 2), 0.0, 7) is x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dropout_keeps_16_bit_types(dtype: torch.dtype) -> None:
    x = torch.ones(1, 2, 3, dtype=dtype)
    assert drop(x, dropout_rows(1, torch.arange(1), 2), 0.5, 7).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_dropout_keeps_is_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    dropped = drop(x, dropout_rows(1234, torch.arange(4), 64), 0.1, key("here"))
    kept = dropped != 0
    assert torch.equal(dropped[kept], x[kept] * (1 / 0.9))
    grad_of_one = torch.full_like(x, 1 / 3)
    (grad,) = torch.autograd.grad(dropped, x, grad_of_one)
    assert torch.equal(grad, torch.where(kept, grad_of_one * (1 / 0.9), 0))
