"""The kernels of attention with dropout, in Triton; attend_fused.py starts them and tells what they are after.

Shape letters: T query, S key, K head width, of what one program holds at a time. A stride is named for its tensor and
for what it steps over: b a sample, h a head, t a query, s a key.
"""

import triton
import triton.language as tl

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
def _sample_and_head():
    """Those of this program, in 64 bits: strides times them may be more than 32 hold."""
    return tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)


@triton.jit
def _first_query(BLOCK_T):
    """Of this program's block. In causal order the last queries see most, so they begin."""
    return (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_T


@triton.jit
def attend_forward(
    q, k, v, o, sums, rows, words, visible, stride_mb, stride_mt,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_ot,
    heads, num_queries, num_keys, scale, threshold, kept_scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Some queries of one head over all keys that they may see; sums gets log2 of each query's sum of exponentials."""
    first = _first_query(BLOCK_T)
    b, h = _sample_and_head()
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
def attend_row_products(
    o, grad_o, products, stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, heads, num_queries,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """o . grad_o of each query, which is sum_s p_s grad_p_s, also under dropout (Dao et al. 2022, appendix B.4)."""
    b, h = _sample_and_head()
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
def attend_backward_keys(
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
    b, h = _sample_and_head()
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
def attend_backward_queries(
    q, k, v, grad_o, sums, products, rows, words, visible, stride_mb, stride_mt, grad_q,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_gb, stride_gh, stride_gt, stride_dqb, stride_dqh, stride_dqt,
    heads, num_queries, num_keys, scale, threshold, kept_scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The gradients of some queries of one head, over all keys that they see."""
    first = _first_query(BLOCK_T)
    b, h = _sample_and_head()
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
