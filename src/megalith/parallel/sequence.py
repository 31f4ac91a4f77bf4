"""The tokens of a microbatch cut over tensor ranks (Korthikanti et al. 2022, arXiv:2205.05198).

A rank's part has the shape of every rank-th of the tokens of each sample, [B, T / ranks, ...], but holds one stretch of
all samples' tokens in a row, as they lie in memory: nothing is moved to cut them or to join them. What is computed of a
token by itself is the same for any cut.

Shape letters: B batch, T token, D width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megalith.parallel.collectives import (
    Group,
    gather_copies,
    gather_for_product,
    rank_in,
    reduce_from_group,
    scatter_copies,
    scatter_sum,
    size_of,
)


def cut(whole_BT: Tensor, group: Group) -> Tensor:
    """This rank's part of what all ranks hold alike; gradients are gathered."""
    return in_a_row(scatter_copies, whole_BT, group)


def cut_sum(whole_BT: Tensor, group: Group) -> Tensor:
    """This rank's part of the sum over ranks; gradients are gathered. After a row-parallel product."""
    return in_a_row(scatter_sum, whole_BT, group)


def join(part_BT: Tensor, group: Group) -> Tensor:
    """All parts, for work that every rank does alike; each rank keeps its part of the gradient."""
    return in_a_row(gather_copies, part_BT, group)


def join_for_product(part_BT: Tensor, group: Group) -> Tensor:
    """All parts; gradients are summed and cut. Before a column-parallel product."""
    return in_a_row(gather_for_product, part_BT, group)


def first_of_each(part_BTD: Tensor, group: Group) -> Tensor:
    """BD: the first token of each sample, which some rank holds; each rank keeps its part of the gradient."""
    held = part_BTD.flatten(0, 1)
    rows = torch.arange(len(part_BTD), device=held.device) * (part_BTD.shape[1] * size_of(group))
    rows = rows - rank_in(group) * len(held)
    elsewhere = (rows < 0) | (rows >= len(held))
    found_BD = held[rows.clamp(0, len(held) - 1)].masked_fill(elsewhere[:, None], 0.0)
    return reduce_from_group(found_BD, group)


def in_a_row(exchange: Callable[[Tensor, int, Group], Tensor], tokens_BT: Tensor, group: Group) -> Tensor:
    """What exchange makes of the tokens of all samples in a row along its dimension, by sample again."""
    exchanged: Tensor = exchange(tokens_BT.flatten(0, 1), 0, group).unflatten(0, (len(tokens_BT), -1))
    return exchanged
