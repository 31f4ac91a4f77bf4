"""Context ranks attend as one rank does, each with its share of the work, and hold no mask of all pairs."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import tests.early  # noqa: F401 - for its effect
from megalith.layers.attend import attend
from megalith.layers.attend_blocks import AttentionDropout
from megalith.layers.mask import make_mask
from megalith.layers.random import dropout_rows, mix, number_words
from megalith.parallel.context import (
    attend_gathered,
    attend_traded,
    by_place,
    by_rank,
    chunks_held,
    cut_tokens,
    mask_of_whole_sequence,
    mask_over_all_keys,
)
from megalith.plan.job import Job
from megalith.plan.machine import H100
from megalith.plan.time import COMPILED, attention_passes
from tests.largest import Largest
from tests.ranks import run_ranks

B, H, S, K = 2, 4, 256, 4
EXCHANGES: dict[str, Any] = {
    "gather": (attend_gathered, mask_over_all_keys),
    "all-to-all": (attend_traded, mask_of_whole_sequence),
}


def drawn() -> dict[str, Tensor]:
    """Tokens come second, as in a batch."""
    generator = torch.Generator().manual_seed(5)
    made = {name: torch.randn(B, S, H, K, generator=generator) for name in ("q", "k", "v", "weights")}
    made["documents"] = (torch.rand(B, S, generator=generator) < 0.05).cumsum(1)
    rows = dropout_rows(1234, torch.arange(B), S)[:, None] ^ number_words(H)[:, None]
    made["rows"] = mix(rows).transpose(1, 2)
    return made


def attended(
    way: Callable[..., Tensor], mask_for: Callable[..., Any], data: dict[str, Tensor], settings: tuple[bool, bool, bool]
) -> list[Tensor]:
    """BTHK: what comes out, and the gradients of queries, keys and values."""
    causal, documents, dropped = settings
    inputs = [data[name].clone().requires_grad_() for name in ("q", "k", "v")]
    mask = mask_for(
        inputs[0].shape[1], causal=causal, query_documents_BT=data["documents"] if documents else None, dense=True
    )
    dropout = AttentionDropout(0.3, data["rows"].transpose(1, 2)) if dropped else None
    o_BHTK = way(*(x.transpose(1, 2) for x in inputs), mask, scale=0.3, dropout=dropout)
    output = o_BHTK.transpose(1, 2)
    return [output.detach(), *torch.autograd.grad((output * data["weights"]).sum(), inputs)]


def on_rank(rank: int, *, exchange: str, settings: Sequence[tuple[bool, bool, bool]]) -> list[list[Tensor]]:
    group = dist.group.WORLD
    way, mask_for = EXCHANGES[exchange]
    way, mask_for = partial(way, inner=attend, group=group), partial(mask_for, group=group)
    return [attended(way, mask_for, cut_tokens(drawn(), group), chosen) for chosen in settings]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_attend_as_one_does(ranks: int, exchange: str) -> None:
    yes_or_no = (False, True)
    settings = [
        (causal, documents, dropped) for causal in yes_or_no for documents in yes_or_no for dropped in yes_or_no
    ]
    found = run_ranks(partial(on_rank, exchange=exchange, settings=settings), ranks)
    for number, chosen in enumerate(settings):
        expected = attended(attend, make_mask, drawn(), chosen)
        for parts, whole in zip(zip(*(of_rank[number] for of_rank in found), strict=True), expected, strict=True):
            # fp32 sums of other parts of the keys.
            torch.testing.assert_close(by_place(torch.cat(parts, 1), 1, ranks), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_order_by_rank_is_that_of_the_chunks_that_ranks_hold(ranks: int) -> None:
    whole = torch.arange(24).view(1, 12, 2)
    joined = torch.cat([whole[:, chunk] for rank in range(ranks) for chunk in chunks_held(12, rank, ranks)], 1)
    assert torch.equal(by_place(joined, 1, ranks), whole)
    assert torch.equal(by_rank(whole, 1, ranks), joined)


def largest_on_rank(rank: int, *, dropped: bool) -> int:
    with Largest() as noted:
        on_rank(rank, exchange="gather", settings=[(True, False, dropped)])
    return int(noted.elements)


@pytest.mark.parametrize("dropped", [False, True])
def test_no_tensor_has_an_element_for_every_query_and_key(dropped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalith.layers.attend_blocks._SCORES_AT_ONCE", {"cpu": 1 << 12})
    ranks = 2
    # The keys and values of all ranks; or, where no kernel does without it, the mask of a chunk and the keys before.
    allowed = max(2 * B * H * S * K, S // (2 * ranks) * S)
    assert max(run_ranks(partial(largest_on_rank, dropped=dropped), ranks)) <= allowed < S // ranks * S


def pairs_on_rank(rank: int, *, documents: bool) -> list[tuple[int, int]]:
    calls = []

    def inner(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append((q.shape[2], k.shape[2]))
        return attend(q, k, *args, **kwargs)

    group = dist.group.WORLD
    way: Any = partial(attend_gathered, inner=inner, group=group)  # type: ignore[arg-type]
    attended(way, partial(mask_over_all_keys, group=group), cut_tokens(drawn(), group), (True, documents, False))
    return calls


@pytest.mark.parametrize("documents", [False, True])
def test_every_rank_computes_what_the_plan_says(documents: bool) -> None:
    ranks = 4
    job = Job(
        num_layers=1, width=H * K, num_heads=H, head_width=K, inner=4 * H * K, vocab_size=64, num_positions=S,
        sequence_length=S, micro_batch_size=B, num_microbatches=1, context=ranks,
    )  # fmt: skip
    planned = attention_passes(job, H100, COMPILED).forward * H100.flops * H100.attention_share
    for calls in run_ranks(partial(pairs_on_rank, documents=documents), ranks):
        # Of a chunk's own keys its queries see half.
        seen = sum(queries * keys - queries**2 / 2 for queries, keys in calls)
        # Two products, of a multiplication and an addition each.
        assert planned == pytest.approx(2 * 2 * B * H * K * seen)
