"""What all models have in common: blocks by their number, what enters and leaves them, and the scores of tokens.

Shape letters: B batch, T token, D width, V vocabulary (padded).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalith.layers.block import Block
from megalith.layers.dropout import drop
from megalith.layers.embedding import Embedding
from megalith.layers.linear import Linear
from megalith.layers.loss import per_token_losses, vocabulary_cross_entropy
from megalith.layers.mask import Mask, make_mask
from megalith.layers.norm import make_norm
from megalith.models.settings import ModelConfig
from megalith.models.shape import block_shape, normalization_of, shape_of


def run_whole(blocks: Sequence[nn.Module], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run blocks one after the other and keep what their backward passes need. args: the mask, the dropout rows."""
    for block in blocks:
        x = block(x, *args, **kwargs)
    return x


def score_tokens(hidden_BTD: Tensor, table_VD: Tensor, *, bias_V: Tensor | None = None) -> Tensor:
    """BTV: the product of every token's features with every row of the table, and the bias added."""
    return F.linear(hidden_BTD, table_VD.to(hidden_BTD.dtype), None if bias_V is None else bias_V.to(hidden_BTD.dtype))


class Transformer(nn.Module):
    """A model made of blocks, or a part of one; each kind says what stands in front of the blocks and behind them.

    Parameters are not initialised: `draw_weights` or a checkpoint fills them. They are named by the layer's number in
    the whole model, also where only a part is held. Of every kind's settings layers limits the blocks, first says
    whether the embeddings are here, last whether the final norm and the output are (a tied table is then here as well).

    dtype: of the computation; the stream between blocks is in fp32 if fp32_residual_connection.

    Seams for parallelism: run_blocks(blocks, x, ...) runs blocks, for recomputation; mask_for makes the mask; cut(rows)
    gives the rows of those tokens of the stream that are held here.
    """

    final_norm: nn.Module

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, first: bool, last: bool) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.first, self.last = first, last
        self.run_blocks: Callable[..., Tensor] = run_whole
        self.mask_for: Callable[..., Mask] = make_mask
        self.cut: Callable[[Tensor], Tensor] | None = None

    def make_blocks(
        self,
        numbers: Iterable[int] | None,
        *,
        stack: str = "layers",
        cross: bool = False,
        device: torch.device | str | None,
    ) -> nn.ModuleDict:
        """The blocks with these numbers, None: all of a stack. stack: its name, which sets its dropout apart."""
        shape = block_shape(self.config, self.dtype)
        numbers = range(shape_of(self.config).num_layers) if numbers is None else numbers
        return nn.ModuleDict({str(n): Block(shape, number=n, stack=stack, cross=cross, device=device) for n in numbers})

    def make_norm(self, *, device: torch.device | str | None) -> nn.Module:
        """A norm of the stream."""
        width, epsilon = shape_of(self.config).width, self.config.layernorm_epsilon
        return make_norm(normalization_of(self.config), width, epsilon, device=device)

    def drops_scores(self, rows_BT: Tensor | None) -> bool:
        """Whether attention drops scores, which wants a mask that holds all of them."""
        return rows_BT is not None and self.config.attention_dropout > 0

    def in_stream_type(self, x_BTD: Tensor) -> Tensor:
        """Embeddings in the type of the stream between blocks."""
        return x_BTD if self.config.fp32_residual_connection else x_BTD.to(self.dtype)

    def entering(self, x_BTD: Tensor, rows_BT: Tensor | None, where: int) -> Tensor:
        """The stream that enters the first block, from embeddings. where: `key(...)` of their dropout."""
        if self.cut is not None and rows_BT is not None:
            rows_BT = self.cut(rows_BT)
        return drop(self.in_stream_type(x_BTD), rows_BT, self.config.hidden_dropout, where)

    def hidden(self, x_BTD: Tensor) -> Tensor:
        """BTD: what heads read, from the stream after the last block."""
        hidden_BTD: Tensor = self.final_norm(x_BTD).to(self.dtype)
        return hidden_BTD


class LanguageModel(Transformer):
    """A transformer over tokens, which are scored by the table that embeds them, or by one of the output's own.

    Seams for parallelism beside those of `Transformer`: score projects to the vocabulary; cross_entropy is the loss
    over it.
    """

    word_embedding: Embedding
    output: Linear

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, first: bool, last: bool) -> None:
        super().__init__(config, dtype=dtype, first=first, last=last)
        self.tied = not config.untie_embeddings_and_output_weights
        self.score: Callable[..., Tensor] = score_tokens
        self.cross_entropy: Callable[..., Tensor] = vocabulary_cross_entropy

    def places(self, tokens_BT: Tensor) -> Tensor:
        """int64 1T, or BT where ranks share the tokens out: the place of each token in its sequence."""
        places_1T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        return places_1T if self.cut is None else places_1T.expand_as(tokens_BT)

    @property
    def output_table(self) -> nn.Parameter:
        """VD: the table that scores tokens."""
        return self.word_embedding.weight if self.tied else self.output.weight

    @property
    def token_bias(self) -> Tensor | None:
        """V: what is added to the scores of tokens."""
        return None

    def features(self, hidden_BTD: Tensor) -> Tensor:
        """BTD: what the table scores, from hidden states."""
        return hidden_BTD

    def token_scores(self, hidden_BTD: Tensor) -> Tensor:
        """BTV: scores of the token of every place, from hidden states."""
        return self.score(self.features(hidden_BTD), self.output_table, bias_V=self.token_bias)

    def token_loss(
        self, hidden_BTD: Tensor, labels_BT: Tensor, loss_weights_BT: Tensor, *, table_VD: Tensor | None = None
    ) -> Tensor:
        """The fp32 sum over tokens of loss weight times cross entropy. table: what scores them, None: output_table."""
        return self.cross_entropy(
            self.features(hidden_BTD),
            self.output_table if table_VD is None else table_VD,
            labels_BT,
            loss_weights_BT,
            bias_V=self.token_bias,
            softmax_in_16_bit=self.config.fp16_lm_cross_entropy,
        )

    @torch.no_grad()
    def token_losses(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """fp32 BT: the cross entropy of every token, from hidden states, without gradients."""
        return per_token_losses(
            self.features(hidden_BTD),
            self.output_table,
            labels_BT,
            bias_V=self.token_bias,
            softmax_in_16_bit=self.config.fp16_lm_cross_entropy,
        )
