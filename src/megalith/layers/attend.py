"""softmax(q k^T) v in the forms that the mask and dropout ask for.

Blocked scores count as minus infinity in all of them. A query that sees no key at all gets 0. There may be fewer heads
of keys and values than of queries, of which as many stand one after the other as share one (grouped queries).

Shape letters: B batch, H heads (of keys and values: perhaps fewer), T query, S key, K head width.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalith.kernels import HAS_TRITON
from megalith.layers.attend_blocks import AttentionDropout, attend_in_blocks, suits_blocks
from megalith.layers.mask import Mask, causal_order
from megalith.layers.random import number_words

LARGEST_FUSED_HEAD = 256  # features; wider heads do not fit a multiprocessor's shared memory


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
    that they fit fp16; it matters only where scores are stored in that type, that is with dropout.
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
    if suits_blocks(q_BHTK, k_BHSK):
        return attend_in_blocks(q_BHTK, k_BHSK, v_BHSK, mask, scale=scale)
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
    return attend_in_blocks(q_BHTK, k_BHSK, v_BHSK, mask, scale=scale, divisor=divisor, dropout=dropout)


def is_fused(head_width: int, device: torch.device, *, biased: bool) -> bool:
    """Whether attention with dropout is one kernel: on GPUs, by Triton, which comes with PyTorch's CUDA builds."""
    return device.type == "cuda" and not biased and head_width <= LARGEST_FUSED_HEAD and HAS_TRITON


@cache
def _compiled_flex_attention() -> Any:
    """FlexAttention; without the compiler it would hold all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
