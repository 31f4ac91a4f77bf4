import math
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from megalith.layers.attention import AttentionShape
from megalith.layers.block import Block, BlockShape
from megalith.layers.initial import Initial, Layer, Shard, draw_weights, xavier
from megalith.layers.linear import Linear
from megalith.layers.random import fill_normal, key


class Two(nn.Module):
    """Two layers, of which the second may be missing."""

    def __init__(self, *, second: bool = True, device: str | None = None) -> None:
        super().__init__()
        place = None if device is None else torch.device(device)
        self.layers = nn.ModuleDict({"0": Linear(8, 6, Initial("normal", 0.02), device=place)})
        if second:
            self.layers["1"] = Linear(6, 8, Initial("uniform", 0.5), device=place)


def drawn(seed: int = 1234, *, second: bool = True) -> dict[str, Tensor]:
    model = Two(second=second)
    draw_weights(model, seed)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_each_parameter_has_its_distribution() -> None:
    weights = drawn()
    assert 0.015 < float(weights["layers.0.weight"].std()) < 0.025
    assert float(weights["layers.1.weight"].abs().max()) <= 0.5
    assert float(weights["layers.1.weight"].std()) == pytest.approx(0.5 / math.sqrt(3), rel=0.25)
    assert torch.equal(weights["layers.0.bias"], torch.zeros(6))


def test_weights_depend_on_seed_and_name_and_not_on_what_else_the_model_holds() -> None:
    assert torch.equal(drawn(second=False)["layers.0.weight"], drawn()["layers.0.weight"])
    assert not torch.equal(drawn(1)["layers.0.weight"], drawn(2)["layers.0.weight"])
    expected = torch.empty(6, 8)
    fill_normal(expected, key(1, "weight", "layers.0.weight"), std=0.02)
    assert torch.equal(drawn(1)["layers.0.weight"], expected), "a run's seed must go on to mean the same weights"


def test_a_model_made_on_the_meta_device_gets_the_same_weights() -> None:
    model = Two(device="meta")
    model.to_empty(device="cpu")
    draw_weights(model, 1234)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach(), drawn()[name])


@pytest.mark.parametrize("layer", ["0", "1"])
def test_a_rank_draws_its_shard_alone(layer: str) -> None:
    model = Two()
    whole = cast(Linear, model.layers[layer])
    outputs, inputs = whole.weight.shape
    half = Linear(inputs, outputs // 2, whole.initial["weight"])
    model.layers[layer] = half

    def lower_half(parameter: nn.Parameter) -> Shard:
        if parameter is half.weight:
            return Shard(parameter, (outputs, inputs), (outputs // 2, 0))
        return Shard(parameter, parameter.shape, [0] * parameter.dim())

    draw_weights(model, 1234, shard_of=lower_half)
    assert torch.equal(half.weight.detach(), drawn()[f"layers.{layer}.weight"][outputs // 2 :])


def test_a_tied_weight_is_drawn_once_under_its_first_name() -> None:
    model = Two()
    tied = Linear(8, 6, Initial("normal", 5.0))
    tied.weight = cast(Linear, model.layers["0"]).weight
    model.layers["2"] = tied
    nn.init.ones_(tied.get_parameter("bias"))
    draw_weights(model, 1234)
    assert torch.equal(tied.weight.detach(), drawn()["layers.0.weight"])
    assert not tied.get_parameter("bias").any()


def test_xavier_has_the_variance_of_its_formula() -> None:
    initial = xavier(30, 50)
    assert initial.kind == "uniform"
    assert initial.scale**2 / 3 == pytest.approx(2 / 80)


def test_every_parameter_of_a_block_says_how_it_starts() -> None:
    into, out = Initial("normal", 0.02), Initial("normal", 0.01)
    shape = BlockShape(AttentionShape(8, 2, 4, into, out), 32, "tanh", 1e-5, 0.0, 0.0, True, False, torch.float32)
    block = Block(shape, number=0, stack="layers", cross=True)
    starts = {}
    for name, module in block.named_modules():
        for parameter, _ in module.named_parameters(recurse=False):
            starts[f"{name}.{parameter}"] = cast(Layer, module).initial[parameter]
    weights = {name for name in starts if name.endswith("weight") and "norm" not in name}
    assert {name for name in weights if starts[name] == out} == {
        "attention.out.weight",
        "cross.out.weight",
        "feedforward.down.weight",
    }
    assert all(starts[name] in (into, out) for name in weights)
    assert all(starts[name] == Initial("constant", 0.0) for name in starts if name.endswith("bias"))
    assert all(starts[name] == Initial("constant", 1.0) for name in starts if name.endswith("norm.weight"))
