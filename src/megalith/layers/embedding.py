"""Tables that are looked up by number."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalith.layers.initial import Initial


class Embedding(nn.Module):
    """One row of the table per id (tokens, positions, token types), in fp32.

    Seam for vocabulary parallelism: look_up(ids, table), where the table may be a part of the rows.
    """

    def __init__(self, rows: int, width: int, weight: Initial, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=torch.float32, device=device))
        self.initial = {"weight": weight}
        self.look_up: Callable[[Tensor, Tensor], Tensor] = F.embedding

    def forward(self, ids: Tensor) -> Tensor:
        return self.look_up(ids, self.weight)

    def look_up_and_share(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the ids, and the table for its other use in the same pass, that of scores.

        On the CPU the gradient of that use takes those of the rows in place, where both would else be tables.
        """
        if self.look_up is not F.embedding or ids.device.type != "cpu":
            return self(ids), self.weight
        rows, table = _LookUpAndShare.apply(ids, self.weight)
        return rows, table


class _LookUpAndShare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, table_VD: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        return F.embedding(ids, table_VD), table_VD.view_as(table_VD)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_table_VD: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        return None, grad_table_VD.index_add_(0, ids.flatten(), grad_rows.flatten(0, -2))
