"""A chunk of the cross entropy over the vocabulary on the CPU in fp32 or bf16, a block of the table at a time.

A block's logits are turned into their softmax over that block while they lie in the processor's cache. What a block
weighs in the whole vocabulary, a number for each row, is known once all blocks are; it goes to the narrow side of the
products that give the gradients, and so does the label. So the logits are written once and read twice. In bf16 logits
and probabilities are rounded to it, as products of bf16 are; softmax, shares and sums over blocks are in fp32.

Shape letters: C rows of a chunk, D width, V vocabulary, K blocks, S entries of a block.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megalith.layers.accumulate import add_product_in_fp32
from megalith.layers.products import leaves_half_to_onednn, suits_onednn, times_transposed

BLOCK = 1024  # entries of the vocabulary whose logits of 512 rows take 2 MB
# Entries of a block of which the likeliest tells the size of the block's logits; and a share too small to tell.
_TRIED = 64
_LEAST_SHARE = 1e-30


def losses_and_gradients(
    hidden_CD: Tensor,
    table_VD: Tensor,
    labels_C1: Tensor,
    weights_C1: Tensor,
    *,
    grad_hidden_CD: Tensor,
    grad_table_VD: Tensor,
    first: bool,
    bias_V: Tensor | None = None,
    grad_bias_V: Tensor | None = None,
) -> Tensor:
    """The cross entropies, C; their weighted gradients go into grad_hidden, and are added to the others, in place.

    first: grad_table holds nothing yet, and is overwritten. Labels are entries of the vocabulary. bias: of the logits.
    """
    dtype = hidden_CD.dtype
    blocks = table_VD.split(BLOCK)
    softmaxes, sizes_CK = _softmaxes(hidden_CD, blocks, _split(bias_V, len(blocks)))
    total_C1 = torch.logsumexp(sizes_CK, -1, keepdim=True)
    shares_CK = (sizes_CK - total_C1).exp_()
    label_rows_CD = table_VD[labels_C1[:, 0]].float()
    wide_CD = hidden_CD.float()
    weighted_CD = wide_CD * weights_C1
    sum_CD = torch.empty_like(wide_CD) if dtype != torch.float32 else grad_hidden_CD
    gradients, bias_gradients = grad_table_VD.split(BLOCK), _split(grad_bias_V, len(blocks))
    places = zip(blocks, gradients, bias_gradients, softmaxes, shares_CK.split(1, -1), strict=True)
    for number, (rows_SD, grad_SD, grad_bias_S, p_CS, share_C1) in enumerate(places):
        product_CD = _times_transposed(p_CS, rows_SD.t()).float()
        if number == 0:
            torch.mul(product_CD, share_C1, out=sum_CD)
        else:
            sum_CD.addcmul_(product_CD, share_C1)
        add_product(grad_SD, p_CS.t(), (weighted_CD * share_C1).to(dtype), first=first)
        if grad_bias_S is not None:
            grad_bias_S += p_CS.t() @ (weights_C1 * share_C1)[:, 0].to(dtype)
    sum_CD.sub_(label_rows_CD).mul_(weights_C1)
    if sum_CD is not grad_hidden_CD:
        grad_hidden_CD.copy_(sum_CD)
    grad_table_VD.index_add_(0, labels_C1[:, 0], weighted_CD, alpha=-1)
    if grad_bias_V is not None:
        grad_bias_V.index_add_(0, labels_C1[:, 0], weights_C1[:, 0], alpha=-1)
    return total_C1[:, 0] - _label_logits(hidden_CD, label_rows_CD, labels_C1, bias_V)


def losses(hidden_CD: Tensor, table_VD: Tensor, labels_C1: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """The cross entropies alone, C, without gradients."""
    blocks = table_VD.split(BLOCK)
    sizes = [
        _times_transposed(hidden_CD, rows_SD, bias_S).float().logsumexp(-1, keepdim=True)
        for rows_SD, bias_S in zip(blocks, _split(bias_V, len(blocks)), strict=True)
    ]
    total_C = torch.logsumexp(torch.cat(sizes, -1), -1)
    return total_C - _label_logits(hidden_CD, table_VD[labels_C1[:, 0]], labels_C1, bias_V)


def add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """total += left @ right in place, in fp32; the first product overwrites.

    Products in 16 bits are rounded on a CPU before they are added.
    """
    if total.dtype != left.dtype and left.is_cuda:
        add_product_in_fp32(total, left, right, first=first)
    elif total.dtype != left.dtype:
        product = torch.mm(left, right)
        total.copy_(product) if first else total.add_(product)
    elif suits_onednn(left, right.t()) and leaves_half_to_onednn():
        for part, sums in zip(left.t().split(BLOCK, 1), total.split(BLOCK), strict=True):
            # A whole matrix is transposed several times as fast as some columns of it.
            product = times_transposed(part.contiguous().t(), right.t())
            sums.copy_(product) if first else sums.add_(product)
    elif first:
        torch.mm(left, right, out=total)
    else:
        total.addmm_(left, right)


def _split(bias_V: Tensor | None, num_blocks: int) -> Sequence[Tensor | None]:
    """The part of each block."""
    return [None] * num_blocks if bias_V is None else bias_V.split(BLOCK)


def _label_logits(hidden_CD: Tensor, label_rows_CD: Tensor, labels_C1: Tensor, bias_V: Tensor | None) -> Tensor:
    """fp32 C, rounded as the label's logit in the softmax is."""
    logits_C = (hidden_CD.float() * label_rows_CD.float()).sum(-1)
    if bias_V is not None:
        logits_C += bias_V[labels_C1[:, 0]].float()
    return logits_C.to(hidden_CD.dtype).float()


def _softmaxes(
    hidden_CD: Tensor, blocks: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[list[Tensor], Tensor]:
    """The softmax over each block, CS in the type of hidden; the logarithm of the sum of each block's powers, CK."""
    softmaxes, sizes = [], []
    for rows_SD, bias_S in zip(blocks, biases, strict=True):
        logits_CS = _times_transposed(hidden_CD, rows_SD, bias_S).float()
        tried_C1, place_C1 = logits_CS[:, :_TRIED].max(-1, keepdim=True)
        p_CS = torch.softmax(logits_CS, -1, out=logits_CS)
        softmaxes.append(p_CS.to(hidden_CD.dtype))
        share_C1 = p_CS.gather(1, place_C1)
        size_C1 = tried_C1 - share_C1.log()
        lost = (share_C1[:, 0] < _LEAST_SHARE).nonzero()[:, 0]
        if len(lost):
            size_C1[lost] = F.linear(hidden_CD[lost], rows_SD, bias_S).float().logsumexp(-1, keepdim=True)
        sizes.append(size_C1)
        del logits_CS, p_CS  # before the next block's are made
    return softmaxes, torch.cat(sizes, -1)


def _times_transposed(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x weight^T + bias; torch sends a product of bf16 to oneDNN itself, where the processor has what that needs."""
    return times_transposed(x, weight_OI, bias_O) if x.dtype == torch.float32 else F.linear(x, weight_OI, bias_O)
