"""8-bit products: near the exact ones by what 8 bits hold, gradients in fp32; a GPT learns as well with them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megalith.layers.attention import AttentionShape
from megalith.layers.block import Block, BlockShape
from megalith.layers.entering import Factor
from megalith.layers.float8 import Float8Format, float8_linears, in_8_bits, use_float8, weight_in_8_bits
from megalith.layers.initial import ZEROS, Initial, draw_weights
from megalith.layers.linear import Linear
from megalith.layers.mask import make_mask
from megalith.models.decoder import Decoder
from megalith.models.settings import ModelConfig
from tests.layers.kernels import DEVICE, runs_kernels
from tests.layouts.runs import MODEL, run_on, steps_of, write_data

FORMATS: list[Float8Format] = ["e4m3", "hybrid"]


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_tensor_in_8_bits_is_itself_to_a_sixteenth() -> None:
    x = numbers(64, 32, seed=1) * 1e-3
    values, scale = in_8_bits(x, torch.float8_e4m3fn)
    assert values.float().abs().max() == torch.finfo(torch.float8_e4m3fn).max
    # 3 bits of mantissa: half a step is 1/16; below the smallest normal number steps are 2^-9 of the scale.
    assert bool(((values.float() * scale - x).abs() <= torch.maximum(x.abs() / 16, scale * 2.0**-10)).all())


def test_zeros_stay_zeros() -> None:
    values, scale = in_8_bits(torch.zeros(16, 16), torch.float8_e4m3fn)
    assert bool((values.float() == 0).all()) and bool(scale.isfinite()) and float(scale) > 0


@pytest.mark.parametrize("form", FORMATS)
def test_products_and_gradients_are_near_the_exact_ones(form: Float8Format) -> None:
    x, weight, bias = numbers(2, 16, 48, seed=1), numbers(32, 48, seed=2), numbers(32, seed=3)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    slopes = numbers(2, 16, 32, seed=4)
    found = float8_linears(x, [Factor(weight, bias)], form=form)[0]
    exact = F.linear(x, weight, bias)
    grads = torch.autograd.grad((found * slopes).sum(), (x, weight, bias))
    exact_grads = torch.autograd.grad((exact * slopes).sum(), (x, weight, bias))
    assert not torch.equal(found, exact)
    for got, want in zip((found.detach(), *grads), (exact.detach(), *exact_grads), strict=True):
        assert got.dtype == torch.float32 and got.shape == want.shape
        # Independent errors of 1/16 at most in each factor: some 4 % of the product; e5m2 has one bit less.
        assert float((got - want).norm() / want.norm()) < 0.06


def test_a_16_bit_bias_is_added_by_the_product() -> None:
    x, weight, bias = (
        tensor.bfloat16() for tensor in (numbers(32, 48, seed=1), numbers(16, 48, seed=2), numbers(16, seed=3))
    )
    bias.requires_grad_()
    found = float8_linears(x, [Factor(weight.float(), bias)], form="e4m3")[0]
    apart = float8_linears(x, [Factor(weight.float(), None)], form="e4m3")[0].float() + bias.float()
    # Rounded once and not twice.
    torch.testing.assert_close(found.float(), apart, rtol=2**-7, atol=2**-7)
    slopes = numbers(32, 16, seed=4).bfloat16()
    (grad,) = torch.autograd.grad(found, bias, slopes)
    torch.testing.assert_close(grad.float(), slopes.float().sum(0), rtol=2**-7, atol=2**-7)


def test_a_weight_that_was_rounded_before_gives_the_same() -> None:
    x, weight, bias = numbers(2, 16, 48, seed=1), numbers(32, 48, seed=2), numbers(32, seed=3)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    outcomes = []
    for narrow in (None, weight_in_8_bits(weight.detach())):
        y = float8_linears(x, [Factor(weight, bias, narrow)], form="hybrid")[0]
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))])
    for found, wanted in zip(*outcomes, strict=True):
        assert torch.equal(found, wanted)


def test_rows_that_do_not_fit_are_multiplied_as_they_are() -> None:
    x, weight = numbers(5, 32, seed=1), numbers(16, 32, seed=2)
    assert torch.equal(float8_linears(x, [Factor(weight, None)], form="e4m3")[0], F.linear(x, weight))


@runs_kernels
def test_a_blocks_gradients_are_those_of_products_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    std = Initial("normal", 0.2)
    shape = BlockShape(AttentionShape(32, 2, 16, std, std), 64, "tanh", 1e-5, 0.0, 0.0, False, False, torch.float16)
    block = Block(shape, number=0, stack="decoder", device=DEVICE)
    draw_weights(block, 7)
    use_float8(block, "e4m3")
    x = numbers(2, 16, 32, seed=5).to(DEVICE, torch.float16).requires_grad_()
    outcomes = []
    for by_hand in (True, False):
        monkeypatch.setattr("megalith.layers.linear.suits_sixteen", lambda x, weight, by_hand=by_hand: by_hand)
        y = block(x, make_mask(16, causal=True))
        outcomes.append([y.detach(), *torch.autograd.grad(y.float().square().mean(), [x, *block.parameters()])])
    for found, wanted in zip(*outcomes, strict=True):
        assert found.dtype == wanted.dtype
        # A number that is rounded to the neighbour of what it was: an eighth of it, one among many.
        assert float((found - wanted).float().norm() / wanted.float().norm()) < 0.02


def linears_of(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            yield name, module


def test_only_products_inside_blocks_whose_features_fit_change() -> None:
    config = ModelConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        max_position_embeddings=8,
        untie_embeddings_and_output_weights=True,
    )
    model = Decoder(config, 64, device="meta")
    model.layers["0"].feedforward.up = Linear(32, 24, ZEROS, device="meta")  # type: ignore[union-attr]
    use_float8(model, "e4m3")
    changed = {name for name, layer in linears_of(model) if layer.product is not None}
    assert changed == {"layers.0.attention.qkv", "layers.0.attention.out", "layers.0.feedforward.down"}


@pytest.mark.parametrize("form", ["e4m3", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_a_gpt_learns_as_well_with_them(form: str, tmp_path: Path) -> None:
    data = write_data(tmp_path)
    words = ["--train-iters", "60", "--hidden-dropout", "0", "--attention-dropout", "0", "--save-interval", "60"]
    losses = {}
    for name, more in (("exact", []), ("8 bits", ["--fp8-format", form])):
        assert run_on(1, [*words, *more], tmp_path / name, data, model=MODEL) == 0
        losses[name] = [step["losses"]["lm loss"] for step in steps_of(tmp_path / name)]
    ends = {name: sum(found[-10:]) / 10 for name, found in losses.items()}
    assert losses["exact"] != losses["8 bits"]
    assert ends["exact"] < 0.8 * losses["exact"][0]
    # The gap of one run of a tiny model is noise of either sign; a product that is wrong shows in tens of percent.
    assert ends["8 bits"] < 1.02 * ends["exact"], ends
