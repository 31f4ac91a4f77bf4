"""A model cut over tensor and context ranks gives the losses and gradients of the whole one."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import tests.early  # noqa: F401 - for its effect
from megalith.layers.initial import Shard, draw_weights
from megalith.layers.random import dropout_rows
from megalith.models.decoder import Decoder
from megalith.models.settings import ModelConfig
from megalith.parallel.context import cut_context, cut_tokens
from megalith.parallel.mesh import Groups, Layout, make_groups
from megalith.parallel.tensor import SPLITS, Cut, split_tensors
from tests.ranks import run_ranks

CONFIG = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, kv_channels=12, max_position_embeddings=16)
# A Qwen's attention and a Llama's other options; heads of another width than the stream has for each.
QWEN = replace(
    CONFIG,
    normalization="RMSNorm",
    add_bias_linear=False,
    add_qkv_bias=True,
    qk_layernorm=True,
    swiglu=True,
    position_embedding_type="rope",
    group_query_attention=True,
    num_query_groups=2,
)
VOCAB = 50


def batch(*, documents: bool) -> dict[str, Tensor]:
    tokens = (torch.arange(34).view(2, 17) * 7) % VOCAB
    made = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "positions": torch.arange(16).expand(2, 16),
        "loss_mask": torch.full((2, 16), 1 / 32),
        "rows": dropout_rows(5, torch.tensor([3, 4]), 16),
    }
    if documents:
        made["documents"] = torch.tensor([[0] * 5 + [1] * 11, [0] * 9 + [1] * 7])
    return made


def loss_of(model: Decoder, data: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(
        data["tokens"],
        data["positions"],
        documents=data.get("documents"),
        rows=data["rows"],
        labels=data["labels"],
        loss_weights=data["loss_mask"],
    )
    return loss


def whole(config: ModelConfig, *, documents: bool, untied: bool) -> tuple[float, dict[str, Tensor]]:
    model = Decoder(replace(config, untie_embeddings_and_output_weights=untied), VOCAB)
    draw_weights(model, 7)
    loss = loss_of(model, batch(documents=documents))
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}  # type: ignore[misc]


def part_of(cut: Cut, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    for dim, (offset, size) in enumerate(zip(cut.offset, shape, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor


def cut_run(
    rank: int,
    *,
    world_size: int,
    config: ModelConfig,
    tensor: int,
    exchange: str,
    sequence: bool,
    documents: bool,
    untied: bool,
) -> tuple[float, dict[str, tuple[Cut, NDArray[Any]]]]:
    layout = Layout(world_size, rank, 0, tensor=tensor, context=world_size // tensor)
    groups: Groups = make_groups(layout, timeout=60.0)
    model = Decoder(replace(config, untie_embeddings_and_output_weights=untied), VOCAB, device="meta")
    cuts = split_tensors(model, groups.tensor, sequence=sequence)
    cut_context(model, groups.context, exchange=exchange)
    model.to_empty(device="cpu")
    by_id = {id(parameter): cuts[name] for name, parameter in model.named_parameters()}
    draw_weights(model, 7, shard_of=lambda p: Shard(p, by_id[id(p)].whole, by_id[id(p)].offset))
    loss = loss_of(model, cut_tokens(batch(documents=documents), groups.context))
    loss.backward()
    gradients: dict[str, tuple[Cut, NDArray[Any]]] = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        if cuts[name].partial_gradient:
            torch.distributed.all_reduce(gradient, group=groups.tensor)
        if groups.context is not None:
            torch.distributed.all_reduce(gradient, group=groups.context)
        gradients[name] = (cuts[name], gradient.numpy())
    total = loss.detach()
    if groups.context is not None:
        torch.distributed.all_reduce(total, group=groups.context)
    return total.item(), gradients


def assert_cut_as_whole(config: ModelConfig, world_size: int, **settings: Any) -> None:
    of_model = {name: settings[name] for name in ("documents", "untied")}
    loss, gradients = whole(config, **of_model)
    run = partial(cut_run, world_size=world_size, config=config, **settings)
    for cut_loss, cut_gradients in run_ranks(run, world_size):
        # fp32 sums in another order.
        assert cut_loss == pytest.approx(loss, rel=1e-6)
        assert cut_gradients.keys() == gradients.keys()
        for name, (cut, gradient) in cut_gradients.items():
            want = part_of(cut, gradients[name], gradient.shape)
            error = (torch.from_numpy(gradient) - want).abs().max().item()
            assert error <= 1e-6 + 1e-4 * want.abs().max().item(), f"{name}: off by {error}"


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("world_size", "tensor", "sequence", "exchange"),
    [
        (2, 2, False, "gather"),
        (2, 2, True, "gather"),
        (4, 4, True, "gather"),
        (2, 1, False, "gather"),
        (2, 1, False, "all-to-all"),
        (4, 2, True, "gather"),
        (4, 2, False, "all-to-all"),
    ],
)
def test_a_cut_model_has_the_loss_and_gradients_of_the_whole_one(
    world_size: int, tensor: int, sequence: bool, exchange: str, documents: bool, untied: bool
) -> None:
    settings: dict[str, Any] = {"documents": documents, "untied": untied}
    assert_cut_as_whole(CONFIG, world_size, tensor=tensor, sequence=sequence, exchange=exchange, **settings)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize(
    ("world_size", "tensor", "sequence", "exchange"),
    [
        (2, 2, False, "gather"),
        (2, 2, True, "gather"),
        (2, 1, False, "gather"),
        (2, 1, False, "all-to-all"),
        (4, 2, True, "gather"),
    ],
)
def test_so_has_one_with_norms_that_heads_share(
    world_size: int, tensor: int, sequence: bool, exchange: str, kind: str
) -> None:
    config = replace(QWEN, normalization=kind)
    settings: dict[str, Any] = {"documents": True, "untied": True}
    assert_cut_as_whole(config, world_size, tensor=tensor, sequence=sequence, exchange=exchange, **settings)


class Gate(nn.Module):
    """A layer class with a weight and no row in SPLITS."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


def refusal(rank: int) -> str:
    layout = Layout(2, rank, 0, tensor=2)
    model = Decoder(CONFIG, VOCAB, device="meta")
    model.layers["1"].gate = Gate()
    try:
        split_tensors(model, make_groups(layout, timeout=60.0).tensor, sequence=False)
    except TypeError as error:
        return str(error)
    return ""


def test_a_layer_class_without_a_row_is_refused_by_name() -> None:
    message = "layers.1.gate.scale: its layer's class has no row in parallel.tensor.SPLITS"
    assert run_ranks(refusal, 2) == [message, message]


def test_on_one_rank_no_row_is_needed() -> None:
    cuts = split_tensors(Gate(), None, sequence=False)
    assert cuts == {"scale": Cut((4,), (0,), is_copy=True)}


def test_every_layer_of_the_models_with_weights_of_its_own_has_a_row() -> None:
    model = Decoder(replace(CONFIG, untie_embeddings_and_output_weights=True), VOCAB, device="meta")
    cut_by_their_owner = {"Linear", "Embedding"}
    for module in model.modules():
        if list(module.parameters(recurse=False)) and type(module).__name__ not in cut_by_their_owner:
            assert type(module) in SPLITS, type(module).__name__
