"""A block over tensor ranks: compiled whole, with the gradients of plain code; what ranks exchange in its backward pass
is beside products, and no sequence is kept that was gathered."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx import GraphModule

import tests.early  # noqa: F401 - for its effect
from megalith.layers.block import Block
from megalith.layers.initial import draw_weights
from megalith.layers.mask import make_mask
from megalith.models.settings import ModelConfig
from megalith.models.shape import block_shape
from megalith.parallel.sequence import cut, first_of_each, join
from megalith.parallel.tensor import split_tensors
from tests.ranks import run_ranks

B, T, D = 2, 8, 32
# What counts of a graph: products, and what is exchanged.
SHORT = {
    "mm": "product",
    "bmm": "product",
    "addmm": "product",
    "start_gather": "gather again",
    "reduce_scatter_tensor": "sum",
    "all_reduce": "sum",
    "wait_tensor": "wait",
}


def block_and_stream(*, gated: bool, sequence: bool) -> tuple[Block, Tensor]:
    config = ModelConfig(
        num_layers=2,
        hidden_size=D,
        num_attention_heads=4,
        max_position_embeddings=T,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        swiglu=gated,
        add_bias_linear=not gated,
    )
    layers = nn.ModuleDict({"0": Block(block_shape(config, dtype=torch.float32), number=0, stack="decoder")})
    draw_weights(layers, 7)
    stream = torch.randn(B, T, D, generator=torch.Generator().manual_seed(1))
    group = dist.group.WORLD
    split_tensors(layers, group, sequence=sequence)
    block = layers["0"]
    assert isinstance(block, Block)
    return block, (cut(stream, group) if sequence else stream).requires_grad_()


def names_in(graph: GraphModule) -> list[str]:
    names = [node.target.__name__.split(".")[0] for node in graph.graph.nodes if node.op == "call_function"]
    return [SHORT[name] for name in names if name in SHORT]


def both_ways(rank: int, *, gated: bool, sequence: bool) -> dict[str, Any]:
    """Of a block's output and gradients the largest difference when it is compiled; what its backward pass does, in
    order; the sizes of what is kept for that."""
    block, stream = block_and_stream(gated=gated, sequence=sequence)
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        boxed: Callable[..., Any] = make_boxed_func(graph.forward)
        return boxed

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    results = []
    torch._dynamo.reset()  # what other tests of this process have compiled
    for way in (block, torch.compile(block, backend=backend, fullgraph=True, dynamic=False)):
        output = way(stream, make_mask(T, causal=True))
        trained = [stream, *block.parameters()]
        slopes = torch.linspace(-1, 1, output.numel()).view(output.shape)
        results.append([output.detach(), *torch.autograd.grad(output, trained, slopes)])
    forward, backward = graphs
    outputs = next(node for node in forward.graph.nodes if node.op == "output").args[0]
    parameters = {tuple(parameter.shape) for parameter in block.parameters()}
    kept = [tuple(node.meta["val"].shape) for node in outputs[1:] if isinstance(node.meta["val"], Tensor)]
    return {
        "difference": max(float((a - b).abs().max()) for a, b in zip(*results, strict=True)),
        "backward": names_in(backward),
        "kept": [shape for shape in kept if shape not in parameters and shape[::-1] not in parameters],
    }


@pytest.mark.filterwarnings("default")  # the compiler has warnings of its own
@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_a_compiled_block_exchanges_beside_its_products(gated: bool, sequence: bool) -> None:
    for found in run_ranks(partial(both_ways, gated=gated, sequence=sequence), 2, timeout=120.0):
        assert found["difference"] < 2e-5
        # Of the products that a sequence enters, with and without a gate, the gradients by it and then by the weights.
        order = " ".join(found["backward"])
        for products in (2 if gated else 1, 1):
            by_input, by_weight = ["product"] * products, ["product"] * products
            expected = (
                ["gather again", *by_input, "sum", "wait", *by_weight, "wait"]
                if sequence
                else [*by_input, "sum", *by_weight, "wait"]
            )
            assert order.count(" ".join(expected)) >= 1, found["backward"]
        whole = [shape for shape in found["kept"] if shape in {(B, T, D), (B * T, D), (T, B, D)}]
        assert not (sequence and whole)


def without_gradients(rank: int, *, gated: bool, sequence: bool) -> float:
    """Of a block's output the largest difference when it is compiled, as evaluations call it."""
    block, stream = block_and_stream(gated=gated, sequence=sequence)
    torch._dynamo.reset()  # what other tests of this process have compiled
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        plain, found = (way(stream, make_mask(T, causal=True)) for way in (block, compiled))
    return float((plain - found).abs().max())


@pytest.mark.filterwarnings("default")  # the compiler has warnings of its own
@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_a_block_is_compiled_whole_for_evaluations_too(gated: bool, sequence: bool) -> None:
    assert max(run_ranks(partial(without_gradients, gated=gated, sequence=sequence), 2, timeout=120.0)) < 2e-6


def first_tokens(rank: int) -> tuple[bool, bool, bool]:
    whole = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(1))
    group = dist.group.WORLD
    part = cut(whole, group).requires_grad_()
    found = first_of_each(part, group)
    slopes = torch.arange(15.0).view(3, 5)
    (grad,) = torch.autograd.grad(found, part, slopes)
    expected = torch.zeros_like(whole)
    expected[:, 0] = slopes
    is_stretch = torch.equal(part.detach().flatten(0, 1), whole.flatten(0, 1).chunk(dist.get_world_size())[rank])
    return (
        is_stretch and torch.equal(join(part, group), whole),
        torch.equal(found, whole[:, 0]),
        torch.equal(grad, cut(expected, group)),
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_holds_a_stretch_of_all_tokens_and_the_first_of_each_sample_is_found(ranks: int) -> None:
    assert run_ranks(first_tokens, ranks) == [(True, True, True)] * ranks
