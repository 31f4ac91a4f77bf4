"""A bi-encoder: texts become vectors, and a question's vector has its largest product with that of its passage.

Shape letters: B batch, T tokens of a question, S tokens of a passage, N passages of a question (the right one first), M
all passages at hand, D width, E features of an embedding.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalith.layers.linear import Linear
from megalith.models.bert import Bert
from megalith.models.settings import ModelConfig
from megalith.models.shape import initial_weights, shape_of


class Tower(nn.Module):
    """An encoder and the embedding that it makes of a text: the hidden state of [CLS], projected if so configured."""

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        *,
        stack: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.encoder = Bert(
            config, vocab_size, dtype=dtype, head=None, stack=stack, token_types=True, first=True, device=device
        )
        if config.biencoder_projection_dim:
            weight, _ = initial_weights(config)
            width = shape_of(config).width
            self.projection = Linear(width, config.biencoder_projection_dim, weight, device=device)

    def forward(self, tokens_BT: Tensor, real_BT: Tensor, rows_BT: Tensor | None = None) -> Tensor:
        """BE. real: int, 1 where a token is real, 0 in the padding. rows: from `dropout_rows`; None: no dropout."""
        hidden_BTD = self.encoder(tokens_BT, torch.zeros_like(tokens_BT), padding=real_BT, rows=rows_BT)
        embeddings_BE: Tensor = self.encoder.first_token(hidden_BTD)
        return self.projection(embeddings_BE) if hasattr(self, "projection") else embeddings_BE


class Retriever(nn.Module):
    """Two towers, or one for both, that learn from each other's passages (Lee et al. 2019, arXiv:1906.00300).

    Every question of a microbatch, over all replicas, is scored against every passage of it. scaled: scores are divided
    by sqrt(hidden_size). report: the k of the accuracies that are given beside the loss; report_rank: the rank too.

    Seam for data parallelism: gathered(embeddings) gives those of all replicas and the row at which one's own begin.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        scaled: bool = False,
        report: Sequence[int] = (),
        report_rank: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(shape_of(config).width) if scaled else 1.0
        self.report = tuple(report)
        self.report_rank = report_rank
        names = ("shared",) if config.biencoder_shared_query_context_model else ("query", "context")
        self.towers = nn.ModuleDict(
            {name: Tower(config, vocab_size, stack=name, dtype=dtype, device=device) for name in names}
        )
        self.gathered: Callable[[Tensor], tuple[Tensor, int]] = own_alone

    @property
    def query(self) -> nn.Module:
        """The tower of questions."""
        return self.towers["query" if "query" in self.towers else "shared"]

    @property
    def context(self) -> nn.Module:
        """The tower of passages."""
        return self.towers["context" if "context" in self.towers else "shared"]

    def forward(
        self,
        queries_BT: Tensor,
        contexts_BNS: Tensor,
        *,
        queries_real: Tensor,
        contexts_real: Tensor,
        loss_weights: Tensor,
        rows: Tensor | None = None,
    ) -> Tensor:
        """fp32 sums over questions of weight times: cross entropy, rank if reported, percent right among k for each k.

        queries_real, contexts_real: int, 1 where a token is real; a passage without any is not there at all; it may
        be the right one where the weight is 0. rows: int32 B(T + N S), the question's places, then the passages'.
        """
        length = queries_BT.shape[1]
        query_rows = None if rows is None else rows[:, :length]
        context_rows = None if rows is None else rows[:, length:].reshape(-1, contexts_BNS.shape[2])
        q_BE = self.query(queries_BT, queries_real, query_rows)
        c_CE = self.context(contexts_BNS.flatten(0, 1), contexts_real.flatten(0, 1), context_rows)
        c_ME, first = self.gathered(c_CE.float())
        scores_BM = q_BE.float() @ c_ME.T * self.scale
        present_M, _ = self.gathered(contexts_real.flatten(0, 1).any(-1).float())
        scores_BM = scores_BM.masked_fill(present_M == 0, -torch.inf)
        right_B = first + torch.arange(len(q_BE), device=q_BE.device) * contexts_BNS.shape[1]
        losses_B = F.cross_entropy(scores_BM, right_B, reduction="none")
        # Without its passage a question has no finite loss, and 0 times that is no number.
        losses_B = losses_B.masked_fill(loss_weights == 0, 0)
        return torch.stack([losses_B @ loss_weights, *self.figures(scores_BM.detach(), right_B, loss_weights)])

    def figures(self, scores_BM: Tensor, right_B: Tensor, weights_B: Tensor) -> list[Tensor]:
        """Weighted sums of the rank of the right passage, from 1, and of its being among the first k, in percent."""
        # Whatever is not below counts, so that a score that is not a number is no success.
        better_B = (~(scores_BM <= scores_BM.gather(1, right_B[:, None]))).sum(1)
        ranks = [(better_B + 1).float() @ weights_B] if self.report_rank else []
        return [*ranks, *(100.0 * (better_B < k).float() @ weights_B for k in self.report)]


def own_alone(embeddings_CE: Tensor) -> tuple[Tensor, int]:
    """Where there is one replica, its embeddings are all that there are."""
    return embeddings_CE, 0


def num_candidates(batch: int, replicas: int, contexts: float = 1) -> int:
    """Passages among which a question of a microbatch of that many questions looks for its own.

    contexts: passages of a question, on average.
    """
    return round(batch * replicas * contexts)
