"""Attention a block of queries at a time over the keys up to its end: with dropout, and on CPUs where that is faster.

A block's scores are one batch of products over heads and samples, small enough to stay in a processor's caches. Nothing
of the size of all scores is kept: the backward pass computes probabilities and dropout's mask again. In 16 bits scores,
probabilities and their gradients are rounded as products of 16 bits are; softmax and sums over blocks are in fp32.

Shape letters: B batch, H heads, R heads of queries that share one of keys, T query, S key, K head width, N rows of a
batch of products (samples and heads of keys).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalith.layers.mask import Mask, causal_order
from megalith.layers.products import (
    batches_by_onednn,
    is_amds,
    multiplies_batches_by_onednn,
    multiplies_bf16_without_amx,
)
from megalith.layers.random import keep_mask, number_words, ones_and_zeros

# Scores held at once: on a CPU what its caches hold, on a GPU what fills it.
_SCORES_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 27}
# Queries of a block on a CPU: more of them compute more hidden scores, fewer are more calls of a library.
_QUERIES, _MOST_QUERIES, _QUERIES_IN_16_BITS = 64, 256, 128
# What is worth a batch of products where there is no dropout, as measured (docs/LOG.md): queries, heads of all samples;
# in fp32 by oneDNN products of queries and keys, for a block is many small operations; by MKL keys and their features.
_LEAST_QUERIES, _LEAST_HEADS = 32, 4
_LEAST_PRODUCTS = 1 << 25
_LEAST_KEYS_OF_MKL, _MOST_KEYS_OF_MKL, _LEAST_WIDTH_OF_MKL = 256, 1024, 64


@dataclass(frozen=True, eq=False)
class AttentionDropout:
    """Dropout of attention probabilities."""

    probability: float
    rows: Tensor  # int32 BHT: one word per query and head


def suits_blocks(q_BHTK: Tensor, k_BHSK: Tensor) -> bool:
    """Whether attention without dropout goes by blocks, where the compiler does not choose itself."""
    batch, heads, num_queries, width = q_BHTK.shape
    if q_BHTK.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return are_faster(q_BHTK.dtype, heads=batch * heads, queries=num_queries, keys=k_BHSK.shape[2], width=width)


def are_faster(dtype: torch.dtype, *, heads: float, queries: float, keys: float, width: float) -> bool:
    """Whether blocks of attention without dropout are faster on this CPU than torch's kernel, as far as was measured.

    In bf16 where the processor has AVX-512's instructions for it, which that kernel makes no use of, but not AMX, which
    it does make use of. In fp32 on AMD's processors (docs/LOG.md). heads: of all samples. width: features of a head.
    """
    if queries < _LEAST_QUERIES or heads < _LEAST_HEADS:
        return False
    if dtype == torch.bfloat16:
        return multiplies_bf16_without_amx()
    if dtype != torch.float32 or not is_amds():
        return False
    if multiplies_batches_by_onednn():
        return heads * queries * keys * width >= _LEAST_PRODUCTS
    return _LEAST_KEYS_OF_MKL <= keys <= _MOST_KEYS_OF_MKL and width >= _LEAST_WIDTH_OF_MKL


def scores_of_a_block(dtype: torch.dtype, *, heads: float, queries: float, keys: float) -> float:
    """How many scores are held at once on a CPU. heads: of all samples."""
    rows = min(_queries_on_cpu(dtype, keys), queries)
    return min(heads * rows * keys, max(_SCORES_AT_ONCE["cpu"], rows * keys))


def attend_in_blocks(
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    mask: Mask,
    *,
    scale: float,
    divisor: float = 1.0,
    dropout: AttentionDropout | None = None,
) -> Tensor:
    """Attention of every query over its visible keys, BHTK; see `megalith.layers.attend.attend`."""
    output: Tensor = _Blocks.apply(q_BHTK, k_BHSK, v_BHSK, mask.bias, mask, scale, divisor, dropout)
    return output


class _Blocks(torch.autograd.Function):
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
        dropout: AttentionDropout | None,
    ) -> Tensor:
        batch, num_heads, num_queries, head_width = q_BHTK.shape
        rows = None if dropout is None else dropout.rows
        ctx.mask, ctx.scale, ctx.divisor = mask, scale, divisor
        ctx.probability = 0.0 if dropout is None else dropout.probability
        kept = _Kept.of(rows, ctx.probability, num_keys=k_BHSK.shape[2])
        ctx.save_for_backward(q_BHTK, k_BHSK, v_BHSK, bias, rows)
        # Heads inside tokens in memory, as the projection that follows wants it.
        o_BHTK = q_BHTK.new_empty(batch, num_queries, num_heads, head_width).transpose(1, 2)
        with batches_by_onednn(q_BHTK):
            for heads in _heads_at_once(q_BHTK, k_BHSK, mask):
                for block in _blocks(heads, mask, q_BHTK):
                    q, k, v = block.of_queries(q_BHTK), block.of_keys(k_BHSK), block.of_keys(v_BHSK)
                    p = _probabilities(q, k, block, bias, scale, divisor)
                    if kept is not None:
                        p *= kept.among(p, block)
                    o_BHTK[block.queries] = block.by_head(torch.bmm(p, v))
                    del p  # before the next block's are made
        return o_BHTK if kept is None else o_BHTK.mul_(1 / (1 - kept.probability))

    @staticmethod
    def backward(ctx: Any, grad_o_BHTK: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTK, k_BHSK, v_BHSK, bias, rows = ctx.saved_tensors
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None
        grad_q, grad_k, grad_v = (torch.empty_like(part) for part in (q_BHTK, k_BHSK, v_BHSK))
        kept = _Kept.of(rows, ctx.probability, num_keys=k_BHSK.shape[2])
        if kept is not None:
            grad_o_BHTK = grad_o_BHTK * (1 / (1 - kept.probability))
        with batches_by_onednn(q_BHTK):
            for heads in _heads_at_once(q_BHTK, k_BHSK, ctx.mask):
                sums: list[Tensor] = []  # of the gradients of keys and values
                for block in _blocks(heads, ctx.mask, q_BHTK):
                    q, k, v = block.of_queries(q_BHTK), block.of_keys(k_BHSK), block.of_keys(v_BHSK)
                    grad_o = block.of_queries(grad_o_BHTK)
                    p = dropped = _probabilities(q, k, block, bias, ctx.scale, ctx.divisor)
                    grad_p = torch.bmm(grad_o, v.mT)
                    if kept is not None:
                        ones = kept.among(p, block)
                        dropped = p * ones
                        grad_p *= ones
                        del ones
                    by_v = torch.bmm(dropped.mT, grad_o)
                    grad_s = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
                    if grad_bias is not None:
                        by_bias = block.of_scores(grad_bias)
                        by_bias += block.by_head(grad_s).sum_to_size(by_bias.shape)
                    grad_q[block.queries] = block.by_head(_times(grad_s, k, ctx.scale))
                    _add_up(sums, _times(grad_s.mT, q, ctx.scale), by_v)
                    del p, dropped, grad_p, grad_s
                grad_k[heads.keys], grad_v[heads.keys] = (total.view(grad_k[heads.keys].shape) for total in sums)
        return grad_q, grad_k, grad_v, grad_bias, None, None, None, None


@dataclass(frozen=True)
class _Heads:
    """Some heads of some samples, and the sizes of all that is computed with them."""

    samples: slice
    heads: slice  # of queries
    key_heads: slice
    shared: int  # heads of queries that share one of keys
    num_queries: int
    num_keys: int
    queries_at_once: int

    @property
    def keys(self) -> tuple[slice, slice]:
        return self.samples, self.key_heads


@dataclass(frozen=True)
class _Block:
    """Some queries of some heads and all keys that these may see, which are the first."""

    of: _Heads
    rows: slice  # of queries
    seen: int
    # 1 or B by 1TS in the type of q: minus infinity where one of the last of these keys is not seen, else 0.
    hiding: Tensor | None
    some_see_nothing: bool

    @property
    def queries(self) -> tuple[slice, slice, slice]:
        return self.of.samples, self.of.heads, self.rows

    def of_queries(self, whole_BHTK: Tensor) -> Tensor:
        """N(RT)K, contiguous, as the library multiplies it without a copy of its own."""
        part = whole_BHTK[self.queries]
        batch, heads, rows, width = part.shape
        return part.reshape(batch * heads // self.of.shared, self.of.shared * rows, width).contiguous()

    def of_keys(self, whole_BHSK: Tensor) -> Tensor:
        """NSK, contiguous."""
        return whole_BHSK[(*self.of.keys, slice(self.seen))].flatten(0, 1).contiguous()

    def of_scores(self, bias: Tensor) -> Tensor:
        """BHTS, a view: the part of a bias, 1 or B by HTS."""
        samples = self.of.samples if len(bias) > 1 else slice(None)
        return bias[samples, self.of.heads, self.rows, : self.seen]

    def by_head(self, product: Tensor) -> Tensor:
        """BHTX, a view, of N(RT)X."""
        num_rows = self.rows.stop - self.rows.start
        return product.view(-1, self.of.heads.stop - self.of.heads.start, num_rows, product.shape[-1])


@dataclass(frozen=True)
class _Kept:
    """Which probabilities dropout keeps."""

    rows: Tensor  # int32 BHT: one word per query and head
    words: Tensor  # int32 S: one per key
    probability: float

    @classmethod
    def of(cls, rows_BHT: Tensor | None, probability: float, *, num_keys: int) -> "_Kept | None":
        if rows_BHT is None:
            return None
        return cls(rows_BHT, number_words(num_keys, device=rows_BHT.device), probability)

    def among(self, p: Tensor, block: _Block) -> Tensor:
        """In the shape and type of a block's probabilities: 1 for those that stay, 0 for those that are dropped."""
        # Contiguous, so that the mask is.
        rows = self.rows[block.queries].contiguous()
        return ones_and_zeros(keep_mask(rows, self.words[: block.seen], self.probability), p.dtype).view_as(p)


def _heads_at_once(q_BHTK: Tensor, k_BHSK: Tensor, mask: Mask) -> Iterator[_Heads]:
    """All heads of all samples, as many at once as have a bounded number of scores in a block."""
    batch, heads, num_queries, _ = q_BHTK.shape
    key_heads, num_keys = k_BHSK.shape[1:3]
    allowed = _SCORES_AT_ONCE["cuda" if q_BHTK.is_cuda else "cpu"]
    if q_BHTK.is_cuda:
        # In causal order half of the keys are hidden; pieces of the queries leave a part of these out.
        queries = -(-num_queries // 2) if mask.causal else num_queries
    else:
        queries = _queries_on_cpu(q_BHTK.dtype, num_keys)
    queries = max(1, min(queries, num_queries, allowed // num_keys))
    shared = heads // key_heads
    most = max(1, allowed // (queries * num_keys * shared))  # heads of keys
    samples, step = max(1, most // key_heads), min(most, key_heads)
    for b in range(0, batch, samples):
        for h in range(0, key_heads, step):
            end = min(h + step, key_heads)
            yield _Heads(
                slice(b, min(b + samples, batch)),
                slice(h * shared, end * shared),
                slice(h, end),
                shared,
                num_queries,
                num_keys,
                queries,
            )


def _queries_on_cpu(dtype: torch.dtype, keys: float) -> int:
    """The most queries of a block."""
    if dtype != torch.float32:
        return _QUERIES_IN_16_BITS
    if not multiplies_batches_by_onednn():
        return _QUERIES
    # Where there are many keys a larger part of a block's are not hidden.
    return max(_QUERIES, min(_MOST_QUERIES, int(keys) // 8 // _QUERIES * _QUERIES))


def _blocks(heads: _Heads, mask: Mask, q_BHTK: Tensor) -> Iterator[_Block]:
    """Blocks that cover all queries, the last first: that one sees all keys."""
    in_order = None
    if mask.causal and mask.visible is None:
        order = causal_order(heads.queries_at_once, heads.queries_at_once, q_BHTK.device)
        in_order = _hiding(~order[None, None], q_BHTK.dtype)
    for first in reversed(range(0, heads.num_queries, heads.queries_at_once)):
        rows = slice(first, min(first + heads.queries_at_once, heads.num_queries))
        num_rows = rows.stop - rows.start
        if mask.visible is not None:
            samples = heads.samples if len(mask.visible) > 1 else slice(None)
            hiding = _hiding(~mask.visible[samples, :, rows], q_BHTK.dtype)
            # In causal order every query sees itself at least.
            yield _Block(heads, rows, heads.num_keys, hiding, not mask.causal)
        elif in_order is not None:
            seen = heads.num_keys - heads.num_queries + rows.stop
            yield _Block(heads, rows, seen, in_order[..., :num_rows, :num_rows], False)
        else:
            yield _Block(heads, rows, heads.num_keys, None, False)


def _hiding(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What hides scores where it is added: several times as fast on a CPU as filling them in."""
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _probabilities(q: Tensor, k: Tensor, block: _Block, bias: Tensor | None, scale: float, divisor: float) -> Tensor:
    """N(RT)S in the type of q: the softmax over visible keys, 0 elsewhere."""
    scores = _times(q, k.mT, scale / divisor)
    if divisor != 1:
        scores = scores.float().mul_(divisor)
    if bias is not None:
        scores = scores.float()
        block.by_head(scores).add_(block.of_scores(bias))
    if block.hiding is None:
        return torch.softmax(scores, -1).to(q.dtype)
    last = block.by_head(scores)[..., -block.hiding.shape[-1] :]
    if q.dtype == torch.float16:
        last.masked_fill_(block.hiding.isinf(), -torch.inf)  # for it may be infinite
    else:
        last += block.hiding
    p = torch.softmax(scores, -1).to(q.dtype)
    if block.some_see_nothing:
        # Where nothing is visible the softmax is 0 / 0.
        block.by_head(p).masked_fill_(block.hiding.isinf(), 0.0)
    return p


def _times(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """left right scale of each row of a batch, rounded once."""
    return torch.baddbmm(left.new_empty(1), left, right, beta=0, alpha=scale)


def _add_up(sums: list[Tensor], *products_NSK: Tensor) -> None:
    """Sums over blocks, NSK in fp32, of which the first sees all keys and the others the first of them."""
    if not sums:
        sums += [product.to(torch.promote_types(product.dtype, torch.float32)) for product in products_NSK]
        return
    for total, product in zip(sums, products_NSK, strict=True):
        total[:, : product.shape[1]] += product
