"""Scores and loss over a vocabulary that is cut over ranks, with a bias: those of the whole one."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import tests.early  # noqa: F401 - for its effect
from megalith.layers.loss import vocabulary_cross_entropy
from megalith.models.transformer import score_tokens
from megalith.parallel import vocabulary
from megalith.parallel.mesh import Layout, make_groups
from megalith.parallel.sequence import cut
from megalith.parallel.vocabulary import cut_cross_entropy, cut_logits
from tests.ranks import run_ranks

B, T, D, V, RANKS = 2, 6, 8, 19, 3


def whole_tensors() -> list[torch.Tensor]:
    """Hidden states, table, bias, labels (some of them of no token) and weights."""
    generator = torch.Generator().manual_seed(4)
    hidden, table = torch.randn(B, T, D, generator=generator), torch.randn(V, D, generator=generator)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[0, 1] = labels[1, 4] = -1
    weights = torch.rand(B, T, generator=generator) * (labels >= 0)
    return [hidden, table, torch.randn(V, generator=generator), labels, weights]


def on_rank(rank: int, *, sequence: bool) -> dict[str, NDArray[Any]]:
    groups = make_groups(Layout(RANKS, rank, 0, tensor=RANKS), timeout=60.0)
    hidden, table, bias, labels, weights = whole_tensors()
    share = -(-V // RANKS)
    rows = slice(rank * share, min((rank + 1) * share, V))
    entering = (cut(hidden, groups.tensor) if sequence else hidden.clone()).requires_grad_()
    part, part_bias = table[rows].clone().requires_grad_(), bias[rows].clone().requires_grad_()
    layout: dict[str, Any] = {"group": groups.tensor, "sequence": sequence}
    with torch.no_grad():
        scores = cut_logits(entering, part, bias_V=part_bias, **layout)
    loss = cut_cross_entropy(entering, part, labels, weights, first=rows.start, bias_V=part_bias, **layout)
    loss.backward()
    found = {"scores": scores, "loss": loss.detach()}
    for name, tensor in {"hidden": entering, "table": part, "bias": part_bias}.items():
        assert tensor.grad is not None
        found[name] = tensor.grad
    return {name: tensor.numpy() for name, tensor in found.items()}


@pytest.mark.parametrize("sequence", [False, True])
def test_scores_loss_and_gradients_are_those_of_the_whole_vocabulary(sequence: bool) -> None:
    hidden, table, bias, labels, weights = whole_tensors()
    for tensor in (hidden, table, bias):
        tensor.requires_grad_()
    scores = score_tokens(hidden, table, bias_V=bias)
    # Written out by PyTorch, which a label of no token leaves out.
    losses = torch.nn.functional.cross_entropy(
        scores.flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="none"
    )
    expected = losses @ weights.flatten()
    ours = vocabulary_cross_entropy(hidden, table, labels, weights, bias_V=bias)
    torch.testing.assert_close(ours, expected)
    expected.backward()
    found = run_ranks(partial(on_rank, sequence=sequence), RANKS)
    parts = {name: [torch.from_numpy(rank[name]) for rank in found] for name in found[0]}
    for rank in range(RANKS):
        torch.testing.assert_close(parts["scores"][rank], scores.detach())
        torch.testing.assert_close(parts["loss"][rank], expected.detach())
    gradients = {"table": torch.cat(parts["table"]), "bias": torch.cat(parts["bias"])}
    # A rank holds a stretch of all samples' tokens in a row.
    gradients["hidden"] = torch.cat(parts["hidden"]).view(B, T, D) if sequence else parts["hidden"][0]
    for name, tensor in {"hidden": hidden, "table": table, "bias": bias}.items():
        assert tensor.grad is not None
        torch.testing.assert_close(gradients[name], tensor.grad)


def loss_without_gradients_on_rank(rank: int) -> float:
    groups = make_groups(Layout(RANKS, rank, 0, tensor=RANKS), timeout=60.0)
    hidden, table, _, labels, weights = whole_tensors()
    share = -(-V // RANKS)
    part = table[rank * share : (rank + 1) * share].clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.delattr(vocabulary, "add_product")  # gradients by the table are not to be computed
        layout: dict[str, Any] = {"first": rank * share, "group": groups.tensor, "sequence": False}
        return float(cut_cross_entropy(hidden, part, labels, weights, **layout))


def test_a_loss_without_gradients_computes_none() -> None:
    hidden, table, _, labels, weights = whole_tensors()
    expected = float(vocabulary_cross_entropy(hidden, table, labels, weights))
    assert run_ranks(loss_without_gradients_on_rank, RANKS) == pytest.approx([expected] * RANKS)


def formulas_on_rank(rank: int, *, dtype: torch.dtype) -> dict[str, NDArray[Any]]:
    groups = make_groups(Layout(RANKS, rank, 0, tensor=RANKS), timeout=60.0)
    hidden, table, _, labels, _ = whole_tensors()
    share = -(-V // RANKS)
    logits = (hidden.flatten(0, 1) @ table[rank * share : (rank + 1) * share].t()).bfloat16()
    labels = labels.flatten()[:, None] - rank * share
    here = (labels >= 0) & (labels < logits.shape[1])
    labels = labels.masked_fill(~here, 0)
    found: dict[str, NDArray[Any]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "compiled", lambda formula: formula)
        for name, score in {
            "formulas": vocabulary._scored_by_formulas,
            "in place": vocabulary._scored_in_place,
        }.items():
            slopes, losses = score(logits.clone(), labels, here, dtype, groups.tensor, slopes=True)
            found |= {f"slopes, {name}": slopes.float().numpy(), f"losses, {name}": losses.numpy()}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formulas_for_gpus_are_what_the_steps_in_place_give(dtype: torch.dtype) -> None:
    for found in run_ranks(partial(formulas_on_rank, dtype=dtype), RANKS):
        for what in ("slopes", "losses"):
            assert np.array_equal(found[f"{what}, formulas"], found[f"{what}, in place"])


def loss_of_equal_scores_on_rank(rank: int, *, entries: int, score: str) -> float:
    groups = make_groups(Layout(2, rank, 0, tensor=2), timeout=60.0)
    hidden, part = torch.zeros(1, 3, D, dtype=torch.float16), torch.ones(entries // 2, D, requires_grad=True)
    layout: dict[str, Any] = {"first": rank * (entries // 2), "group": groups.tensor, "sequence": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "compiled", lambda formula: formula)
        patch.setattr(vocabulary, "_scored_in_place", getattr(vocabulary, score))
        labels, weights = torch.tensor([[0, 1, entries - 1]]), torch.full((1, 3), 1 / 3)
        return float(cut_cross_entropy(hidden, part, labels, weights, softmax_in_16_bit=True, **layout).detach())


@pytest.mark.parametrize("score", ["_scored_in_place", "_scored_by_formulas"])
def test_a_softmax_in_fp16_holds_more_entries_than_its_largest_number(score: str) -> None:
    entries = 100_000
    losses = run_ranks(partial(loss_of_equal_scores_on_rank, entries=entries, score=score), 2)
    assert losses == pytest.approx([np.log(entries)] * 2, rel=1e-3)


def either_softmax_on_rank(rank: int) -> list[float]:
    groups = make_groups(Layout(RANKS, rank, 0, tensor=RANKS), timeout=60.0)
    hidden, table, _, labels, weights = whole_tensors()
    share = -(-V // RANKS)
    layout: dict[str, Any] = {"first": rank * share, "group": groups.tensor, "sequence": False}
    part = table[rank * share : (rank + 1) * share]
    return [
        float(cut_cross_entropy(hidden.bfloat16(), part, labels, weights, softmax_in_16_bit=in_16_bit, **layout))
        for in_16_bit in (False, True)
    ]


def test_a_softmax_in_16_bits_is_near_that_of_fp32_and_another() -> None:
    for in_fp32, in_16_bits in run_ranks(either_softmax_on_rank, RANKS):
        assert in_fp32 != in_16_bits == pytest.approx(in_fp32, rel=1e-2)
