"""The loss over blocks of the vocabulary against torch's cross entropy in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalith.layers import loss as loss_module
from megalith.layers import loss_blocks
from megalith.layers.loss import per_token_losses, vocabulary_cross_entropy
from megalith.layers.loss_blocks import BLOCK, losses_and_gradients

VOCABULARY = 2 * BLOCK + 100
WIDTH = 144  # of 30 rows a block's product is large enough


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(
    hidden: Tensor, table: Tensor, labels: Tensor, weights: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Loss, gradients by hidden, table and bias if any, and the losses of all rows, in float64."""
    inputs = [t.detach().double().requires_grad_() for t in (hidden, table, bias) if t is not None]
    logits = F.linear(inputs[0], inputs[1], inputs[2] if bias is not None else None)
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten().clamp(min=0), reduction="none")
    loss = losses @ weights.flatten().double()
    return loss.detach(), *torch.autograd.grad(loss, inputs), losses.detach()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each chunk that went by blocks."""
    rows: list[int] = []
    by_blocks = losses_and_gradients

    def counting(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows.append(len(hidden))
        return by_blocks(hidden, *args, **kwargs)

    monkeypatch.setattr(loss_module, "losses_and_gradients", counting)
    return rows


@pytest.fixture(params=[True, False], ids=["no product to MKL", "some to MKL"])
def either_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as on a processor of which MKL uses half, and as on another."""
    monkeypatch.setattr(loss_blocks, "leaves_half_to_onednn", lambda: request.param)


# Peaked: logits up to 90 are rounded by up to 1e-5, and so are the probabilities, relative; table entries reach 6.
@pytest.mark.parametrize(("scale", "off"), [(0.1, 1e-6), (1.7, 1e-4)], ids=["flat", "peaked"])
@pytest.mark.parametrize("chunk", [64, 30], ids=["one chunk", "two and a rest"])
@pytest.mark.parametrize("biased", [True, False], ids=["biased", "unbiased"])
@pytest.mark.usefixtures("either_library")
def test_loss_and_gradients_are_those_of_float64(
    chunk: int, scale: float, off: float, biased: bool, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, table = draw(2, 32, WIDTH).requires_grad_(), (draw(VOCABULARY, WIDTH, seed=2) * scale).requires_grad_()
    bias = draw(VOCABULARY, seed=5).requires_grad_() if biased else None
    labels = torch.randint(VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(3))
    labels[0, :4] = torch.tensor([0, BLOCK - 1, BLOCK, VOCABULARY - 1])
    weights = torch.rand(2, 32, generator=torch.Generator().manual_seed(4))
    labels[1, 0], weights[1, 0] = -1, 0.0
    labels[1, 1] = labels[1, 2]
    loss = vocabulary_cross_entropy(hidden, table, labels, weights, bias_V=bias, chunk=chunk)
    inputs = [hidden, table] + ([bias] if bias is not None else [])
    gradients = torch.autograd.grad(loss, inputs)
    assert counted == ([64] if chunk == 64 else [30, 30, 4])
    wanted, *expected, losses = exact(hidden, table, labels, weights, bias)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    for found, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=off)
    monkeypatch.setattr(loss_module, "CPU_ROWS", chunk)
    alone = per_token_losses(hidden, table, labels, bias_V=bias)
    torch.testing.assert_close(alone.double().flatten(), losses, rtol=1e-6, atol=off)


def test_a_block_whose_first_entries_are_out_of_question_counts_all_the_same(counted: list[int]) -> None:
    hidden, table = torch.ones(32, WIDTH), draw(VOCABULARY, WIDTH, seed=2) * 0.07
    for start in range(0, VOCABULARY, BLOCK):
        table[start : start + 80] -= 1.4  # 201 below the others: the powers of these entries underflow.
    hidden.requires_grad_()
    table.requires_grad_()
    labels = torch.arange(32) * 65
    labels[:2] = torch.tensor([0, BLOCK + 1])
    weights = torch.full((32,), 1 / 32)
    loss = vocabulary_cross_entropy(hidden, table, labels, weights)
    loss.backward()
    assert counted == [32]
    wanted, grad_hidden, grad_table, _ = exact(hidden, table, labels, weights)
    assert hidden.grad is not None and table.grad is not None
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad.double(), grad_hidden, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(table.grad.double(), grad_table, rtol=1e-5, atol=1e-6)


def test_numbers_that_are_not_finite_are_not_hidden() -> None:
    hidden, table = draw(32, WIDTH).requires_grad_(), draw(VOCABULARY, WIDTH, seed=2)
    table[BLOCK + 7, 3] = torch.inf
    loss = vocabulary_cross_entropy(hidden, table, torch.zeros(32, dtype=torch.int64), torch.ones(32))
    assert not loss.isfinite()


@pytest.mark.parametrize("chunk", [64, 30], ids=["one chunk", "two and a rest"])
def test_in_bf16_loss_and_gradients_are_those_of_float64_but_for_its_rounding(chunk: int, counted: list[int]) -> None:
    rounded = draw(VOCABULARY, WIDTH, seed=2).bfloat16().float() * 0.25
    hidden, table = draw(2, 32, WIDTH).bfloat16().requires_grad_(), rounded.requires_grad_()
    labels = torch.randint(VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(3))
    labels[0, :4] = torch.tensor([0, BLOCK - 1, BLOCK, VOCABULARY - 1])
    weights = torch.rand(2, 32, generator=torch.Generator().manual_seed(4))
    labels[1, 0], weights[1, 0] = -1, 0.0
    loss = vocabulary_cross_entropy(hidden, table, labels, weights, chunk=chunk)
    loss.backward()
    assert counted == ([64] if chunk == 64 else [30, 30, 4])
    wanted, grad_hidden, grad_table, _ = exact(hidden, table, labels, weights)
    assert hidden.grad is not None and table.grad is not None
    assert loss.dtype == table.grad.dtype == torch.float32
    # Logits of up to 16, losses of about 14 and gradients are rounded to 8 bits each; of 64 losses much cancels.
    rounding = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(loss.double(), wanted, rtol=rounding / 4, atol=0)
    for grad, expected in ((hidden.grad, grad_hidden), (table.grad, grad_table)):
        torch.testing.assert_close(grad.double(), expected, rtol=0, atol=2 * rounding * float(expected.abs().max()))


def test_in_bf16_many_blocks_are_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_blocks, "BLOCK", 64)
    # All entries are as likely, so that what is rounded is each block's product and their sum, the mean row.
    hidden, table = torch.zeros(4, WIDTH).bfloat16(), (draw(4096, WIDTH) + 16).bfloat16()
    labels, weights, found = torch.arange(4)[:, None], torch.ones(4, 1), torch.empty_like(hidden)
    losses_and_gradients(
        hidden, table, labels, weights, grad_hidden_CD=found, grad_table_VD=torch.empty(4096, WIDTH), first=True
    )
    expected = exact(hidden, table, labels[:, 0], weights[:, 0])[1]
    # A sum of 64 blocks that is rounded to 8 bits each time is off by 0.06.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.usefixtures("either_library")
def test_products_in_fp32_are_added_by_either_library(first: bool, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    left, right, total = (
        torch.randint(-3, 4, shape, generator=generator).float()
        for shape in ((VOCABULARY, 30), (30, WIDTH), (VOCABULARY, WIDTH))
    )
    left = left.t().contiguous().t() if transposed else left
    expected = left @ right + (0 if first else total)
    loss_blocks.add_product(total, left, right, first=first)
    assert torch.equal(total, expected)


@pytest.mark.parametrize("first", [True, False])
def test_products_in_16_bits_are_added_in_fp32(first: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    # Small whole numbers, so that every sum is exact whatever its order.
    left, right = (torch.randint(-3, 4, shape, generator=generator).bfloat16() for shape in ((300, 6), (6, 4)))
    total = torch.randint(-999, 1000, (300, 4), generator=generator).float()
    expected = left.float() @ right.float() + (0 if first else total)
    loss_blocks.add_product(total, left, right, first=first)
    assert torch.equal(total, expected)
