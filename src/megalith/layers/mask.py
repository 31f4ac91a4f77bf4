"""Which keys a query sees.

A mask is built once per batch and handed to all layers. Documents express everything but the causal order: a query sees
the keys of its own document number. Separate documents in a sample, padding (a number of its own) and the encoder's
padding in cross-attention are all this one rule.

Shape letters: B batch, T query, S key, X block of queries, Y block of keys.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


BLOCK = 128  # tokens of FlexAttention's blocks, by queries and by keys


@dataclass(frozen=True, eq=False)
class Mask:
    """What `attend` needs to know. causal: the queries are the last of the keys, and none sees keys after itself.

    visible: bool B1TS, True where the key may be seen; then it holds the causal order too and causal is only a hint.
    blocks: the same for FlexAttention, which skips blocks where nothing is visible. bias: float, 1 or B by HTS, what is
    added to scores, minus infinity where the key may not be seen.
    """

    causal: bool
    visible: Tensor | None = None
    blocks: "BlockMask | None" = None
    bias: Tensor | None = None


def make_mask(
    num_tokens: int,
    *,
    causal: bool,
    query_documents_BT: Tensor | None = None,
    key_documents_BS: Tensor | None = None,
    dense: bool = True,
) -> Mask:
    """The mask of self-attention, or of cross-attention if the keys have documents of their own.

    num_tokens: queries of a sample that are held here; a rank that holds only some of them needs to know.
    dense: keep a bool per pair of query and key. Otherwise, on CUDA, FlexAttention's blocks, which it alone can use.
    """
    if query_documents_BT is None:
        return Mask(causal)
    queries_BT = query_documents_BT
    keys_BS = queries_BT if key_documents_BS is None else key_documents_BS
    if dense or not queries_BT.is_cuda:
        visible_B1TS = queries_BT[:, None, :, None] == keys_BS[:, None, None, :]
        if causal:
            visible_B1TS = visible_B1TS & causal_order(queries_BT.shape[1], keys_BS.shape[1], queries_BT.device)
        return Mask(causal, visible=visible_B1TS)
    return Mask(causal, blocks=document_blocks(queries_BT, keys_BS, causal=causal))


def with_bias(mask: Mask, bias_1HTS: Tensor) -> Mask:
    """The mask, dense or causal alone, with a bias of the scores."""
    assert mask.blocks is None, "only a dense mask takes a bias"
    visible = mask.visible
    if visible is None and mask.causal:
        visible = causal_order(bias_1HTS.shape[2], bias_1HTS.shape[3], bias_1HTS.device)
    bias = bias_1HTS if visible is None else bias_1HTS.masked_fill(~visible, -torch.inf)
    return replace(mask, bias=bias)


def document_blocks(queries_BT: Tensor, keys_BS: Tensor, *, causal: bool) -> "BlockMask":
    """The block mask of FlexAttention for these documents, without a number for every query and key.

    A block is looked at by the least and the largest number in it. So where numbers do not follow on one another it may
    count as one with something to see though it has nothing; what is seen inside of it is asked anyway.
    """
    from torch.nn.attention.flex_attention import BlockMask

    num_queries, num_keys = queries_BT.shape[1], keys_BS.shape[1]
    ahead = num_keys - num_queries

    def same_document(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return queries_BT[b, t] == keys_BS[b, s]

    def same_document_before(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (queries_BT[b, t] == keys_BS[b, s]) & (t + ahead >= s)

    least_BX1, most_BX1 = (bound[:, :, None] for bound in _bounds(queries_BT))
    least_B1Y, most_B1Y = (bound[:, None] for bound in _bounds(keys_BS))
    some_BXY = (least_BX1 <= most_B1Y) & (least_B1Y <= most_BX1)
    all_BXY = (least_BX1 == most_B1Y) & (least_B1Y == most_BX1)
    first_X1 = torch.arange(0, num_queries, BLOCK, device=queries_BT.device)[:, None]
    first_Y = torch.arange(0, num_keys, BLOCK, device=queries_BT.device)
    all_BXY &= (first_X1 + BLOCK <= num_queries) & (first_Y + BLOCK <= num_keys)
    if causal:
        some_BXY &= (first_X1 + BLOCK).clamp(max=num_queries) - 1 + ahead >= first_Y
        all_BXY &= first_X1 + ahead >= first_Y + BLOCK - 1
    return BlockMask.from_kv_blocks(
        *_numbers_of(some_BXY & ~all_BXY),
        *_numbers_of(all_BXY),
        BLOCK_SIZE=BLOCK,
        mask_mod=same_document_before if causal else same_document,
        seq_lengths=(num_queries, num_keys),
    )


def _bounds(documents_BN: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest number in each block of tokens."""
    missing = -documents_BN.shape[1] % BLOCK
    filled_BN = torch.cat([documents_BN, documents_BN[:, -1:].expand(-1, missing)], 1)
    least_BX, most_BX = filled_BN.unflatten(1, (-1, BLOCK)).aminmax(dim=2)
    return least_BX, most_BX


def _numbers_of(blocks_BXY: Tensor) -> tuple[Tensor, Tensor]:
    """int32: how many blocks of keys each block of queries has, B1X; and all numbers of blocks, those first, B1XY."""
    numbers_BXY = blocks_BXY.int().argsort(dim=-1, descending=True, stable=True)
    return blocks_BXY.sum(-1, dtype=torch.int32)[:, None], numbers_BXY.int()[:, None]


def causal_order(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """bool TS: True where a key is not after a query, if the queries are the last of the keys."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
