"""softmax(q k^T) v in the forms that the mask and dropout ask for.

Blocked scores count as minus infinity in all of them. A query that sees no key at all gets 0. There may be fewer heads
of keys and values than of queries, of which as many stand one after the other as share one (grouped queries).

Shape letters: B batch, H heads (of keys and values: perhaps fewer), T query, S key, K head width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megalith.kernels import HAS_TRITON
from megalith.layers.mask import Mask, causal_order
from megalith.layers.random import keep_mask, number_words

# Scores held at once by attention with dropout: on the CPU what fits its caches, on a GPU what fills it.
_SCORES_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 27}
LARGEST_FUSED_HEAD = 256  # features; wider heads do not fit a multiprocessor's shared memory


@dataclass(frozen=True, eq=False)
class AttentionDropout:
    """Dropout of attention probabilities."""

    probability: float
    rows: Tensor  # int32 BHT: one word per query and head


def attend(
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    mask: Mask,
    *,
    scale: float,
    divisor: float = 1.0,
    dropout: AttentionDropout | None = None,
) -> Tensor:
    """Attention of every query over its visible keys, BHTK; the softmax runs in fp32 whatever the type of q.

    scale: what scores are multiplied by. divisor: scores are kept divided by it until the softmax has them in fp32, so
    that they fit fp16; it matters only where scores are stored at all, that is with dropout.
    """
    if dropout is not None or not takes_groups(q_BHTK, k_BHSK, mask):
        k_BHSK, v_BHSK = (for_each_query_head(part, q_BHTK.shape[1]) for part in (k_BHSK, v_BHSK))
    in_groups = k_BHSK.shape[1] < q_BHTK.shape[1]
    if dropout is not None:
        dropped: Tensor = _attend_with_dropout(q_BHTK, k_BHSK, v_BHSK, mask, scale, divisor, dropout)
        return dropped
    if mask.blocks is not None:
        attended: Tensor = _compiled_flex_attention()(
            q_BHTK, k_BHSK, v_BHSK, block_mask=mask.blocks, scale=scale, enable_gqa=in_groups
        )
        return attended
    if mask.bias is not None:
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=mask.bias.to(q_BHTK.dtype), scale=scale)
    causal, visible = mask.causal and mask.visible is None, mask.visible
    if causal and q_BHTK.shape[2] < k_BHSK.shape[2]:
        # torch's is_causal takes the queries for the first of the keys.
        causal, visible = False, _as_the_last(q_BHTK, k_BHSK, v_BHSK)
    return F.scaled_dot_product_attention(
        q_BHTK, k_BHSK, v_BHSK, attn_mask=visible, is_causal=causal, scale=scale, enable_gqa=in_groups
    )


def _as_the_last(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor) -> Tensor:
    """What tells torch's attention that the queries are the last of the keys, in causal order."""
    if q_BHTK.is_cuda:
        from torch.backends.cuda import SDPAParams, can_use_flash_attention

        # First, for what it imports lets the compiler trace what is asked then.
        order = _lower_right(q_BHTK.shape[2], k_BHSK.shape[2])
        # Not for the other kernel that knows the order: torch (2.11) cannot compile its backward pass.
        if can_use_flash_attention(SDPAParams(q_BHTK, k_BHSK, v_BHSK, None, 0.0, False, False)):
            return order
    return causal_order(q_BHTK.shape[2], k_BHSK.shape[2], q_BHTK.device)


def _lower_right(num_queries: int, num_keys: int) -> Tensor:
    """The order as torch's flash attention is told it.

    It is what torch's causal_lower_right gives, which takes memory for two floats of every score without a use.
    """
    from torch.nn.attention.bias import CausalBias, CausalVariant

    bias = torch.empty(0).as_subclass(CausalBias)
    bias.variant, bias.seq_len_q, bias.seq_len_kv = CausalVariant.LOWER_RIGHT, num_queries, num_keys
    return bias


def takes_groups(q_BHTK: Tensor, k_BHSK: Tensor, mask: Mask) -> bool:
    """Whether what computes attention without dropout takes fewer heads of keys as they are, and holds no scores."""
    if mask.bias is not None:
        return False
    if not q_BHTK.is_cuda:
        return True
    if mask.blocks is not None:
        # FlexAttention's form for few queries wants a power of two of them for each head of keys.
        return (q_BHTK.shape[1] // k_BHSK.shape[1]).bit_count() == 1
    if mask.causal and q_BHTK.shape[2] < k_BHSK.shape[2]:
        return False
    # FlashAttention does; what PyTorch has for masks, for fewer queries, for fp32 and for wide heads does not.
    return mask.visible is None and q_BHTK.dtype != torch.float32 and q_BHTK.shape[-1] <= LARGEST_FUSED_HEAD


def for_each_query_head(part_BHSK: Tensor, num_heads: int) -> Tensor:
    """Keys or values with as many heads as queries have; as they are where that is so."""
    return (
        part_BHSK.repeat_interleave(num_heads // part_BHSK.shape[1], 1) if part_BHSK.shape[1] < num_heads else part_BHSK
    )


def _attend_with_dropout(
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    mask: Mask,
    scale: float,
    divisor: float,
    dropout: AttentionDropout,
) -> Tensor:
    if is_fused(q_BHTK.shape[-1], q_BHTK.device, biased=mask.bias is not None):
        from megalith.layers.attend_fused import attend_fused

        words_S = number_words(k_BHSK.shape[2], device=q_BHTK.device)
        # Its scores are never stored, so they need no divisor.
        return attend_fused(
            q_BHTK,
            k_BHSK,
            v_BHSK,
            mask,
            scale=scale,
            rows_BHT=dropout.rows,
            words_S=words_S,
            probability=dropout.probability,
        )
    output: Tensor = _DroppedAttention.apply(q_BHTK, k_BHSK, v_BHSK, mask.bias, mask, scale, divisor, dropout)
    return output


def is_fused(head_width: int, device: torch.device, *, biased: bool) -> bool:
    """Whether attention with dropout is one kernel: on GPUs, by Triton, which comes with PyTorch's CUDA builds."""
    return device.type == "cuda" and not biased and head_width <= LARGEST_FUSED_HEAD and HAS_TRITON


@cache
def _compiled_flex_attention() -> Any:
    """FlexAttention; without the compiler it would hold all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


class _DroppedAttention(torch.autograd.Function):
    """Attention with dropout by counter, a bounded number of scores at a time.

    Nothing of the size of the scores is kept: the backward pass computes probabilities and dropout mask again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_BHTK: Tensor,
        k_BHSK: Tensor,
        v_BHSK: Tensor,
        bias: Tensor | None,
        mask: Mask,
        scale: float,
        divisor: float,
        dropout: AttentionDropout,
    ) -> Tensor:
        batch, heads, num_queries, head_width = q_BHTK.shape
        # Heads inside tokens in memory, as the projection that follows wants it.
        o_BHTK = q_BHTK.new_empty(batch, num_queries, heads, head_width).transpose(1, 2)
        words_S = number_words(k_BHSK.shape[2], device=q_BHTK.device)
        for part in _parts(q_BHTK, k_BHSK, mask):
            p = _probabilities(q_BHTK[part.queries], k_BHSK[part.keys], _of_part(bias, part), part, scale, divisor)
            p *= keep_mask(dropout.rows[part.queries], words_S[part.keys[2]], dropout.probability)
            o_BHTK[part.queries] = p.to(v_BHSK.dtype) @ v_BHSK[part.keys]
        o_BHTK *= 1 / (1 - dropout.probability)
        ctx.mask, ctx.scale, ctx.divisor, ctx.probability = mask, scale, divisor, dropout.probability
        ctx.save_for_backward(q_BHTK, k_BHSK, v_BHSK, bias, dropout.rows, o_BHTK)
        return o_BHTK

    @staticmethod
    def backward(ctx: Any, grad_o_BHTK: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTK, k_BHSK, v_BHSK, bias, rows_BHT, o_BHTK = ctx.saved_tensors
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None
        grad_q, grad_k, grad_v = torch.empty_like(q_BHTK), torch.zeros_like(k_BHSK), torch.zeros_like(v_BHSK)
        words_S = number_words(k_BHSK.shape[2], device=q_BHTK.device)
        # sum_s p_s grad_p_s = grad_o . o, also under dropout (Dao et al. 2022, appendix B.4).
        sums_BHT1 = (grad_o_BHTK.float() * o_BHTK.float()).sum(-1, keepdim=True)
        grad_o_BHTK = grad_o_BHTK * (1 / (1 - ctx.probability))
        for part in _parts(q_BHTK, k_BHSK, ctx.mask):
            q, k, v, grad_o = q_BHTK[part.queries], k_BHSK[part.keys], v_BHSK[part.keys], grad_o_BHTK[part.queries]
            p = _probabilities(q, k, _of_part(bias, part), part, ctx.scale, ctx.divisor)
            keep = keep_mask(rows_BHT[part.queries], words_S[part.keys[2]], ctx.probability)
            grad_v[part.keys] += (p * keep).to(v.dtype).mT @ grad_o
            grad_s = (grad_o @ v.mT).float()
            grad_s = grad_s.mul_(keep).sub_(sums_BHT1[part.queries]).mul_(p)
            if (grad_bias_HTS := _of_part(grad_bias, part)) is not None:
                grad_bias_HTS += grad_s
            grad_s = grad_s.mul_(ctx.scale).to(q.dtype)
            grad_q[part.queries] = grad_s @ k
            grad_k[part.keys] += grad_s.mT @ q
        return grad_q, grad_k, grad_v, grad_bias, None, None, None, None


class _Part(NamedTuple):
    """Some heads of one sample, some of their queries, and all keys that these may see; indices into BHTK and BHSK."""

    queries: tuple[int, slice, slice]
    keys: tuple[int, slice, slice]
    blocked: Tensor | None  # bool 1TS
    some_see_nothing: bool


def _parts(q_BHTK: Tensor, k_BHSK: Tensor, mask: Mask) -> Iterator[_Part]:
    """Parts that cover all queries, each with a bounded number of scores."""
    batch, heads, num_queries, _ = q_BHTK.shape
    num_keys = k_BHSK.shape[2]
    allowed = _SCORES_AT_ONCE["cuda" if q_BHTK.is_cuda else "cpu"]
    # In causal order half of the keys are blocked; pieces of the queries leave a part of these out.
    num_pieces = 2 if mask.causal and num_queries > 1 else 1
    queries = min(-(-num_queries // num_pieces), max(1, allowed // num_keys))
    step = max(1, min(heads, allowed // (queries * num_keys)))
    plain = mask.causal and mask.visible is None
    for first in range(0, num_queries, queries):
        rows = slice(first, min(first + queries, num_queries))
        seen = slice(0, num_keys - num_queries + rows.stop) if plain else slice(0, num_keys)
        blocked = None
        if plain:
            blocked = ~causal_order(rows.stop - rows.start, seen.stop, q_BHTK.device)[None]
        for b in range(batch):
            if mask.visible is not None:
                blocked = ~mask.visible[b if len(mask.visible) > 1 else 0, :, rows]
            for h in range(0, heads, step):
                several = slice(h, h + step)
                # In causal order every query sees itself at least.
                yield _Part((b, several, rows), (b, several, seen), blocked, not mask.causal)


def _of_part(bias: Tensor | None, part: _Part) -> Tensor | None:
    """HTS of what is added to the scores of a part; None for nothing."""
    if bias is None:
        return None
    sample, heads, queries = part.queries
    return bias[sample if len(bias) > 1 else 0, heads, queries, part.keys[2]]


def _probabilities(
    q_HTK: Tensor, k_HSK: Tensor, bias_HTS: Tensor | None, part: _Part, scale: float, divisor: float
) -> Tensor:
    """fp32 HTS: the softmax over visible keys, 0 elsewhere."""
    scores = ((q_HTK * (scale / divisor)) @ k_HSK.mT).float()
    if divisor != 1:
        scores *= divisor
    if bias_HTS is not None:
        scores += bias_HTS
    if part.blocked is None:
        return torch.softmax(scores, -1)
    p = torch.softmax(scores.masked_fill_(part.blocked, -torch.inf), -1)
    # Where nothing is visible the softmax is 0 / 0.
    return p.masked_fill_(part.blocked, 0.0) if part.some_see_nothing else p
