"""GPT: a stack of causal blocks between a table of tokens and the same table again.

Shape letters: B batch, T token, D width, V vocabulary (padded).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from megalith.layers.cache import KeyValueCache
from megalith.layers.embedding import Embedding
from megalith.layers.linear import Linear
from megalith.layers.random import key
from megalith.layers.rotary import rotation_at
from megalith.models.settings import ModelConfig
from megalith.models.shape import initial_weights, rotary_width, shape_of
from megalith.models.transformer import LanguageModel


class Decoder(LanguageModel):
    """A decoder-only transformer (GPT-2, Radford et al. 2019), with Megatron-LM's options, Llama's among them.

    Positions are rows of a table, or angles by which queries and keys turn: then there is none.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        layers: Iterable[int] | None = None,
        first: bool = True,
        last: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config, dtype=dtype, first=first, last=last)
        shape = shape_of(config)
        table, _ = initial_weights(config)
        self.rotary = rotary_width(config)
        if first or (last and self.tied):
            self.word_embedding = Embedding(vocab_size, shape.width, table, device=device)
        if first and not self.rotary:
            self.position_embedding = Embedding(shape.num_positions, shape.width, table, device=device)
        self.layers = self.make_blocks(layers, device=device)
        if last:
            self.final_norm = self.make_norm(device=device)
            if not self.tied:
                self.output = Linear(shape.width, vocab_size, table, bias=False, device=device)

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
            return self.token_scores(self.hidden(x_BTD))
        assert loss_weights is not None, "labels come with loss weights"
        return self.token_loss(self.hidden(x_BTD), labels, loss_weights, table_VD=table_VD)

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
        num_tokens = positions_BT.shape[1]
        if cache is not None:
            mask = cache.mask(num_tokens)
        else:
            dense = self.drops_scores(rows)
            mask = self.mask_for(num_tokens, causal=True, query_documents_BT=documents, dense=dense)
        rotation = None
        if self.rotary:
            stretch = self.config.rope_scaling_factor if self.config.use_rope_scaling else 1.0
            rotation = rotation_at(positions_BT, width=self.rotary, base=self.config.rotary_base, stretch=stretch)
        return self.run_blocks(list(self.layers.values()), x_BTD, mask, rows, cache=cache, rotation=rotation)

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor, rows_BT: Tensor | None) -> Tensor:
        """BTD: the stream that enters the first block."""
        return self._embedded(self.word_embedding(tokens_BT), positions_BT, rows_BT)

    def _embedded(self, looked_up_BTD: Tensor, positions_BT: Tensor, rows_BT: Tensor | None) -> Tensor:
        x_BTD = looked_up_BTD if self.rotary else looked_up_BTD + self.position_embedding(positions_BT)
        return self.entering(x_BTD, rows_BT, key("dropout", "embedding"))
