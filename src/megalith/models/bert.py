"""BERT: a stack of blocks without order that guesses hidden tokens, and which of two parts of a text came first.

Shape letters: B batch, T token, D width, V vocabulary (padded), C class.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalith.layers.dropout import drop
from megalith.layers.embedding import Embedding
from megalith.layers.feedforward import Gelu, gelu
from megalith.layers.initial import ZEROS
from megalith.layers.linear import Linear
from megalith.layers.norm import LayerNorm
from megalith.layers.random import key
from megalith.models.settings import ModelConfig
from megalith.models.shape import initial_weights, shape_of
from megalith.models.transformer import LanguageModel

NUM_TOKEN_TYPES = 2  # first and second part of a text

# pretraining: tokens, and the order of two parts unless bert_binary_head is off. classification: one class per text.
# None: no pooler either, the hidden states are what is wanted.
Head = Literal["pretraining", "classification"]


class Bert(LanguageModel):
    """A transformer that sees both ways (BERT, Devlin et al. 2018, arXiv:1810.04805), with Megatron-LM's options.

    With head None it is an encoder alone, for models that are made of encoders: `forward` without labels gives the
    hidden states after the final norm, of which [CLS] is place 0; there is no pooler and no head. stack: a name of
    its own for each encoder of a model, which sets their dropout apart. token_types: whether there is a table of them;
    None: where two parts of a text are told apart, that is unless bert_binary_head is off.

    num_classes: of a classification. With norm_after_residual the norms are where the original has them: after the
    embeddings and after every sum, so there is no final one. layers, first, last, dtype and the seams: as for
    `LanguageModel`; first_token gives the hidden state of place 0 from those of the tokens that are held here.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        head: Head | None = "pretraining",
        num_classes: int = 0,
        stack: str = "layers",
        token_types: bool | None = None,
        layers: Iterable[int] | None = None,
        first: bool = True,
        last: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config, dtype=dtype, first=first, last=last)
        width = shape_of(config).width
        inner, _ = initial_weights(config)
        if first or (last and head == "pretraining"):
            self.word_embedding = Embedding(vocab_size, width, inner, device=device)
        if first:
            self.position_embedding = Embedding(shape_of(config).num_positions, width, inner, device=device)
            if config.bert_binary_head if token_types is None else token_types:
                self.token_type_embedding = Embedding(NUM_TOKEN_TYPES, width, inner, device=device)
            if config.norm_after_residual:
                self.embedding_norm = self.make_norm(device=device)
        self.layers = self.make_blocks(layers, stack=stack, device=device)
        if last and not config.norm_after_residual:
            self.final_norm = self.make_norm(device=device)
        if last and (head == "classification" or (head == "pretraining" and config.bert_binary_head)):
            self.pooler = Linear(width, width, inner, device=device)
        if last and head == "pretraining":
            self.lm_head = TokenHead(config, vocab_size, device=device)
            if config.bert_binary_head:
                self.binary_head = Linear(width, 2, inner, device=device)
        if last and head == "classification":
            self.classification_head = Linear(width, num_classes, inner, device=device)
        self._drop_embedding = key("dropout", stack, "embedding")
        self._drop_pooled = key("dropout", stack, "pooled")
        self.first_token: Callable[[Tensor], Tensor] = take_first

    def forward(
        self,
        tokens_BT: Tensor,
        types_BT: Tensor,
        *,
        padding: Tensor,
        rows: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        order: Tensor | None = None,
        order_weights: Tensor | None = None,
        classes: Tensor | None = None,
        class_weights: Tensor | None = None,
    ) -> Tensor:
        """Hidden states BTD, or with labels the vector of fp32 sums of weight times cross entropy.

        The sums are those of the heads: over tokens, and over texts if there is a binary head; with classes, over texts
        of the loss and of whether the likeliest class is right. padding: int BT, 1 where a token is real and 0 behind
        the text's end; real tokens see real tokens only. labels: int64 BT. order: int64 B, 1 where the parts are
        swapped. classes: int64 B. rows: int32 BT from `dropout_rows`; None: no dropout. A part of a model that is not
        first takes the stream BTD for tokens; one that is not last returns it.
        """
        x_BTD = self.embed(tokens_BT, types_BT, rows) if self.first else tokens_BT
        dense = self.drops_scores(rows)
        mask = self.mask_for(types_BT.shape[1], causal=False, query_documents_BT=padding, dense=dense)
        x_BTD = self.run_blocks(list(self.layers.values()), x_BTD, mask, rows)
        if not self.last:
            return x_BTD
        hidden_BTD = self.hidden(x_BTD)
        if classes is not None:
            assert class_weights is not None, "classes come with weights"
            scores_BC = self.class_scores(hidden_BTD, rows)
            right_B = (scores_BC.detach().argmax(-1) == classes).float()
            return torch.stack([_weighted_loss(scores_BC, classes, class_weights), right_B @ class_weights])
        if labels is None:
            return hidden_BTD
        assert loss_weights is not None, "labels come with loss weights"
        losses = [self.token_loss(hidden_BTD, labels, loss_weights)]
        if self.config.bert_binary_head:
            assert order is not None and order_weights is not None, "a binary head learns from orders"
            losses.append(_weighted_loss(self.order_scores(hidden_BTD), order, order_weights))
        return torch.stack(losses)

    def embed(self, tokens_BT: Tensor, types_BT: Tensor, rows_BT: Tensor | None) -> Tensor:
        """BTD: the stream that enters the first block."""
        x_BTD = self.word_embedding(tokens_BT) + self.position_embedding(self.places(tokens_BT))
        if hasattr(self, "token_type_embedding"):
            x_BTD = x_BTD + self.token_type_embedding(types_BT)
        if self.config.norm_after_residual:
            x_BTD = self.embedding_norm(x_BTD)
        return self.entering(x_BTD, rows_BT, self._drop_embedding)

    def hidden(self, x_BTD: Tensor) -> Tensor:
        """BTD: what heads read, from the stream after the last block."""
        return x_BTD.to(self.dtype) if self.config.norm_after_residual else super().hidden(x_BTD)

    @property
    def token_bias(self) -> Tensor:
        """V: what is added to the scores of tokens."""
        return self.lm_head.bias

    def features(self, hidden_BTD: Tensor) -> Tensor:
        """BTD: what the table scores, from hidden states."""
        features_BTD: Tensor = self.lm_head(hidden_BTD)
        return features_BTD

    def order_scores(self, hidden_BTD: Tensor) -> Tensor:
        """B2: scores of the two parts' standing in their order, and of their being swapped."""
        scores_B2: Tensor = self.binary_head(self.pooled(hidden_BTD))
        return scores_B2

    def class_scores(self, hidden_BTD: Tensor, rows_BT: Tensor | None = None) -> Tensor:
        """BC: scores of the classes."""
        rows_B1 = None if rows_BT is None else rows_BT[:, :1]
        pooled_B1D = drop(self.pooled(hidden_BTD)[:, None], rows_B1, self.config.hidden_dropout, self._drop_pooled)
        scores_BC: Tensor = self.classification_head(pooled_B1D[:, 0])
        return scores_BC

    def pooled(self, hidden_BTD: Tensor) -> Tensor:
        """BD: what the whole text is, read at its first token."""
        return torch.tanh(self.pooler(self.first_token(hidden_BTD)))


class TokenHead(nn.Module):
    """What hidden states go through before the table scores them, and the bias of those scores."""

    def __init__(self, config: ModelConfig, vocab_size: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        width = shape_of(config).width
        weight, _ = initial_weights(config)
        self.dense = Linear(width, width, weight, device=device)
        self.norm = LayerNorm(width, config.layernorm_epsilon, device=device)
        self.bias = nn.Parameter(torch.empty(vocab_size, dtype=torch.float32, device=device))
        self.initial = {"bias": ZEROS}
        # Megatron-LM does not fuse this one, so the fused form is not asked for.
        self.form: Gelu = "tanh" if config.openai_gelu else "onnx" if config.onnx_safe else "erf"

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        features_BTD: Tensor = self.norm(gelu(self.dense(hidden_BTD), self.form))
        return features_BTD


def take_first(hidden_BTD: Tensor) -> Tensor:
    """BD: the hidden state of place 0."""
    return hidden_BTD[:, 0]


def _weighted_loss(scores_BC: Tensor, classes_B: Tensor, weights_B: Tensor) -> Tensor:
    return F.cross_entropy(scores_BC.float(), classes_B, reduction="none") @ weights_B
