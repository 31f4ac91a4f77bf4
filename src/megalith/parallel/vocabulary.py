"""The vocabulary cut over tensor ranks: looking up, scoring and the loss, none of which ever gathers the logits.

Rank r holds the rows [r share, (r + 1) share) of the table, share = V / ranks rounded up.

Shape letters: B batch, T token, N rows (B T), C rows of a chunk, D width, V vocabulary, S vocabulary rows held here.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megalith.layers.loss import compiled, in_type_of, rows_per_chunk, take_gradients
from megalith.layers.loss_blocks import add_product
from megalith.layers.products import linear_without_gradients
from megalith.parallel.collectives import (
    Group,
    all_gather,
    all_reduce,
    copy_to_group,
    reduce_from_group,
)
from megalith.parallel.sequence import cut_sum, join_for_product


def look_up_cut_table(ids_BT: Tensor, table_SD: Tensor, *, first: int, group: Group, sequence: bool) -> Tensor:
    """BTD: the row of each id, wherever it is held; with sequence, of this rank's tokens only."""
    local = ids_BT - first
    elsewhere = (local < 0) | (local >= table_SD.shape[0])
    rows_BTD = F.embedding(local.masked_fill(elsewhere, 0), table_SD)
    rows_BTD = rows_BTD.masked_fill(elsewhere[..., None], 0.0)
    return cut_sum(rows_BTD, group) if sequence else reduce_from_group(rows_BTD, group)


def cut_logits(
    hidden_BTD: Tensor, table_SD: Tensor, *, bias_V: Tensor | None = None, group: Group, sequence: bool
) -> Tensor:
    """BTV: all logits on every rank. For generation; training never needs them. bias_V: those of the rows held here."""
    if sequence:
        hidden_BTD = join_for_product(hidden_BTD, group)
    bias_S = None if bias_V is None else bias_V.to(hidden_BTD.dtype)
    logits_BTS = F.linear(hidden_BTD, table_SD.to(hidden_BTD.dtype), bias_S)
    widths = all_gather(torch.tensor([logits_BTS.shape[-1]], device=logits_BTS.device), 0, group).tolist()
    # A collective wants equal parts: a smaller last one is filled up and cut off again.
    filled = F.pad(logits_BTS, (0, max(widths) - logits_BTS.shape[-1]))
    parts = all_gather(filled, -1, group).split(max(widths), -1)
    return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], -1)


def cut_cross_entropy(
    hidden_BTD: Tensor,
    table_SD: Tensor,
    labels_BT: Tensor,
    loss_weights_BT: Tensor,
    *,
    first: int,
    group: Group,
    sequence: bool,
    bias_V: Tensor | None = None,
    softmax_in_16_bit: bool = False,
) -> Tensor:
    """The weighted sum of cross entropies as layers/loss.py gives it, from a table cut over the group.

    first: the token of the first row held here. bias_V: of the rows held here. Every rank gets the whole sum. Per chunk
    of rows three vectors travel: the largest logit, the sum of exponentials and the label's logit.
    """
    hidden_BTD = join_for_product(hidden_BTD, group) if sequence else copy_to_group(hidden_BTD, group)
    labels_N = labels_BT.flatten() - first
    dtype = hidden_BTD.dtype if softmax_in_16_bit else torch.float32
    # Inside of a function without gradients needs_input_grad is true all the same.
    wanted = torch.is_grad_enabled() and (hidden_BTD.requires_grad or table_SD.requires_grad)
    loss: Tensor = _CutCrossEntropy.apply(
        hidden_BTD.flatten(0, -2), table_SD, bias_V, labels_N, loss_weights_BT.flatten().float(), dtype, group, wanted
    )
    return loss


class _CutCrossEntropy(torch.autograd.Function):
    """Gradients are computed chunk by chunk in the forward pass; that of hidden is this rank's part of a sum."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        whole_table_SD: Tensor,
        whole_bias_S: Tensor | None,
        labels_N: Tensor,
        weights_N: Tensor,
        dtype: torch.dtype,
        group: Group,
        wanted: bool,
    ) -> Tensor:
        table_SD, bias_S = in_type_of(hidden_ND, whole_table_SD, whole_bias_S)
        grad_hidden = torch.empty_like(hidden_ND) if wanted else None
        grad_table = torch.zeros_like(table_SD, dtype=torch.float32) if wanted else None
        grad_bias = torch.zeros_like(bias_S, dtype=torch.float32) if wanted and bias_S is not None else None
        losses_N = torch.empty_like(weights_N)
        chunk = rows_per_chunk(hidden_ND)
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            hidden, weights = hidden_ND[part], weights_N[part, None]
            labels = labels_N[part, None]
            here = (labels >= 0) & (labels < len(table_SD))
            logits = linear_without_gradients(hidden, table_SD, bias_S)
            score = _scored_by_formulas if hidden.is_cuda else _scored_in_place
            slopes, losses_N[part] = score(logits, labels.masked_fill(~here, 0), here, dtype, group, slopes=wanted)
            if grad_hidden is not None and grad_table is not None:
                torch.mul(linear_without_gradients(slopes, table_SD.t()), weights, out=grad_hidden[part])
                weighted = (hidden * weights).to(hidden.dtype)
                add_product(grad_table, slopes.t(), weighted, first=False)
                if grad_bias is not None:
                    grad_bias += slopes.t() @ weights[:, 0].to(slopes.dtype)
            del logits, slopes  # before the next chunk's are made
        if grad_hidden is not None and grad_table is not None:
            ctx.save_for_backward(grad_hidden, grad_table, grad_bias)
        return losses_N @ weights_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *take_gradients(ctx, gradients[0]), None, None, None, None, None


def _scored_in_place(
    logits_CS: Tensor, labels_C1: Tensor, here_C1: Tensor, dtype: torch.dtype, group: Group, *, slopes: bool
) -> tuple[Tensor, Tensor]:
    """The derivatives of the losses by the logits, in the place of these, if slopes are wanted; the losses, C.

    labels: 0 where here says that no row of this rank is the label's.
    """
    scores = logits_CS.to(dtype)
    scores -= all_reduce(scores.amax(-1, keepdim=True), group, dist.ReduceOp.MAX)
    wanted_score = scores.gather(1, labels_C1).masked_fill(~here_C1, 0)
    powers = scores.exp_()
    sums = torch.stack([powers.sum(-1, keepdim=True, dtype=torch.float32), wanted_score.float()])
    total, score = all_reduce(sums, group).unbind()
    if slopes:
        powers.div_(total).scatter_add_(1, labels_C1, -here_C1.to(dtype))
    return logits_CS.copy_(powers), (total.log() - score)[:, 0]


def _scored_by_formulas(
    logits_CS: Tensor, labels_C1: Tensor, here_C1: Tensor, dtype: torch.dtype, group: Group, *, slopes: bool
) -> tuple[Tensor, Tensor]:
    """The same on a GPU, by formulas that are compiled: the logits are read three times and written once."""
    largest_C1 = all_reduce(logits_CS.amax(-1, keepdim=True), group, dist.ReduceOp.MAX)
    sums = compiled(sum_and_score)(logits_CS, largest_C1, labels_C1, here_C1, dtype)
    total, score = all_reduce(sums, group).unbind()
    if slopes:
        compiled(become_cut_slopes)(logits_CS, largest_C1, total, labels_C1, here_C1, dtype)
    return logits_CS, (total.log() - score)[:, 0]


def sum_and_score(
    logits_CS: Tensor, largest_C1: Tensor, labels_C1: Tensor, here_C1: Tensor, dtype: torch.dtype
) -> Tensor:
    """fp32 2 C 1: the sum of exponentials of the columns held here, and the label's logit where it is, each less the
    largest logit; exponentials in dtype, their sum not, for fp16 ends at 65,504."""
    largest = largest_C1.to(dtype)
    score = (logits_CS.gather(1, labels_C1).to(dtype) - largest).masked_fill(~here_C1, 0)
    powers = (logits_CS.to(dtype) - largest).exp()
    return torch.stack([powers.sum(-1, keepdim=True, dtype=torch.float32), score.float()])


def become_cut_slopes(
    logits_CS: Tensor, largest_C1: Tensor, total_C1: Tensor, labels_C1: Tensor, here_C1: Tensor, dtype: torch.dtype
) -> None:
    """The slopes in place of the logits."""
    p_CS = ((logits_CS.to(dtype) - largest_C1.to(dtype)).exp() / total_C1).to(dtype)
    is_label_CS = (torch.arange(logits_CS.shape[1], device=logits_CS.device) == labels_C1) & here_C1
    logits_CS.copy_(p_CS - is_label_CS.to(dtype))
