"""GPT: a stack of causal blocks between a table of tokens and the same table again.

Shape letters: B batch, T token, D width, V vocabulary (padded).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalith.layers.block import Block
from megalith.layers.cache import KeyValueCache
from megalith.layers.dropout import drop
from megalith.layers.embedding import Embedding
from megalith.layers.linear import Linear
from megalith.layers.loss import per_token_losses, vocabulary_cross_entropy
from megalith.layers.mask import Mask, make_mask
from megalith.layers.norm import LayerNorm
from megalith.layers.random import key
from megalith.models.settings import ModelConfig
from megalith.models.shape import block_shape, initial_weights, shape_of


def run_whole(blocks: Sequence[nn.Module], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run blocks one after the other and keep what their backward passes need. args: the mask, the dropout rows."""
    for block in blocks:
        x = block(x, *args, **kwargs)
    return x


class Decoder(nn.Module):
    """A decoder-only transformer (GPT-2, Radford et al. 2019), with Megatron-LM's options.

    Parameters are not initialised: `draw_weights` or a checkpoint fills them. They are named by the layer's number in
    the whole model, also where only a part is held: layers limits the blocks, first says whether the embeddings are
    here, last whether the final norm and the output are (the tied table is then here as well).

    dtype: of the computation; the stream between blocks is in fp32 if fp32_residual_connection.

    Seams for parallelism: run_blocks(blocks, x, ...) runs blocks, for recomputation; mask_for makes the mask; cut(rows)
    gives the rows of those tokens of the stream that are held here; score projects to the vocabulary; cross_entropy is
    the loss over it.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        untie_embeddings_and_output_weights: bool = False,
        layers: Iterable[int] | None = None,
        first: bool = True,
        last: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        device = None if device is None else torch.device(device)
        shape = shape_of(config)
        table, _ = initial_weights(config)
        common = block_shape(config, dtype)
        self.config = config
        self.first, self.last, self.tied = first, last, not untie_embeddings_and_output_weights
        self.dtype = dtype
        if first or (last and self.tied):
            self.word_embedding = Embedding(vocab_size, shape.width, table, device=device)
        if first:
            self.position_embedding = Embedding(shape.num_positions, shape.width, table, device=device)
        numbers = range(shape.num_layers) if layers is None else layers
        self.layers = nn.ModuleDict(
            {str(number): Block(common, number=number, stack="layers", device=device) for number in numbers}
        )
        if last:
            self.final_norm = LayerNorm(shape.width, config.layernorm_epsilon, device=device)
            if not self.tied:
                self.output = Linear(shape.width, vocab_size, table, bias=False, device=device)
        self.run_blocks: Callable[..., Tensor] = run_whole
        self.mask_for: Callable[..., Mask] = make_mask
        self.cut: Callable[[Tensor], Tensor] | None = None
        self.score: Callable[..., Tensor] = score_tokens
        self.cross_entropy: Callable[..., Tensor] = vocabulary_cross_entropy

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        *,
        documents: Tensor | None = None,
        rows: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Logits BTV, or with labels the fp32 sum over tokens of loss weight times cross entropy.

        documents: int BT, attention stays inside a document; None: it sees everything before. rows: int32 BT from
        `dropout_rows`; None: no dropout. cache: the tokens go behind those that it holds; the caller advances it.
        A part of a model that is not first takes the stream BTD for tokens; one that is not last returns it.
        """
        table_VD: Tensor | None = None
        if labels is not None and self.first and self.last and self.tied:
            looked_up_BTD, table_VD = self.word_embedding.look_up_and_share(tokens_BT)
            x_BTD = self._embedded(looked_up_BTD, positions_BT, rows)
            del looked_up_BTD
            x_BTD = self._through_blocks(x_BTD, positions_BT, documents, rows, cache)
        else:
            x_BTD = self.stream(tokens_BT, positions_BT, documents=documents, rows=rows, cache=cache)
        if not self.last:
            return x_BTD
        if labels is None:
            return self.logits(x_BTD)
        assert loss_weights is not None, "labels come with loss weights"
        return self.cross_entropy(
            self.final_norm(x_BTD).to(self.dtype),
            self.output_table if table_VD is None else table_VD,
            labels,
            loss_weights,
            softmax_in_16_bit=self.config.fp16_lm_cross_entropy,
        )

    def stream(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        *,
        documents: Tensor | None = None,
        rows: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """BTD: what the last block held here gives."""
        x_BTD = self.embed(tokens_BT, positions_BT, rows) if self.first else tokens_BT
        return self._through_blocks(x_BTD, positions_BT, documents, rows, cache)

    def _through_blocks(
        self,
        x_BTD: Tensor,
        positions_BT: Tensor,
        documents: Tensor | None,
        rows: Tensor | None,
        cache: KeyValueCache | None,
    ) -> Tensor:
        if cache is not None:
            mask = cache.mask(positions_BT.shape[1])
        else:
            drops_scores = rows is not None and self.config.attention_dropout > 0
            num_tokens = positions_BT.shape[1]
            mask = self.mask_for(num_tokens, causal=True, query_documents_BT=documents, dense=drops_scores)
        return self.run_blocks(list(self.layers.values()), x_BTD, mask, rows, cache=cache)

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor, rows_BT: Tensor | None) -> Tensor:
        """BTD: the stream that enters the first block."""
        return self._embedded(self.word_embedding(tokens_BT), positions_BT, rows_BT)

    def _embedded(self, looked_up_BTD: Tensor, positions_BT: Tensor, rows_BT: Tensor | None) -> Tensor:
        x_BTD: Tensor = looked_up_BTD + self.position_embedding(positions_BT)
        if not self.config.fp32_residual_connection:
            x_BTD = x_BTD.to(self.dtype)
        if self.cut is not None and rows_BT is not None:
            rows_BT = self.cut(rows_BT)
        return drop(x_BTD, rows_BT, self.config.hidden_dropout, key("dropout", "embedding"))

    def logits(self, x_BTD: Tensor) -> Tensor:
        """BTV: scores of the next token from the stream after the last block."""
        hidden_BTD = self.final_norm(x_BTD).to(self.dtype)
        return self.score(hidden_BTD, self.output_table)

    @property
    def output_table(self) -> nn.Parameter:
        """VD: the table that scores tokens."""
        table: nn.Parameter = self.word_embedding.weight if self.tied else self.output.weight
        return table

    @torch.no_grad()
    def token_losses(
        self, tokens_BT: Tensor, positions_BT: Tensor, labels_BT: Tensor, *, documents: Tensor | None = None
    ) -> Tensor:
        """fp32 BT: the cross entropy of every token, without dropout and gradients."""
        hidden_BTD = self.final_norm(self.stream(tokens_BT, positions_BT, documents=documents)).to(self.dtype)
        return per_token_losses(
            hidden_BTD, self.output_table, labels_BT, softmax_in_16_bit=self.config.fp16_lm_cross_entropy
        )


def score_tokens(hidden_BTD: Tensor, table_VD: Tensor, *, bias_V: Tensor | None = None) -> Tensor:
    """BTV: the product of every token's features with every row of the table, and the bias added."""
    return F.linear(hidden_BTD, table_VD.to(hidden_BTD.dtype), None if bias_V is None else bias_V.to(hidden_BTD.dtype))


def num_parameters(model: nn.Module) -> int:
    """Elements of all parameters held here; a tied table counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
