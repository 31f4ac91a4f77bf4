"""Positions by distance: a bias of every attention score that depends on how far query and key are apart.

Shape letters: H heads, T query, S key.
"""

import math

import torch
from torch import Tensor, nn

from megalith.layers.initial import Initial


class RelativePositions(nn.Module):
    """A table of a bias for each head and range of distances (T5, Raffel et al. 2019, arXiv:1910.10683).

    Half of the ranges are single distances, the others grow to max_distance, from which on the last serves all. With
    both_ways keys before and behind the query have half of the ranges each; else those behind count as distance 0.
    Under tensor parallelism the table holds the heads that are held here.
    """

    def __init__(
        self,
        num_buckets: int,
        max_distance: int,
        num_heads: int,
        weight: Initial,
        *,
        both_ways: bool,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads, dtype=torch.float32, device=device))
        self.initial = {"weight": weight}
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.both_ways = both_ways

    def forward(self, num_queries: int, num_keys: int) -> Tensor:
        """fp32 1HTS."""
        device = self.weight.device
        ahead_TS = torch.arange(num_keys, device=device) - torch.arange(num_queries, device=device)[:, None]
        rows_TS = distance_rows(
            ahead_TS, num_buckets=self.num_buckets, max_distance=self.max_distance, both_ways=self.both_ways
        )
        return self.weight[rows_TS].permute(2, 0, 1)[None]


def distance_rows(ahead: Tensor, *, num_buckets: int, max_distance: int, both_ways: bool) -> Tensor:
    """int64: the row of the table for keys that stand so many places ahead of their query (negative: before it)."""
    ranges = num_buckets // 2 if both_ways else num_buckets
    single = ranges // 2
    wide = ranges - single
    # The first distance of each range after the single ones; they grow by the same factor.
    growth = max_distance / single
    firsts = [math.ceil(round(single * growth ** (step / wide), 9)) for step in range(1, wide)]
    bounds = torch.tensor([*range(1, single + 1), *firsts], device=ahead.device)
    distance = ahead.abs() if both_ways else (-ahead).clamp(min=0)
    rows = torch.bucketize(distance, bounds, right=True)
    return rows + ranges * (ahead > 0) if both_ways else rows
