"""Attention with dropout by counter in one pass over the keys, for GPUs: no score and no mask is ever stored.

Triton kernels after the online softmax of FlashAttention-2 (Dao 2023, arXiv:2307.08691); PyTorch's own fused attention
draws its dropout from a generator's stream, which neither restarts nor layouts keep. Dropout is decided by the very
words that the plain form in attend.py uses, so both drop the same probabilities, bit for bit. The backward pass
computes scores and dropout again: once for the gradients of keys and values, once for that of the queries.

Shape letters: B batch, H heads, T query, S key, K head width. Loaded only where it is used: Triton comes with PyTorch's
CUDA builds. With TRITON_INTERPRET=1 the same kernels run on the CPU.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from megalith.layers.attend_kernels import (
    attend_backward_keys,
    attend_backward_queries,
    attend_forward,
    attend_row_products,
)
from megalith.layers.mask import Mask


class Blocks(NamedTuple):
    """Queries and keys handled at a time by one program, its warps, and loads in flight."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most: so that a multiprocessor holds one program more


def forward_blocks(head_width: int) -> Blocks:
    """Sizes for the forward pass."""
    return (
        Blocks(64, 64, 4, 2, 128)
        if head_width <= 64
        else Blocks(128, 64, 8, 2)
        if head_width <= 128
        else Blocks(64, 32, 8, 2)
    )


def backward_blocks(head_width: int) -> Blocks:
    """Sizes for the backward pass, which holds more at a time."""
    return (
        Blocks(64, 64, 4, 2)
        if head_width <= 64
        else Blocks(64, 64, 8, 1)
        if head_width <= 128
        else Blocks(32, 32, 8, 1)
    )


def queries_blocks(head_width: int) -> Blocks:
    """Sizes for the gradients of queries."""
    return backward_blocks(head_width)._replace(registers=168 if head_width <= 64 else None)


def attend_fused(
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    mask: Mask,
    *,
    scale: float,
    rows_BHT: Tensor,
    words_S: Tensor,
    probability: float,
) -> Tensor:
    """softmax(scale q k^T) with dropout, times v: BHTK, heads inside tokens in memory; 0 for a query that sees nothing.

    rows_BHT, words_S: int32, what `keep_mask` takes. mask: causal, or visible, not blocks. Scores are fp32 throughout.
    """
    assert mask.blocks is None and not (mask.causal and q_BHTK.shape[2] > k_BHSK.shape[2])
    visible = mask.visible
    if visible is not None and visible.stride(-1) != 1:
        visible = visible.contiguous()
    rows = rows_BHT.contiguous()
    output: Tensor = _attend(q_BHTK, k_BHSK, v_BHSK, visible, rows, words_S, mask.causal, scale, probability)[0]
    return output


# Operators of torch, and not plain functions, so that the compiler passes over them within one graph.
@torch.library.custom_op("megalith::attend_with_dropout", mutates_args=())
def _attend(
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    visible_B1TS: Tensor | None,
    rows_BHT: Tensor,
    words_S: Tensor,
    causal: bool,
    scale: float,
    probability: float,
) -> tuple[Tensor, Tensor]:
    """What `attend_fused` gives, and log2 of each query's sum of exponentials, BHT."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BHTK, k_BHSK, v_BHSK))
    o, sums_BHT = _made_by_forward(q, rows_BHT)
    blocks = forward_blocks(q.shape[-1])
    grid = _grid(q, q.shape[2], blocks.queries)
    attend_forward[grid](
        q, k, v, o, sums_BHT, rows_BHT, words_S, *_visible(visible_B1TS, q),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3],
        **_sizes(q, k, visible_B1TS, causal, scale, probability, blocks),
    )  # fmt: skip
    return o, sums_BHT


@_attend.register_fake
def _(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, visible: Any, rows_BHT: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _made_by_forward(q_BHTK, rows_BHT)


def _made_by_forward(q_BHTK: Tensor, rows_BHT: Tensor) -> tuple[Tensor, Tensor]:
    return _heads_inside(q_BHTK), torch.empty_like(rows_BHT, dtype=torch.float32)


@torch.library.custom_op("megalith::attend_with_dropout_backward", mutates_args=())
def _attend_backward(
    grad_o_BHTK: Tensor,
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    o_BHTK: Tensor,
    sums_BHT: Tensor,
    visible_B1TS: Tensor | None,
    rows_BHT: Tensor,
    words_S: Tensor,
    causal: bool,
    scale: float,
    probability: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values."""
    grad_o, q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (grad_o_BHTK, q_BHTK, k_BHSK, v_BHSK))
    grad_q, grad_k, grad_v = (_heads_inside(x) for x in (q, k, v))
    _, heads, num_queries, width = q.shape
    for_keys, for_queries = (
        _sizes(q, k, visible_B1TS, causal, scale, probability, blocks)
        for blocks in (backward_blocks(width), queries_blocks(width))
    )
    by_queries = _grid(q, num_queries, for_queries["BLOCK_T"])
    by_keys = _grid(q, k.shape[2], for_keys["BLOCK_S"])
    products_BHT = torch.empty_like(sums_BHT)
    attend_row_products[by_queries](
        o_BHTK, grad_o, products_BHT, *o_BHTK.stride()[:3], *grad_o.stride()[:3], heads, num_queries,
        WIDTH=width, PADDED=for_queries["PADDED"], BLOCK_T=for_queries["BLOCK_T"],
    )  # fmt: skip
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_o.stride()[:3])
    given = (q, k, v, grad_o, sums_BHT, products_BHT, rows_BHT, words_S, *_visible(visible_B1TS, q))
    attend_backward_keys[by_keys](
        *given, grad_k, grad_v, *strides, *grad_k.stride()[:3], *grad_v.stride()[:3], **for_keys
    )
    attend_backward_queries[by_queries](*given, grad_q, *strides, *grad_q.stride()[:3], **for_queries)
    return grad_q, grad_k, grad_v


@_attend_backward.register_fake
def _(grad_o: Tensor, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _heads_inside(q_BHTK), _heads_inside(k_BHSK), _heads_inside(v_BHSK)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, visible, rows, words, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, visible, rows, words)


def _differentiate(ctx: Any, grad_o: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_attend_backward(grad_o, *ctx.saved_tensors, *ctx.numbers), *(6 * [None])


_attend.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _grid(q_BHTK: Tensor, count: int, block: int) -> tuple[int, int, int]:
    """A program for each block of so many queries or keys, each head and each sample.

    Heads and samples have an axis each, for CUDA takes no more than 65,535 of any but the first.
    """
    return triton.cdiv(count, block), q_BHTK.shape[1], q_BHTK.shape[0]


def _heads_inside(x_BHTK: Tensor) -> Tensor:
    """Room of this shape with the heads of a token side by side, as the projections want it."""
    batch, heads, tokens, width = x_BHTK.shape
    return x_BHTK.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _visible(visible_B1TS: Tensor | None, anything: Tensor) -> tuple[Tensor, int, int]:
    """What may be seen, with its strides by sample and query; any tensor where the causal order says it all."""
    if visible_B1TS is None:
        return anything, 0, 0
    bytes_B1TS = visible_B1TS.view(torch.uint8)  # here and not before: Inductor (torch 2.11) knows no such view
    return bytes_B1TS, visible_B1TS.stride(0) if len(visible_B1TS) > 1 else 0, visible_B1TS.stride(2)


def _sizes(
    q: Tensor, k: Tensor, visible: Tensor | None, causal: bool, scale: float, probability: float, blocks: Blocks
) -> dict[str, Any]:
    width = q.shape[-1]
    return {
        "heads": q.shape[1],
        "num_queries": q.shape[2],
        "num_keys": k.shape[2],
        "scale": scale,
        "threshold": round(probability * 2**32) - 2**31,
        "kept_scale": 1 / (1 - probability),
        "WIDTH": width,
        "PADDED": max(16, 1 << math.ceil(math.log2(width))),
        "CAUSAL": causal,
        "MASKED": visible is not None,
        # Products of fp32 heads are not rounded to the 19 bits of tf32.
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "BLOCK_T": blocks.queries,
        "BLOCK_S": blocks.keys,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        "maxnreg": blocks.registers,
    }
