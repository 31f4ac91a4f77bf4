"""Multi-head attention (Vaswani et al. 2017).

The modules know weights and heads; what is seen is in the mask, and `attend` computes. Both self-attention and
cross-attention serve decoders and encoders.

Shape letters: B batch, T query, S key, D width, H heads, K head width.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from megalith.layers.attend import attend
from megalith.layers.attend_blocks import AttentionDropout
from megalith.layers.cache import KeyValueCache
from megalith.layers.initial import Initial
from megalith.layers.linear import Linear
from megalith.layers.mask import Mask
from megalith.layers.norm import Normalization, make_norm
from megalith.layers.products import Again
from megalith.layers.random import mix, number_words, rows_for
from megalith.layers.rotary import Rotation, rotate
from megalith.layers.sixteen import has_kernels


class Attend(Protocol):
    """What computes attention, see `megalith.layers.attend.attend`."""

    def __call__(
        self,
        q_BHTK: Tensor,
        k_BHSK: Tensor,
        v_BHSK: Tensor,
        mask: Mask,
        *,
        scale: float,
        divisor: float = ...,
        dropout: AttentionDropout | None = ...,
    ) -> Tensor: ...


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of an attention and what its weights start from; the same for all layers of a model."""

    width: int
    num_heads: int
    head_width: int
    into: Initial  # weights of the projections to queries, keys and values
    out: Initial  # weight of the projection back to the width
    bias: bool = True  # of the projection back, and of the others in cross-attention
    into_bias: bool = True  # of the projection to queries, keys and values in self-attention
    num_groups: int | None = None  # heads of keys and values in self-attention; None: each head has its own
    scale: float | None = None  # what scores are multiplied by; None: one over the root of the head's width
    norm: Normalization | None = None  # of each head's queries and keys in self-attention
    epsilon: float = 1e-5  # of that norm


class _Attention(nn.Module):
    """What self- and cross-attention share: from queries, keys and values to the output.

    divisor: scores stored in 16 bits are kept divided by it (Megatron-LM's query-key layer scaling: the layer's number
    from 1). dropout: probability of dropping an attention probability; where: `key(...)` of the layer and role.

    Seams for parallelism: attend, for context parallelism and recomputation; head_offset, the global number of the
    first head held here, for tensor parallelism. How many heads are held follows from the size of the projections.
    Seams for the compiler: attend and rows_of_heads, which it is to leave alone where there is dropout.
    """

    def __init__(self, shape: AttentionShape, *, divisor: float, dropout: float, where: int) -> None:
        super().__init__()
        self.head_width = shape.head_width
        self.scale = shape.head_width**-0.5 if shape.scale is None else shape.scale
        self.divisor = divisor
        self.dropout = dropout
        self.where: int | Tensor = where
        self.attend: Attend = attend
        self.rows_of_heads = rows_of_heads
        self.head_offset = 0

    def heads_attend(
        self, q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, mask: Mask, rows_BT: Tensor | None
    ) -> Tensor:
        """BT(HK): attention of all heads held here, joined."""
        dropout = None
        if rows_BT is not None and self.dropout > 0:
            rows_BHT = self.rows_of_heads(rows_for(rows_BT, self.where), self.head_offset, q_BTHK.shape[2])
            dropout = AttentionDropout(self.dropout, rows_BHT)
        o_BHTK = self.attend(
            q_BTHK.transpose(1, 2),
            k_BSHK.transpose(1, 2),
            v_BSHK.transpose(1, 2),
            mask,
            scale=self.scale,
            divisor=self.divisor if q_BTHK.dtype != torch.float32 else 1.0,
            dropout=dropout,
        )
        return o_BHTK.transpose(1, 2).flatten(2)


def rows_of_heads(rows_BT: Tensor, first: int, num_heads: int) -> Tensor:
    """int32 BHT: one word per query and head."""
    words_H = number_words(num_heads, first=first, device=rows_BT.device)
    return mix(rows_BT[:, None, :] ^ words_H[:, None])


class SelfAttention(_Attention):
    """Attention of a sequence over itself, whose heads may share keys and values in groups.

    qkv holds, for each group in turn, its heads' query features, then its key and its value features (grouped queries,
    Ainslie et al. 2023, arXiv:2305.13245). Usually each head is a group. With q_norm and k_norm each head's queries and
    keys are normed before they turn (Dehghani et al. 2023, arXiv:2302.05442); heads share the weights of these.
    """

    def __init__(
        self,
        shape: AttentionShape,
        *,
        number: int,
        divisor: float,
        dropout: float,
        where: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape, divisor=divisor, dropout=dropout, where=where)
        joined = shape.num_heads * shape.head_width
        num_groups = shape.num_groups or shape.num_heads
        self.number = number
        self.heads_of_group = shape.num_heads // num_groups
        features = joined + 2 * num_groups * shape.head_width
        self.qkv = Linear(shape.width, features, shape.into, bias=shape.into_bias, device=device)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if shape.norm is not None:
            self.q_norm = make_norm(shape.norm, shape.head_width, shape.epsilon, device=device)
            self.k_norm = make_norm(shape.norm, shape.head_width, shape.epsilon, device=device)
        self.out = Linear(joined, shape.width, shape.out, bias=shape.bias, device=device)

    def forward(
        self,
        x_BTD: Tensor,
        mask: Mask,
        rows_BT: Tensor | None = None,
        cache: KeyValueCache | None = None,
        again: Again | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """again: how the backward pass can make x again instead of keeping it. rotation: of the tokens' positions."""
        q_BTHK, k_BSHK, v_BSHK = self._project(x_BTD, again)
        if rotation is not None:
            q_BTHK, k_BSHK = rotate(q_BTHK, rotation), rotate(k_BSHK, rotation)
        if self.q_norm is None and (rotation is not None or self.heads_of_group > 1):
            # Queries have been copied: a view of keys or values in the product would keep them a second time. Norms of
            # them keep the product anyway.
            k_BSHK, v_BSHK = k_BSHK.contiguous(), v_BSHK.contiguous()
        if cache is not None:
            k_BHSK, v_BHSK = cache.extend(self.number, k_BSHK.transpose(1, 2), v_BSHK.transpose(1, 2))
            k_BSHK, v_BSHK = k_BHSK.transpose(1, 2), v_BHSK.transpose(1, 2)
        out: Tensor = self.out(self.heads_attend(q_BTHK, k_BSHK, v_BSHK, mask, rows_BT))
        return out

    def _project(self, x_BTD: Tensor, again: Again | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, normed where there are norms."""
        joined = self.qkv.joined(x_BTD) if self.heads_of_group == 1 and has_kernels() else None
        if joined is not None:
            q, k, v = joined.heads(self.head_width)
        else:
            qkv: Tensor = self.qkv(x_BTD, again)
            parts = qkv.unflatten(-1, (-1, self.heads_of_group + 2, self.head_width))
            q, k, v = parts.split([self.heads_of_group, 1, 1], 3)
        if self.q_norm is not None and self.k_norm is not None:
            # While they are views: the heads of several groups come together in a copy.
            q, k = self.q_norm(q), self.k_norm(k)
        q_BTHK, k_BTHK, v_BTHK = (part.flatten(2, -2) for part in (q, k, v))
        return q_BTHK, k_BTHK, v_BTHK


class CrossAttention(_Attention):
    """Attention of a decoder's sequence over an encoder's output. key_value holds each head's key, then its value."""

    def __init__(
        self,
        shape: AttentionShape,
        *,
        divisor: float,
        dropout: float,
        where: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape, divisor=divisor, dropout=dropout, where=where)
        joined = shape.num_heads * shape.head_width
        self.query = Linear(shape.width, joined, shape.into, bias=shape.bias, device=device)
        self.key_value = Linear(shape.width, 2 * joined, shape.into, bias=shape.bias, device=device)
        self.out = Linear(joined, shape.width, shape.out, bias=shape.bias, device=device)

    def forward(self, x_BTD: Tensor, memory_BSD: Tensor, mask: Mask, rows_BT: Tensor | None = None) -> Tensor:
        query: Tensor = self.query(x_BTD)
        key_value: Tensor = self.key_value(memory_BSD)
        k_BSHK, v_BSHK = key_value.unflatten(-1, (-1, 2, self.head_width)).unbind(3)
        q_BTHK = query.unflatten(-1, (-1, self.head_width))
        out: Tensor = self.out(self.heads_attend(q_BTHK, k_BSHK, v_BSHK, mask, rows_BT))
        return out
