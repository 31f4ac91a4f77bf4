"""How well a language model predicts a stream of tokens."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megalith.models.decoder import Decoder


@dataclass(frozen=True)
class StreamLoss:
    """The sum of the cross entropies of `count` tokens, in nats."""

    total: float
    count: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.total / self.count

    @property
    def perplexity(self) -> float:
        """Megatron-LM caps the exponent at 20."""
        return math.exp(min(20.0, self.mean))


@torch.no_grad()
def stream_loss(model: Decoder, tokens: NDArray[np.int64], *, window: int, windows_at_once: int = 8) -> StreamLoss:
    """The loss over a stream cut into windows, each token but the first predicted once.

    A token sees those before it in its window. window: tokens of input, at most max_position_embeddings.
    Raises ValueError for a stream of fewer than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"a stream of {len(tokens)} tokens has none to predict; give at least two")
    device = next(model.parameters()).device
    model.eval()
    total = 0.0
    for first in range(0, len(tokens) - 1, window * windows_at_once):
        part = torch.from_numpy(tokens[first : first + window * windows_at_once + 1]).to(device)
        whole = (len(part) - 1) // window
        pieces = [(part[: whole * window].view(-1, window), part[1 : whole * window + 1].view(-1, window))]
        rest = part[whole * window :]
        pieces.append((rest[None, :-1], rest[None, 1:]))
        for inputs, labels in pieces:
            if inputs.numel():
                positions = torch.arange(inputs.shape[1], device=device).expand_as(inputs)
                total += model.token_losses(model.hidden(model.stream(inputs, positions)), labels).double().sum().item()
    return StreamLoss(total, len(tokens) - 1)


def unigram_entropy(tokens: NDArray[np.integer]) -> float:
    """Nats per token that the best predictor without context pays: the entropy of the tokens' frequencies."""
    _, counts = np.unique(tokens, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())
