"""Tables that are looked up by number."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalith.layers.initial import Initial


class Embedding(nn.Module):
    """One row of the table per id (tokens, positions, token types), in fp32.

    Seam for vocabulary parallelism: look_up(ids, table), where the table may be a part of the rows.
    """

    def __init__(self, rows: int, width: int, weight: Initial, *, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=torch.float32, device=device))
        self.initial = {"weight": weight}
        self.look_up: Callable[[Tensor, Tensor], Tensor] = F.embedding

    def forward(self, ids: Tensor) -> Tensor:
        return self.look_up(ids, self.weight)
