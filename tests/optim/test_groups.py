"""The optimizer against its formulas in double precision, its groups, and its state through a checkpoint."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megalith.models.decoder import Decoder
from megalith.models.settings import ModelConfig
from megalith.optim.groups import (
    build_optimizer,
    decay_groups,
    num_updates,
    set_learning_rate,
    set_num_updates,
)
from megalith.optim.settings import OptimizerConfig
from tests.calls import Calls
from tests.optim.tensors import optimizer_tensors

ADAM = OptimizerConfig(adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.1)
SGD = OptimizerConfig(optimizer="sgd", sgd_momentum=0.9, weight_decay=0.1)
RATES = [0.0, 1e-2, 2e-2, 1e-2, 5e-3, 1e-3]


class Small(nn.Module):
    """A frozen map, a table, a norm, and a linear map that shares the table's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.table = nn.Embedding(7, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 7)
        self.head.weight = self.table.weight
        self.experts_bias = nn.Parameter(torch.randn(3, 4))


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    model = Small()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.1


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(model, step)
        set_learning_rate(optimizer, RATES[step])
        optimizer.step()


def test_biases_and_norms_do_not_decay_and_shared_weights_are_held_once() -> None:
    model = small()
    decaying, constant = decay_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(p)] for p in decaying] == ["table.weight"]
    assert [names[id(p)] for p in constant] == ["experts_bias", "norm.weight", "norm.bias", "head.bias"]
    optimizer = build_optimizer(model, ADAM)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_gpt2_xl_has_194_tensors_with_decay_and_386_without() -> None:
    shape = ModelConfig(num_layers=48, hidden_size=1600, num_attention_heads=25, max_position_embeddings=1024)
    decaying, constant = decay_groups(Decoder(shape, 50304, device="meta"))
    assert (len(decaying), len(constant)) == (194, 386)
    assert sum(p.numel() for p in [*decaying, *constant]) == 1_557_686_400


def adam_in_double(weight: np.ndarray, gradients: list[np.ndarray], decay: float) -> np.ndarray:
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for step, (gradient, rate) in enumerate(zip(gradients, RATES, strict=True), start=1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        update = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.95**step)) + 1e-8) + decay * weight
        weight = weight - rate * update
    return weight


def sgd_in_double(weight: np.ndarray, gradients: list[np.ndarray], decay: float) -> np.ndarray:
    buffer = np.zeros_like(weight)
    for gradient, rate in zip(gradients, RATES, strict=True):
        buffer = 0.9 * buffer + gradient + decay * weight
        weight = weight - rate * buffer
    return weight


@pytest.mark.parametrize("same_on_every_cut", [False, True])
@pytest.mark.parametrize("config", [ADAM, SGD], ids=["adam", "sgd"])
def test_weights_follow_the_formula(config: OptimizerConfig, same_on_every_cut: bool) -> None:
    model = small()
    start = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    gradients: dict[str, list[np.ndarray]] = {name: [] for name in start}
    optimizer = build_optimizer(model, config, same_on_every_cut=same_on_every_cut)
    for step in range(len(RATES)):
        train(model, optimizer, range(step, step + 1))
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[name].append(parameter.grad.double().numpy().copy())
    in_double = adam_in_double if config is ADAM else sgd_in_double
    for name, parameter in model.named_parameters():
        expected = start[name]
        if parameter.requires_grad:
            expected = in_double(start[name], gradients[name], 0.1 if name == "table.weight" else 0.0)
        # fp32 rounding of weights about 3 over 6 steps.
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=2e-6, atol=2e-6)


def test_a_new_optimizer_stands_still_until_its_rate_is_set() -> None:
    model = small()
    before = [p.detach().clone() for p in model.parameters()]
    give_gradients(model, 0)
    build_optimizer(model, ADAM).step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("config", [ADAM, SGD, replace(SGD, sgd_momentum=0.0)], ids=["adam", "sgd", "plain"])
@pytest.mark.parametrize("saved_at", [0, 3])
def test_a_restored_optimizer_goes_on_bit_for_bit(config: OptimizerConfig, saved_at: int) -> None:
    model = small()
    optimizer = build_optimizer(model, config)
    train(model, optimizer, range(saved_at))
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    updates = num_updates(model, optimizer)
    assert updates == (saved_at if config is ADAM else 0)
    train(model, optimizer, range(saved_at, len(RATES)))

    again = small(seed=1)
    again.load_state_dict(weights)
    restored = build_optimizer(again, config)
    for name, tensor in optimizer_tensors(again, restored).items():
        tensor.copy_(saved.pop(name))
    set_num_updates(again, restored, updates)
    assert not saved
    train(again, restored, range(saved_at, len(RATES)))
    unread = small()
    train(unread, build_optimizer(unread, config), range(len(RATES)))
    for one, other, third in zip(model.parameters(), again.parameters(), unread.parameters(), strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)


def test_state_has_the_parameters_names_and_shapes() -> None:
    model = small()
    tensors = optimizer_tensors(model, build_optimizer(model, ADAM))
    assert sorted(tensors) == sorted(
        f"{moment}.{name}"
        for moment in ("exp_avg", "exp_avg_sq")
        for name in ("table.weight", "norm.weight", "norm.bias", "head.bias", "experts_bias")
    )
    assert tensors["exp_avg_sq.table.weight"].shape == (7, 12)


def test_a_parameter_left_out_of_a_step_is_named() -> None:
    model = small()
    optimizer = build_optimizer(model, ADAM)
    train(model, optimizer, range(2))
    give_gradients(model, 2)
    model.norm.bias.grad = None
    optimizer.step()
    with pytest.raises(ValueError, match=r"norm\.bias got no gradient"):
        num_updates(model, optimizer)


def test_updates_are_read_from_the_device_at_once() -> None:
    model = small()
    optimizer = build_optimizer(model, ADAM)
    train(model, optimizer, range(2))
    with Calls() as calls:
        assert num_updates(model, optimizer) == 2
    # A tensor of all counts becomes a list by a copy, which is no read of this kind.
    assert not calls.of(torch.ops.aten._local_scalar_dense.default)


@pytest.mark.parametrize("config", [ADAM, SGD], ids=["adam", "sgd"])
def test_weights_do_not_depend_on_the_cut_if_asked(config: OptimizerConfig) -> None:
    generator = torch.Generator().manual_seed(3)
    start, gradients = torch.randn(1003, generator=generator), torch.randn(6, 1003, generator=generator)

    def trained(piece: int) -> Tensor:
        model = nn.ParameterList([nn.Parameter(part.clone()) for part in start.split(piece)])
        optimizer = build_optimizer(model, config, same_on_every_cut=True)
        for rate, gradient in zip(RATES, gradients, strict=True):
            for parameter, part in zip(model, gradient.split(piece), strict=True):
                parameter.grad = part.clone()
            set_learning_rate(optimizer, rate)
            optimizer.step()
        return torch.cat([parameter.detach() for parameter in model])

    for piece in (501, 77, 7, 1):
        assert torch.equal(trained(1003), trained(piece))


def test_a_model_without_storage_gets_an_optimizer_too() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    tensors = optimizer_tensors(model, build_optimizer(model, ADAM))
    assert tensors["exp_avg.weight"].device.type == "meta"


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer='lion' must be one of adam, sgd"):
        build_optimizer(small(), OptimizerConfig(optimizer="lion"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", [ADAM, SGD], ids=["adam", "sgd"])
def test_a_cuda_device_gives_the_cpus_weights(config: OptimizerConfig) -> None:
    models = [small(), small().to("cuda")]
    for model in models:
        optimizer = build_optimizer(model, config)
        for step in range(len(RATES)):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = (torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.device)
            set_learning_rate(optimizer, RATES[step])
            optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=2e-6, atol=2e-6)
    assert math.isfinite(float(sum(p.detach().sum() for p in models[1].parameters())))
