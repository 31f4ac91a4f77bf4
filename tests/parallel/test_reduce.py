"""Gradients that travel during the backward pass are the sums over replicas, and those that do not are the same."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalith.parallel import reduce
from megalith.parallel.reduce import OptimizerSharded, Replicated
from tests.ranks import run_ranks

RANKS = 2


def made(rank: int) -> tuple[nn.Module, Tensor]:
    """A model that is the same on all ranks, with rows that do not divide by them, and a batch that is not."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))
    return model, torch.randn(5, 4, generator=torch.Generator().manual_seed(rank))


def on_rank(rank: int, kind: str, overlap: bool, passes: int) -> tuple[int, list[Tensor], list[Tensor]]:
    """(buckets on their way before the end, what was summed, what it should be) after two microbatches."""
    reduce.BUCKET_BYTES = 64  # several buckets
    model, batch = made(rank)
    group = dist.group.WORLD
    parameters = dict(model.named_parameters())
    if kind == "replicated":
        reduction: Replicated | OptimizerSharded = Replicated(list(parameters.values()), group, overlap=overlap)
    else:
        reduction = OptimizerSharded(parameters, group, overlap=overlap)
    for number in range(2):
        if number == 2 - passes:
            reduction.before_last_backward(passes)
        assert not reduction._travelling
        model(batch + number).square().sum().backward()
    travelling = len(reduction._travelling)
    expected = []
    for parameter in parameters.values():
        assert parameter.grad is not None
        total = parameter.grad.clone()
        dist.all_reduce(total)
        expected.append(total)
    reduction.finish()
    if isinstance(reduction, Replicated):
        return travelling, [p.grad for p in parameters.values() if p.grad is not None], expected
    found = []
    for (shard, first), total in zip(reduction.shards.values(), expected, strict=True):
        assert shard.grad is not None
        found.append(shard.grad)
        total.data = total[first : first + len(shard)]
    return travelling, found, expected


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("kind", ["replicated", "optimizer"])
def test_gradients_are_summed_whenever_they_travel(kind: str, overlap: bool, passes: int) -> None:
    for travelling, found, expected in run_ranks(lambda rank: on_rank(rank, kind, overlap, passes), RANKS):
        assert travelling > 1 if overlap else travelling == 0
        assert len(found) == 4
        for gradient, total in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient, total)


def with_one_unused(rank: int, kind: str) -> list[tuple[Tensor, Tensor]]:
    """What was summed and what it should be, where rank 1 has no gradient for what is reduced first."""
    reduce.BUCKET_BYTES = 64
    model, batch = made(rank)
    model.register_parameter("branch", nn.Parameter(torch.ones(3, 2)))
    parameters = dict(model.named_parameters())
    # Beside the model's, in the place of what a bucket would be filled with first.
    parameters["branch"] = parameters.pop("branch")
    reduction: Replicated | OptimizerSharded
    if kind == "replicated":
        reduction = Replicated(list(parameters.values()), dist.group.WORLD, overlap=True)
    else:
        reduction = OptimizerSharded(parameters, dist.group.WORLD, overlap=True)
    out = model(batch)
    loss = out.square().sum() + (parameters["branch"].sum() * out.sum() if rank == 0 else 0.0)
    own = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, materialize_grads=True)
    expected = [gradient.contiguous() for gradient in own]
    for total in expected:
        dist.all_reduce(total)
    reduction.before_last_backward()
    loss.backward()
    reduction.after_last_backward()
    # The losses of a step travel in the same group.
    total = torch.full((), float(rank))
    dist.all_reduce(total)
    assert total == sum(range(RANKS))
    reduction.finish()
    if isinstance(reduction, OptimizerSharded):
        shards = reduction.shards.values()
        found = [shard.grad for shard, _ in shards]
        expected = [total[first : first + len(shard)] for total, (shard, first) in zip(expected, shards, strict=True)]
    else:
        found = [parameter.grad for parameter in parameters.values()]
    return [(gradient, total) for gradient, total in zip(found, expected, strict=True) if gradient is not None]


@pytest.mark.parametrize("kind", ["replicated", "optimizer"])
def test_ranks_without_some_gradient_sum_the_same_buckets(kind: str) -> None:
    for pairs in run_ranks(lambda rank: with_one_unused(rank, kind), RANKS):
        assert len(pairs) == 5
        for gradient, total in pairs:
            torch.testing.assert_close(gradient, total)
