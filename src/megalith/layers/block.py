"""One transformer layer: attention and feed-forward, each with its norm, dropout and residual.

Shape letters: B batch, T token, S token of the encoder, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalith.layers.attention import AttentionShape, CrossAttention, SelfAttention
from megalith.layers.cache import KeyValueCache
from megalith.layers.dropout import drop
from megalith.layers.feedforward import Activation, FeedForward, Gelu
from megalith.layers.mask import Mask
from megalith.layers.norm import LayerNorm, Normalization, RMSNorm, make_norm
from megalith.layers.products import Again
from megalith.layers.random import key, number_words, on_device
from megalith.layers.rotary import Rotation


@dataclass(frozen=True)
class BlockShape:
    """What all blocks of a stack have in common."""

    attention: AttentionShape
    inner: int  # features inside the feed-forward
    gelu: Gelu
    epsilon: float  # of the norms
    attention_dropout: float
    hidden_dropout: float
    layer_scaling: bool  # keep 16-bit attention scores divided by the layer's number
    residual_after_norm: bool  # the residual is the norm's output rather than its input
    dtype: torch.dtype  # of the computation inside; the stream x may be wider
    norm_after_residual: bool = False  # norms are of the sums, not of what enters a branch
    normalization: Normalization = "LayerNorm"
    activation: Activation = "gelu"  # of the feed-forward


class Block(nn.Module):
    """x + drop(attention(norm(x))), then the same with the encoder's output, if cross, and the feed-forward.

    With norm_after_residual norm(x + drop(attention(x))), as in the original transformer (Vaswani et al. 2017).

    number: the layer's global number from 0, whatever part of the model lies here. stack: the name of the stack, which
    sets the dropout of two stacks of a model apart.

    Seam for sequence parallelism: cut(rows) gives the rows of those tokens of the stream x that are held here. Seam for
    the compiler: `put_words_on`.
    """

    def __init__(
        self,
        shape: BlockShape,
        *,
        number: int,
        stack: str,
        cross: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.stack, self.number = stack, number
        width, into, out = shape.attention.width, shape.attention.into, shape.attention.out
        divisor = float(number + 1) if shape.layer_scaling else 1.0
        dropout = shape.attention_dropout
        self.attention_norm = make_norm(shape.normalization, width, shape.epsilon, device=device)
        self.attention = SelfAttention(
            shape.attention,
            number=number,
            divisor=divisor,
            dropout=dropout,
            where=self._where("attention probabilities"),
            device=device,
        )
        self.cross_norm: nn.Module | None = None
        self.cross: CrossAttention | None = None
        if cross:
            self.cross_norm = make_norm(shape.normalization, width, shape.epsilon, device=device)
            self.cross = CrossAttention(
                shape.attention,
                divisor=divisor,
                dropout=dropout,
                where=self._where("cross-attention probabilities"),
                device=device,
            )
        self.feedforward_norm = make_norm(shape.normalization, width, shape.epsilon, device=device)
        self.feedforward = FeedForward(
            width,
            shape.inner,
            shape.gelu,
            up=into,
            down=out,
            activation=shape.activation,
            bias=shape.attention.bias,
            device=device,
        )
        self.drop_attention: int | Tensor = self._where("attention")
        self.drop_cross: int | Tensor = self._where("cross-attention")
        self.drop_feedforward: int | Tensor = self._where("feed-forward")
        self.cut: Callable[[Tensor], Tensor] | None = None
        self.feature_words: Tensor | None = None

    def forward(
        self,
        x_BTD: Tensor,
        mask: Mask,
        rows_BT: Tensor | None = None,
        *,
        cache: KeyValueCache | None = None,
        rotation: Rotation | None = None,
        memory_BSD: Tensor | None = None,
        memory_mask: Mask | None = None,
    ) -> Tensor:
        """The stream after this block, in its own type. rows_BT: None for no dropout. memory: the encoder's output.

        rotation: of the tokens' positions, None where they are known otherwise.
        """
        dtype = self.shape.dtype
        stream_rows = self.cut(rows_BT) if self.cut is not None and rows_BT is not None else rows_BT

        x_BTD, entering = self._fork(x_BTD, self.attention_norm)
        again = self._again(x_BTD, self.attention_norm)
        branch = self.attention(entering.to(dtype), mask, rows_BT, cache, again, rotation)
        x_BTD = self._add(x_BTD, entering, branch, stream_rows, self.drop_attention, self.attention_norm)

        if self.cross is not None and self.cross_norm is not None:
            assert memory_BSD is not None and memory_mask is not None
            x_BTD, entering = self._fork(x_BTD, self.cross_norm)
            branch = self.cross(entering.to(dtype), memory_BSD, memory_mask, rows_BT)
            x_BTD = self._add(x_BTD, entering, branch, stream_rows, self.drop_cross, self.cross_norm)

        x_BTD, entering = self._fork(x_BTD, self.feedforward_norm)
        branch = self.feedforward(entering.to(dtype), self._again(x_BTD, self.feedforward_norm))
        return self._add(x_BTD, entering, branch, stream_rows, self.drop_feedforward, self.feedforward_norm)

    def _fork(self, x_BTD: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """The stream, and what enters a branch."""
        if self.shape.norm_after_residual:
            return x_BTD, x_BTD
        if isinstance(norm, LayerNorm | RMSNorm) and not self.shape.residual_after_norm:
            return norm.beside(x_BTD)
        return x_BTD, norm(x_BTD)

    def _again(self, x_BTD: Tensor, norm: nn.Module) -> Again | None:
        """How what enters a branch can be made again of what is kept anyway; None where it cannot."""
        if (
            self.shape.norm_after_residual
            or x_BTD.dtype != self.shape.dtype
            or not isinstance(norm, LayerNorm | RMSNorm)
        ):
            return None
        return norm.again(x_BTD)

    def _add(
        self,
        x_BTD: Tensor,
        entered: Tensor,
        branch: Tensor,
        rows_BT: Tensor | None,
        where: int | Tensor,
        norm: nn.Module,
    ) -> Tensor:
        residual = entered if self.shape.residual_after_norm else x_BTD
        x_BTD = residual + drop(branch, rows_BT, self.shape.hidden_dropout, where, words_W=self.feature_words)
        if self.shape.norm_after_residual:
            x_BTD = norm(x_BTD)
        return x_BTD

    def put_words_on(self, device: torch.device) -> None:
        """Hold what dropout depends on as tensors, in place: for numbers the compiler would compile each layer anew."""
        self.feature_words = number_words(self.shape.attention.width, device=device)
        self.drop_attention = on_device(self.drop_attention, device)
        self.drop_cross = on_device(self.drop_cross, device)
        self.drop_feedforward = on_device(self.drop_feedforward, device)
        for attention in (self.attention, self.cross):
            if attention is not None:
                attention.where = on_device(attention.where, device)

    def _where(self, role: str) -> int:
        return key("dropout", self.stack, self.number, role)
