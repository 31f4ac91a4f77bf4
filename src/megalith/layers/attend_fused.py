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
import triton.language as tl
from torch import Tensor

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
    grid = (triton.cdiv(q.shape[2], blocks.queries), q.shape[0] * q.shape[1])
    _forward[grid](
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
    batch, heads, num_queries, width = q.shape
    for_keys, for_queries = (
        _sizes(q, k, visible_B1TS, causal, scale, probability, blocks)
        for blocks in (backward_blocks(width), queries_blocks(width))
    )
    by_queries = (triton.cdiv(num_queries, for_queries["BLOCK_T"]), batch * heads)
    by_keys = (triton.cdiv(k.shape[2], for_keys["BLOCK_S"]), batch * heads)
    products_BHT = torch.empty_like(sums_BHT)
    _row_products[by_queries](
        o_BHTK, grad_o, products_BHT, *o_BHTK.stride()[:3], *grad_o.stride()[:3], heads, num_queries,
        WIDTH=width, PADDED=for_queries["PADDED"], BLOCK_T=for_queries["BLOCK_T"],
    )  # fmt: skip
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_o.stride()[:3])
    given = (q, k, v, grad_o, sums_BHT, products_BHT, rows_BHT, words_S, *_visible(visible_B1TS, q))
    _backward_keys[by_keys](*given, grad_k, grad_v, *strides, *grad_k.stride()[:3], *grad_v.stride()[:3], **for_keys)
    _backward_queries[by_queries](*given, grad_q, *strides, *grad_q.stride()[:3], **for_queries)
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


# exp2 is one instruction; scores are scaled for it.
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _kept(rows, words, threshold):
    """Which probabilities stay: `keep_mask` of random.py, on the same words."""
    mixed = (rows[:, None] ^ words[None, :]).to(tl.uint32, bitcast=True)
    mixed = (mixed ^ (mixed >> 16)) * 0x21F0AAAD
    mixed = (mixed ^ (mixed >> 15)) * 0xD35A2D97
    return mixed.to(tl.int32, bitcast=True) >= threshold


@triton.jit
def _words_of(words, s, num_keys, beyond):
    """The words of keys, which may lie beyond the end or not."""
    return tl.load(words + s, mask=s < num_keys, other=0) if beyond else tl.load(words + s)


@triton.jit
def _seen(visible, stride_mb, stride_mt, b, t, s, num_queries, num_keys, CAUSAL, MASKED):
    """Which keys these queries see; asked only where they may not see all."""
    inside = (t[:, None] < num_queries) & (s[None, :] < num_keys)
    if MASKED:
        at = visible + b * stride_mb + t[:, None].to(tl.int64) * stride_mt + s[None, :]
        seen = inside & (tl.load(at, mask=inside, other=0) != 0)
    elif CAUSAL:
        seen = inside & (s[None, :] <= t[:, None] + (num_keys - num_queries))
    else:
        seen = inside
    return seen


@triton.jit
def _stretches(first, count, num_queries, num_keys, BLOCK_S, CAUSAL, MASKED):
    """Of the keys that these queries see: where those end that all of them see, in whole blocks; where all end."""
    place = first + (num_keys - num_queries)  # of the first query among the keys, in causal order
    end = tl.minimum(place + count, num_keys) if CAUSAL else num_keys
    whole = 0 if MASKED else (place + 1 if CAUSAL else num_keys) // BLOCK_S * BLOCK_S
    return whole, end


@triton.jit
def _within(n, count, features, WIDTH, PADDED):
    return n[:, None] < count if WIDTH == PADDED else (n[:, None] < count) & (features[None, :] < WIDTH)


@triton.jit
def _rows_at(x, stride_b, stride_h, stride_n, b, h, n, count, WIDTH, PADDED):
    """The rows n of a head, with zeros beyond the end and the width."""
    features = tl.arange(0, PADDED)
    at = x + b * stride_b + h * stride_h + n[:, None].to(tl.int64) * stride_n + features[None, :]
    return tl.load(at, mask=_within(n, count, features, WIDTH, PADDED), other=0.0)


@triton.jit
def _put_rows(x, value, stride_b, stride_h, stride_n, b, h, n, count, WIDTH, PADDED):
    features = tl.arange(0, PADDED)
    at = x + b * stride_b + h * stride_h + n[:, None].to(tl.int64) * stride_n + features[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=_within(n, count, features, WIDTH, PADDED))


@triton.jit
def _forward(
    q, k, v, o, sums, rows, words, visible, stride_mb, stride_mt,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_ot,
    heads, num_queries, num_keys, scale, threshold, kept_scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Some queries of one head over all keys that they may see; sums gets log2 of each query's sum of exponentials."""
    # In causal order the last queries see most, so they begin.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_T
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    t = first + tl.arange(0, BLOCK_T)
    q_TK = _rows_at(q, stride_qb, stride_qh, stride_qt, b, h, t, num_queries, WIDTH, PADDED)
    row_words = tl.load(rows + (b * heads + h) * num_queries + t, mask=t < num_queries, other=0)
    largest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    o_TK = tl.zeros([BLOCK_T, PADDED], tl.float32)
    whole, end = _stretches(first, BLOCK_T, num_queries, num_keys, BLOCK_S, CAUSAL, MASKED)
    # The keys that all see, then those of which some are hidden: two loops, of which only one asks.
    for hides in tl.static_range(2):
        for start in range(whole if hides else 0, end if hides else whole, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            k_SK = _rows_at(k, stride_kb, stride_kh, stride_ks, b, h, s, num_keys, WIDTH, PADDED)
            v_SK = _rows_at(v, stride_vb, stride_vh, stride_vs, b, h, s, num_keys, WIDTH, PADDED)
            kept = _kept(row_words, _words_of(words, s, num_keys, hides), threshold)
            scores = tl.dot(q_TK, tl.trans(k_SK), input_precision=PRECISION) * (scale * LOG2_E)
            if hides:
                seen = _seen(visible, stride_mb, stride_mt, b, t, s, num_queries, num_keys, CAUSAL, MASKED)
                scores = tl.where(seen, scores, float("-inf"))
            new = tl.maximum(largest, tl.max(scores, 1))
            # A query that has seen nothing yet: minus infinity less itself would be NaN.
            base = tl.where(new == float("-inf"), 0.0, new)
            shrink = tl.exp2(largest - base)
            p = tl.exp2(scores - base[:, None])
            total = total * shrink + tl.sum(p, 1)
            p = tl.where(kept, p, 0.0)
            o_TK = o_TK * shrink[:, None] + tl.dot(p.to(v_SK.dtype), v_SK, input_precision=PRECISION)
            largest = new
    saw_some = total > 0
    o_TK = tl.where(saw_some[:, None], o_TK * (kept_scale / tl.where(saw_some, total, 1.0))[:, None], 0.0)
    _put_rows(o, o_TK, stride_ob, stride_oh, stride_ot, b, h, t, num_queries, WIDTH, PADDED)
    logs = tl.where(saw_some, largest + tl.log2(tl.where(saw_some, total, 1.0)), 0.0)
    tl.store(sums + (b * heads + h) * num_queries + t, logs, mask=t < num_queries)


@triton.jit
def _row_products(
    o, grad_o, products, stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, heads, num_queries,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """o . grad_o of each query, which is sum_s p_s grad_p_s, also under dropout (Dao et al. 2022, appendix B.4)."""
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_TK = _rows_at(o, stride_ob, stride_oh, stride_ot, b, h, t, num_queries, WIDTH, PADDED)
    g_TK = _rows_at(grad_o, stride_gb, stride_gh, stride_gt, b, h, t, num_queries, WIDTH, PADDED)
    product = tl.sum(o_TK.to(tl.float32) * g_TK.to(tl.float32), 1)
    tl.store(products + (b * heads + h) * num_queries + t, product, mask=t < num_queries)


@triton.jit
def _probabilities(q_TK, k_SK, logs, scale, PRECISION):
    """TS, fp32: the softmax, of keys that are seen."""
    return tl.exp2(tl.dot(q_TK, tl.trans(k_SK), input_precision=PRECISION) * (scale * LOG2_E) - logs[:, None])


@triton.jit
def _slopes(p, kept, v_SK, g_TK, products, PRECISION):
    """The derivative by the scores, TS in fp32, without the factors `scale` and `kept_scale`."""
    grad_p = tl.dot(g_TK, tl.trans(v_SK), input_precision=PRECISION)
    return p * (tl.where(kept, grad_p, 0.0) - products[:, None])


@triton.jit
def _backward_keys(
    q, k, v, grad_o, sums, products, rows, words, visible, stride_mb, stride_mt, grad_k, grad_v,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_gb, stride_gh, stride_gt,
    stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
    heads, num_queries, num_keys, scale, threshold, kept_scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The gradients of some keys and values of one head, from all queries that see them."""
    first = tl.program_id(0) * BLOCK_S
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    s = first + tl.arange(0, BLOCK_S)
    k_SK = _rows_at(k, stride_kb, stride_kh, stride_ks, b, h, s, num_keys, WIDTH, PADDED)
    v_SK = _rows_at(v, stride_vb, stride_vh, stride_vs, b, h, s, num_keys, WIDTH, PADDED)
    column_words = tl.load(words + s, mask=s < num_keys, other=0)
    dk_SK = tl.zeros([BLOCK_S, PADDED], tl.float32)
    dv_SK = tl.zeros([BLOCK_S, PADDED], tl.float32)
    # The queries that stand at the first and at the last of these keys, in causal order.
    at_first = tl.maximum(first - (num_keys - num_queries), 0)
    at_last = tl.maximum(first + BLOCK_S - 1 - (num_keys - num_queries), 0)
    begin = at_first // BLOCK_T * BLOCK_T if CAUSAL else 0
    # From here on queries see all of these keys; queries beyond the end are zeros and add nothing.
    seen_by_all = tl.cdiv(at_last, BLOCK_T) * BLOCK_T if CAUSAL else 0
    seen_by_all = num_queries if MASKED else tl.minimum(seen_by_all, num_queries)
    for hides in tl.static_range(2):
        for start in range(begin if hides else seen_by_all, seen_by_all if hides else num_queries, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            row = (b * heads + h) * num_queries + t
            q_TK = _rows_at(q, stride_qb, stride_qh, stride_qt, b, h, t, num_queries, WIDTH, PADDED)
            g_TK = _rows_at(grad_o, stride_gb, stride_gh, stride_gt, b, h, t, num_queries, WIDTH, PADDED)
            logs = tl.load(sums + row, mask=t < num_queries, other=0.0)
            product = tl.load(products + row, mask=t < num_queries, other=0.0)
            kept = _kept(tl.load(rows + row, mask=t < num_queries, other=0), column_words, threshold)
            p = _probabilities(q_TK, k_SK, logs, scale, PRECISION)
            if hides:
                seen = _seen(visible, stride_mb, stride_mt, b, t, s, num_queries, num_keys, CAUSAL, MASKED)
                p = tl.where(seen, p, 0.0)
            slopes = _slopes(p, kept, v_SK, g_TK, product / kept_scale, PRECISION)
            dv_SK += tl.dot(tl.trans(tl.where(kept, p, 0.0)).to(g_TK.dtype), g_TK, input_precision=PRECISION)
            dk_SK += tl.dot(tl.trans(slopes).to(q_TK.dtype), q_TK, input_precision=PRECISION)
    dk_SK *= scale * kept_scale
    dv_SK *= kept_scale
    _put_rows(grad_k, dk_SK, stride_dkb, stride_dkh, stride_dks, b, h, s, num_keys, WIDTH, PADDED)
    _put_rows(grad_v, dv_SK, stride_dvb, stride_dvh, stride_dvs, b, h, s, num_keys, WIDTH, PADDED)


@triton.jit
def _backward_queries(
    q, k, v, grad_o, sums, products, rows, words, visible, stride_mb, stride_mt, grad_q,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_gb, stride_gh, stride_gt, stride_dqb, stride_dqh, stride_dqt,
    heads, num_queries, num_keys, scale, threshold, kept_scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The gradients of some queries of one head, over all keys that they see."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_T
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    t = first + tl.arange(0, BLOCK_T)
    row = (b * heads + h) * num_queries + t
    q_TK = _rows_at(q, stride_qb, stride_qh, stride_qt, b, h, t, num_queries, WIDTH, PADDED)
    g_TK = _rows_at(grad_o, stride_gb, stride_gh, stride_gt, b, h, t, num_queries, WIDTH, PADDED)
    logs = tl.load(sums + row, mask=t < num_queries, other=0.0)
    product = tl.load(products + row, mask=t < num_queries, other=0.0) / kept_scale
    row_words = tl.load(rows + row, mask=t < num_queries, other=0)
    dq_TK = tl.zeros([BLOCK_T, PADDED], tl.float32)
    whole, end = _stretches(first, BLOCK_T, num_queries, num_keys, BLOCK_S, CAUSAL, MASKED)
    for hides in tl.static_range(2):
        for start in range(whole if hides else 0, end if hides else whole, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            k_SK = _rows_at(k, stride_kb, stride_kh, stride_ks, b, h, s, num_keys, WIDTH, PADDED)
            v_SK = _rows_at(v, stride_vb, stride_vh, stride_vs, b, h, s, num_keys, WIDTH, PADDED)
            kept = _kept(row_words, _words_of(words, s, num_keys, hides), threshold)
            p = _probabilities(q_TK, k_SK, logs, scale, PRECISION)
            if hides:
                seen = _seen(visible, stride_mb, stride_mt, b, t, s, num_queries, num_keys, CAUSAL, MASKED)
                p = tl.where(seen, p, 0.0)
            slopes = _slopes(p, kept, v_SK, g_TK, product, PRECISION)
            dq_TK += tl.dot(slopes.to(k_SK.dtype), k_SK, input_precision=PRECISION)
    dq_TK *= scale * kept_scale
    _put_rows(grad_q, dq_TK, stride_dqb, stride_dqh, stride_dqt, b, h, t, num_queries, WIDTH, PADDED)
