"""Weights are rounded once for a step's microbatches, and are not there when nothing runs; who adds gradients up."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megalith.layers import accumulate
from megalith.layers.block import Block
from megalith.layers.float8 import Weight8, use_float8, weight_in_8_bits
from megalith.layers.linear import split_backward_passes
from megalith.models.settings import ModelConfig
from megalith.models.shape import block_shape
from megalith.parallel.narrow import AddedUp, Narrowed, linears_of
from megalith.parallel.step import Batch, Timers

CONFIG = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=2, max_position_embeddings=8)


def made() -> Block:
    block = Block(block_shape(CONFIG, dtype=torch.bfloat16), number=0, stack="decoder")
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    return block


class Watching:
    """An engine that notes what is at hand."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.seen: list[list[Any]] = []

    def run(self, microbatches: Sequence[Batch], *, backward: bool, timers: Timers) -> Tensor:
        self.seen.append([linear.narrow for linear in linears_of(self.block)])
        if not backward:
            raise ValueError("stopped")
        return torch.ones(1)


def test_rounded_weights_are_those_of_now_and_gone_afterwards() -> None:
    block = made()
    inner = Watching(block)
    engine = Narrowed(inner, [block], torch.bfloat16)
    for _ in range(2):
        assert engine.run([{}], backward=True, timers=lambda name: torch.no_grad()) == 1
        linears = linears_of(block)
        assert len(linears) == 4
        for linear, narrow in zip(linears, inner.seen[-1], strict=True):
            assert narrow is not None and torch.equal(narrow, linear.weight.to(torch.bfloat16))
            assert not narrow.requires_grad and linear.narrow is None
        with torch.no_grad():
            block.feedforward.up.weight.add_(1.0)


def test_rounded_weights_are_gone_after_a_fault() -> None:
    block = made()
    with pytest.raises(ValueError, match="stopped"):
        Narrowed(Watching(block), [block], torch.bfloat16).run(
            [{}], backward=False, timers=lambda name: torch.no_grad()
        )
    assert all(linear.narrow is None for linear in linears_of(block))


def test_weights_of_8_bit_products_are_at_hand_as_those_round_them() -> None:
    block = made()
    use_float8(block, "e4m3")
    inner = Watching(block)
    Narrowed(inner, [block], torch.bfloat16).run([{}], backward=True, timers=lambda name: torch.no_grad())
    assert len(inner.seen[0]) == 4
    for linear, narrow in zip(linears_of(block), inner.seen[0], strict=True):
        expected = weight_in_8_bits(linear.weight.detach())
        assert isinstance(narrow, Weight8) and linear.narrow is None
        assert all(torch.equal(found.float(), wanted.float()) for found, wanted in zip(narrow, expected, strict=True))


def test_products_whose_backward_pass_comes_in_halves_are_left_alone() -> None:
    block = made()
    split_backward_passes(block)
    assert not linears_of(block)


@pytest.mark.parametrize("backward", [True, False])
def test_products_may_take_the_gradients_of_blocks_while_an_engine_runs(
    backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = made()
    inner = Watching(block)
    taken: list[list[int]] = []

    def run(microbatches: Sequence[Batch], *, backward: bool, timers: Timers) -> Tensor:
        grad, x = (torch.ones(2, size) for size in block.feedforward.up.weight.shape)
        weights = [linear.weight for linear in linears_of(block)]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        accumulate.gradient_by_weight(block.feedforward.up.weight, grad, x)
        taken.append([number for number, weight in enumerate(weights) if weight.grad is None])
        return Watching.run(inner, microbatches, backward=backward, timers=timers)

    monkeypatch.setattr(inner, "run", run)
    up = [linear is block.feedforward.up for linear in linears_of(block)].index(True)
    for engine, expected in ((AddedUp(inner, [block]), [up]), (inner, [])):
        try:
            engine.run([{}], backward=backward, timers=lambda name: torch.no_grad())
        except ValueError:
            assert not backward  # the engine stops
        assert taken.pop() == expected
