"""Cross entropy over the vocabulary without the logits: rows are projected, scored, differentiated a chunk at a time.

For the reference's vocabulary the logits of a microbatch are larger than all other activations of a small model. Here
at most one chunk of them exists. The gradients are computed in the forward pass, while a chunk is at hand, so nothing
is projected twice.

Shape letters: B batch, T token, N rows (B T), C rows of a chunk, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

# Rows per chunk: fewer make the matrix products slow, more make the chunk's logits large (100 MB for 512 rows of 50304
# fp32 logits). On a GPU a chunk is the price of one pass over the table's gradient, so it is larger.
_CHUNK = {"cpu": 512, "cuda": 4096}


def vocabulary_cross_entropy(
    hidden_BTD: Tensor,
    table_VD: Tensor,
    labels_BT: Tensor,
    loss_weights_BT: Tensor,
    *,
    softmax_in_16_bit: bool = False,
    chunk: int | None = None,
) -> Tensor:
    """Sum over tokens of loss weight times cross entropy of softmax(hidden table^T) against the label: a fp32 scalar.

    Logits are computed in the type of hidden; the softmax in fp32, or in that type if softmax_in_16_bit. The gradient
    of 16-bit logits is the weighted one, so loss weights have to hold the loss scale already. Labels below 0 are
    allowed where the weight is 0. Gradients flow to hidden and table.
    """
    wanted = torch.is_grad_enabled() and (hidden_BTD.requires_grad or table_VD.requires_grad)
    table = table_VD.to(hidden_BTD.dtype)
    chunk = _rows_per_chunk(hidden_BTD) if chunk is None else chunk
    hidden_ND = hidden_BTD.flatten(0, -2)
    labels_N, weights_N = labels_BT.flatten(), loss_weights_BT.flatten().float()
    if not wanted:
        return _losses(hidden_ND, table, labels_N, softmax_in_16_bit, chunk) @ weights_N
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden_ND, table, labels_N, weights_N, softmax_in_16_bit, chunk)
    return loss


@torch.no_grad()
def per_token_losses(
    hidden_BTD: Tensor, table_VD: Tensor, labels_BT: Tensor, *, softmax_in_16_bit: bool = False
) -> Tensor:
    """fp32 BT: the cross entropy of every token, without gradients. Labels below 0 give the loss of label 0."""
    chunk = _rows_per_chunk(hidden_BTD)
    table = table_VD.to(hidden_BTD.dtype)
    losses_N = _losses(hidden_BTD.flatten(0, -2), table, labels_BT.flatten(), softmax_in_16_bit, chunk)
    return losses_N.view(labels_BT.shape)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        table_VD: Tensor,
        labels_N: Tensor,
        weights_N: Tensor,
        softmax_in_16_bit: bool,
        chunk: int,
    ) -> Tensor:
        grad_hidden = torch.empty_like(hidden_ND)
        grad_table = torch.empty_like(table_VD, dtype=torch.float32)
        losses_N = torch.empty_like(weights_N)
        # One piece of memory for all chunks: taking and giving back as much for each would cost as much as a product.
        memory_CV = hidden_ND.new_empty(min(chunk, len(hidden_ND)), len(table_VD))
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            hidden, weights, labels = hidden_ND[part], weights_N[part, None], labels_N[part, None].clamp(min=0)
            logits = torch.mm(hidden, table_VD.t(), out=memory_CV[: len(hidden)])
            p, losses_N[part] = _softmax_and_losses(logits, hidden, table_VD, labels, softmax_in_16_bit)
            # Now the derivative of the loss by the logits, softmax - one_hot, in place.
            slopes = p.scatter_add_(1, labels, p.new_full((1, 1), -1.0).expand_as(labels)).to(hidden.dtype)
            # The weights go to the narrow side of both products, which saves a pass over the chunk.
            torch.mm(slopes, table_VD, out=grad_hidden[part]).mul_(weights)
            _add_product(grad_table, slopes.t(), (hidden * weights).to(hidden.dtype), first=start == 0)
        ctx.save_for_backward(grad_hidden, grad_table)
        return losses_N @ weights_N

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_table = ctx.saved_tensors
        if grad_loss.is_cuda or grad_loss != 1:  # On a GPU to look would be to wait.
            grad_hidden, grad_table = grad_hidden * grad_loss, grad_table * grad_loss
        return grad_hidden, grad_table, None, None, None, None


def _softmax_and_losses(
    logits_CV: Tensor, hidden_CD: Tensor, table_VD: Tensor, labels_C1: Tensor, softmax_in_16_bit: bool
) -> tuple[Tensor, Tensor]:
    """softmax(logits), and the cross entropies C. On the CPU fp32 logits are overwritten: passes over memory count."""
    if logits_CV.is_cuda or logits_CV.dtype != torch.float32:
        logs = torch.log_softmax(logits_CV, -1, dtype=logits_CV.dtype if softmax_in_16_bit else torch.float32)
        losses_C = -logs.gather(1, labels_C1)[:, 0]
        return logs.exp_(), losses_C
    label_logits_C = logits_CV.gather(1, labels_C1)[:, 0]
    p_CV = torch.softmax(logits_CV, -1, out=logits_CV)
    label_p_C = p_CV.gather(1, labels_C1)[:, 0]
    losses_C = -label_p_C.log()
    # Where the label's probability underflows, by log sum exp(logits) = the largest logit - log its probability.
    lost = (label_p_C < 1e-30).nonzero()[:, 0]
    if len(lost):
        top_p, top = p_CV[lost].max(-1)
        top_logits = (hidden_CD[lost] * table_VD[top]).sum(-1)
        losses_C[lost] = top_logits - top_p.log() - label_logits_C[lost]
    return p_CV, losses_C


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """total += left @ right in place, in fp32; the first product overwrites."""
    if total.dtype != left.dtype:
        product = left @ right
        total.copy_(product) if first else total.add_(product)
    elif first:
        torch.mm(left, right, out=total)
    else:
        total.addmm_(left, right)


def _losses(hidden_ND: Tensor, table_VD: Tensor, labels_N: Tensor, softmax_in_16_bit: bool, chunk: int) -> Tensor:
    losses_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
    for start in range(0, len(hidden_ND), chunk):
        part = slice(start, start + chunk)
        logits = hidden_ND[part] @ table_VD.t()
        logs = torch.log_softmax(logits, -1, dtype=logits.dtype if softmax_in_16_bit else torch.float32)
        losses_N[part] = -logs.gather(1, labels_N[part, None].clamp(min=0))[:, 0]
    return losses_N


def _rows_per_chunk(hidden: Tensor) -> int:
    return _CHUNK["cuda" if hidden.is_cuda else "cpu"]
