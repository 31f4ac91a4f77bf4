"""Context parallelism: each rank holds some of a sequence's tokens, and attention alone needs the others.

The sequence is cut into 2 x ranks chunks and rank r holds chunks r and 2 x ranks - 1 - r, so that in causal order all
ranks have the same work. Everything that has one entry per token is cut alike, dropout words among them, so masks are
those of the whole sequence.

Two ways to attend: `gather`, every rank collects all keys and values and attends from its own queries, in causal order
a chunk of them over the keys up to its end; `all-to-all` (Jacobs et al. 2023, arXiv:2309.14509), ranks trade tokens for
heads, attend over the whole sequence with some of the heads, and trade back.

Shape letters: B batch, H heads, T tokens held here, S all tokens, K head width.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalith.layers.attend_blocks import AttentionDropout
from megalith.layers.attention import Attend, SelfAttention
from megalith.layers.mask import Mask, make_mask
from megalith.parallel.collectives import Group, all_gather, gather_for_product, rank_in, size_of
from megalith.parallel.journal import JOURNAL

# What is noted of trading tokens for heads.
TRADED = "what ranks trade"


def chunks_held(num_tokens: int, rank: int, ranks: int) -> tuple[slice, slice]:
    """The two stretches of a sequence of num_tokens tokens that a rank holds, in the order in which it holds them.

    num_tokens must be divisible by 2 x ranks.
    """
    chunk = num_tokens // (2 * ranks)
    first, second = rank * chunk, (2 * ranks - 1 - rank) * chunk
    return slice(first, first + chunk), slice(second, second + chunk)


def by_place(joined: Tensor, dim: int, ranks: int) -> Tensor:
    """The tokens along dim in the order of the sequence, of the parts of all ranks joined in rank order.

    By whole chunks, since numbers of places would be copied to a GPU, for which the host waits.
    """
    first, second = joined.unflatten(dim, (ranks, 2, -1)).unbind(dim + 1)
    return torch.cat([first, second.flip(dim)], dim).flatten(dim, dim + 1)


def by_rank(whole: Tensor, dim: int, ranks: int) -> Tensor:
    """What `by_place` was given."""
    first, second = whole.unflatten(dim, (2, ranks, -1)).unbind(dim)
    return torch.stack([first, second.flip(dim)], dim + 1).flatten(dim, dim + 2)


def cut_tokens(batch: dict[str, Tensor], group: Group) -> dict[str, Tensor]:
    """The batch with this rank's tokens of every entry that has one value per token (two dimensions or more)."""
    ranks = size_of(group)
    if ranks == 1:
        return batch
    held = {
        name: torch.cat([entry[:, chunk] for chunk in chunks_held(entry.shape[1], rank_in(group), ranks)], 1)
        for name, entry in batch.items()
        if entry.dim() >= 2
    }
    return {**batch, **held}


def cut_context(model: nn.Module, group: Group, *, exchange: str) -> None:
    """Let the model's self-attention see the whole sequence although each rank holds a part; in place.

    exchange: gather or all-to-all. The model has the seam mask_for, its attentions the seam attend.
    """
    if size_of(group) == 1:
        return
    if exchange == "gather":
        model.mask_for = partial(mask_over_all_keys, group=group)  # type: ignore[assignment]
    else:
        model.mask_for = partial(mask_of_whole_sequence, group=group)  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, SelfAttention):
            way = attend_gathered if exchange == "gather" else attend_traded
            module.attend = partial(way, inner=module.attend, group=group)


def mask_over_all_keys(
    num_tokens: int, *, causal: bool, query_documents_BT: Tensor | None = None, dense: bool = True, group: Group
) -> Mask:
    """What this rank's queries see of all keys in their natural order, for `attend_gathered`. num_tokens: held here."""
    if query_documents_BT is None:
        return Mask(causal)
    keys_BS, device = in_natural_order(query_documents_BT, 1, group), query_documents_BT.device
    visible_B1TS = query_documents_BT[:, None, :, None] == keys_BS[:, None, None, :]
    if causal:
        chunks = chunks_held(keys_BS.shape[1], rank_in(group), size_of(group))
        places_T = torch.cat([torch.arange(chunk.start, chunk.stop, device=device) for chunk in chunks])
        visible_B1TS = visible_B1TS & (places_T[:, None] >= torch.arange(keys_BS.shape[1], device=device))
    return Mask(causal, visible=visible_B1TS)


def mask_of_whole_sequence(
    num_tokens: int, *, causal: bool, query_documents_BT: Tensor | None = None, dense: bool = True, group: Group
) -> Mask:
    """The mask of the whole sequence in its natural order."""
    if query_documents_BT is not None:
        query_documents_BT = in_natural_order(query_documents_BT, 1, group)
    return make_mask(num_tokens * size_of(group), causal=causal, query_documents_BT=query_documents_BT, dense=dense)


def in_natural_order(local: Tensor, dim: int, group: Group) -> Tensor:
    """The parts of all ranks, in the order of the sequence; no gradient."""
    if size_of(group) == 1:
        return local  # of any length, which two stretches a rank do not have
    return by_place(all_gather(local, dim, group), dim, size_of(group))


def attend_gathered(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    mask: Mask,
    *,
    inner: Attend,
    group: Group,
    scale: float,
    divisor: float = 1.0,
    dropout: AttentionDropout | None = None,
) -> Tensor:
    """BHTK: attention of this rank's queries over the keys of all ranks."""
    ranks = size_of(group)
    # One collective for both, since each costs a latency.
    gathered = gather_for_product(torch.stack([k_BHTK, v_BHTK]), 3, group)
    k_BHSK, v_BHSK = by_place(gathered, 3, ranks).unbind()
    if not mask.causal:
        return inner(q_BHTK, k_BHSK, v_BHSK, mask, scale=scale, divisor=divisor, dropout=dropout)
    # The queries of a chunk are the last of the keys that they see.
    attended, start = [], 0
    for chunk in chunks_held(k_BHSK.shape[2], rank_in(group), ranks):
        held, seen = slice(start, start + chunk.stop - chunk.start), slice(0, chunk.stop)
        visible = None if mask.visible is None else mask.visible[:, :, held, seen]
        dropped = None if dropout is None else AttentionDropout(dropout.probability, dropout.rows[:, :, held])
        o_BHTK = inner(
            q_BHTK[:, :, held],
            k_BHSK[:, :, seen],
            v_BHSK[:, :, seen],
            Mask(mask.causal, visible),
            scale=scale,
            divisor=divisor,
            dropout=dropped,
        )
        attended.append(o_BHTK.transpose(1, 2))  # heads inside tokens in memory, as the projection wants them
        start = held.stop
    return torch.cat(attended, 1).transpose(1, 2)


def attend_traded(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    mask: Mask,
    *,
    inner: Attend,
    group: Group,
    scale: float,
    divisor: float = 1.0,
    dropout: AttentionDropout | None = None,
) -> Tensor:
    """BHTK: attention over the whole sequence by some of the heads on each rank.

    Heads of keys must divide over the ranks; each goes with the queries that share it, as if these were its features.
    """
    ranks, width = size_of(group), q_BHTK.shape[-1]
    joined = q_BHTK.unflatten(1, (k_BHTK.shape[1], -1)).transpose(2, 3).flatten(3)
    traded = trade(torch.cat([joined, k_BHTK, v_BHTK], -1), give=1, take=2, group=group)
    joined, k, v = by_place(traded, 2, ranks).split([joined.shape[-1], width, width], -1)
    q = joined.unflatten(3, (-1, width)).transpose(2, 3).flatten(1, 2)
    if dropout is not None:
        rows = by_place(trade(dropout.rows, give=1, take=2, group=group), 2, ranks)
        dropout = AttentionDropout(dropout.probability, rows)
    attended = inner(q, k, v, mask, scale=scale, divisor=divisor, dropout=dropout)
    return trade(by_rank(attended, 2, ranks), give=2, take=1, group=group)


class _Trade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, give: int, take: int, group: Group) -> Tensor:
        ctx.give, ctx.take, ctx.group = give, take, group
        sent = torch.stack([part.contiguous() for part in value.chunk(size_of(group), give)])
        received = torch.empty_like(sent)
        JOURNAL.made(sent, TRADED)
        dist.all_to_all_single(received, sent, group=group)
        JOURNAL.received(received, TRADED)
        return torch.cat(received.unbind(), take)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _Trade.apply(gradients[0], ctx.take, ctx.give, ctx.group), None, None, None


def trade(value: Tensor, *, give: int, take: int, group: Group) -> Tensor:
    """Give each rank its share along one dimension, take everybody's part along another, joined in rank order."""
    traded: Tensor = _Trade.apply(value, give, take, group)
    return traded
