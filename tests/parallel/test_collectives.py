"""Collectives give the same values and gradients inside a compiled graph as outside."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import tests.early  # noqa: F401 - for its effect
from megalith.parallel.collectives import (
    copy_to_group,
    gather_copies,
    gather_for_product,
    reduce_from_group,
    scatter_copies,
    scatter_sum,
)
from megalith.parallel.context import trade
from tests.ranks import run_ranks


def both_ways(rank: int) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Of each collective between two products: what goes out and the gradient of what goes in, plain and compiled."""
    group = dist.group.WORLD
    generator = torch.Generator().manual_seed(3 + rank)
    first, second = torch.randn(8, 8, generator=generator), torch.randn(8, 8, generator=generator)
    inputs = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(9))
    between: dict[str, Callable[[Tensor], Tensor]] = {
        "copy": lambda x: copy_to_group(x, group),
        "reduce": lambda x: reduce_from_group(x, group),
        "gather for product": lambda x: gather_for_product(x, 0, group),
        "gather copies": lambda x: gather_copies(x, 1, group),
        "scatter sum": lambda x: scatter_sum(x, 0, group),
        "scatter copies along the first": lambda x: scatter_copies(x, 0, group),
        "scatter copies": lambda x: scatter_copies(x, 1, group),
        "trade": lambda x: trade(x, give=0, take=1, group=group),
    }
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for name, work in between.items():

        def products(x: Tensor, work: Callable[[Tensor], Tensor] = work) -> Tensor:
            return work(x @ first) @ second

        pairs = []
        # What the compiler traces, without the minutes of its code generator.
        for way in (products, torch.compile(products, backend="aot_eager")):
            x = inputs.clone().requires_grad_()
            y = way(x)
            (y * torch.arange(1.0, 9.0)).sum().backward()
            assert x.grad is not None
            pairs.append([y.detach(), x.grad])
        found[name] = (pairs[0], pairs[1])
    return found


# Of torch's compiler, about what it does not support yet.
@pytest.mark.filterwarnings("default")
def test_compiled_collectives_have_the_values_and_gradients_of_plain_ones() -> None:
    for found in run_ranks(both_ways, 2, timeout=200.0):
        for name, (plain, compiled) in found.items():
            assert float(plain[1].abs().min()) > 0, name
            for expected, value in zip(plain, compiled, strict=True):
                torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5, msg=name)
