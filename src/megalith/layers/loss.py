"""Cross entropy over the vocabulary without the logits: rows are projected, scored, differentiated a chunk at a time.

For the reference's vocabulary the logits of a microbatch are larger than all other activations of a small model. Here
at most one chunk of them exists. The gradients are computed in the forward pass, while a chunk is at hand, so nothing
is projected twice.

Shape letters: B batch, T token, N rows (B T), C rows of a chunk, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalith.layers.loss_blocks import BLOCK, add_product, losses, losses_and_gradients
from megalith.layers.products import LEAST, suits_onednn

# Rows per chunk: fewer make the matrix products slow, more make the chunk's logits large (100 MB for 512 rows of 50304
# fp32 logits). On a GPU a chunk is the price of one pass over the table's gradient, so it is larger, a quarter of a
# microbatch within these bounds.
CPU_ROWS, LEAST_ROWS, MOST_ROWS = 512, 1024, 4096


def vocabulary_cross_entropy(
    hidden_BTD: Tensor,
    table_VD: Tensor,
    labels_BT: Tensor,
    loss_weights_BT: Tensor,
    *,
    bias_V: Tensor | None = None,
    softmax_in_16_bit: bool = False,
    chunk: int | None = None,
) -> Tensor:
    """Sum over tokens of loss weight times cross entropy of softmax(hidden table^T + bias) and label: a fp32 scalar.

    Logits are computed in the type of hidden; the softmax in fp32, or in that type if softmax_in_16_bit. Gradients that
    flow through 16-bit logits are those of the weighted loss, so loss weights hold the loss scale already. Labels below
    0 are allowed where the weight is 0. Gradients flow to hidden, table and bias.
    """
    chunk = rows_per_chunk(hidden_BTD) if chunk is None else chunk
    hidden_ND = hidden_BTD.flatten(0, -2)
    labels_N, weights_N = labels_BT.flatten(), loss_weights_BT.flatten().float()
    if not (torch.is_grad_enabled() and (hidden_BTD.requires_grad or table_VD.requires_grad)):
        table, bias = in_type_of(hidden_BTD, table_VD, bias_V)
        return _losses(hidden_ND, table, bias, labels_N, softmax_in_16_bit, chunk) @ weights_N
    loss: Tensor = _ChunkedCrossEntropy.apply(
        hidden_ND, table_VD, bias_V, labels_N, weights_N, softmax_in_16_bit, chunk
    )
    return loss


@torch.no_grad()
def per_token_losses(
    hidden_BTD: Tensor,
    table_VD: Tensor,
    labels_BT: Tensor,
    *,
    bias_V: Tensor | None = None,
    softmax_in_16_bit: bool = False,
) -> Tensor:
    """fp32 BT: the cross entropy of every token, without gradients. Labels below 0 give the loss of label 0."""
    table, bias = in_type_of(hidden_BTD, table_VD, bias_V)
    chunk = rows_per_chunk(hidden_BTD)
    losses_N = _losses(hidden_BTD.flatten(0, -2), table, bias, labels_BT.flatten(), softmax_in_16_bit, chunk)
    return losses_N.view(labels_BT.shape)


def in_type_of(hidden: Tensor, table_VD: Tensor, bias_V: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Table and bias as the product with hidden states takes them."""
    return table_VD.to(hidden.dtype), None if bias_V is None else bias_V.to(hidden.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        whole_table_VD: Tensor,
        whole_bias_V: Tensor | None,
        labels_N: Tensor,
        weights_N: Tensor,
        softmax_in_16_bit: bool,
        chunk: int,
    ) -> Tensor:
        # Rounded in here, so that the gradients of the fp32 ones are not rounded on their way back.
        table_VD, bias_V = in_type_of(hidden_ND, whole_table_VD, whole_bias_V)
        grad_hidden = torch.empty_like(hidden_ND)
        grad_table = torch.empty_like(table_VD, dtype=torch.float32)
        grad_bias = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        losses_N = torch.empty_like(weights_N)
        by_blocks = _suits_blocks(hidden_ND[:chunk], table_VD, softmax_in_16_bit)
        # One piece of memory for all chunks: taking and giving back as much for each would cost as much as a product.
        memory_CV = hidden_ND.new_empty(0 if by_blocks else min(chunk, len(hidden_ND)), len(table_VD))
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            hidden, weights, labels = hidden_ND[part], weights_N[part, None], labels_N[part, None].clamp(min=0)
            if by_blocks:
                losses_N[part] = losses_and_gradients(
                    hidden,
                    table_VD,
                    labels,
                    weights,
                    grad_hidden_CD=grad_hidden[part],
                    grad_table_VD=grad_table,
                    first=start == 0,
                    bias_V=bias_V,
                    grad_bias_V=grad_bias,
                )
                continue
            logits = torch.mm(hidden, table_VD.t(), out=memory_CV[: len(hidden)])
            if bias_V is not None:
                logits += bias_V
            # The derivative of the loss by the logits: softmax - one_hot.
            slopes, losses_N[part] = _slopes_and_losses(logits, labels, hidden, table_VD, bias_V, softmax_in_16_bit)
            # The weights go to the narrow side of the products, which saves a pass over the chunk.
            torch.mm(slopes, table_VD, out=grad_hidden[part]).mul_(weights)
            add_product(grad_table, slopes.t(), (hidden * weights).to(hidden.dtype), first=start == 0)
            if grad_bias is not None:
                grad_bias += slopes.t() @ weights[:, 0].to(slopes.dtype)
        ctx.save_for_backward(grad_hidden, grad_table, grad_bias)
        return losses_N @ weights_N

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *take_gradients(ctx, grad_loss), None, None, None, None


def take_gradients(ctx: Any, grad_loss: Tensor) -> Sequence[Tensor | None]:
    """What the forward pass has saved as gradients of the loss, times the loss's own gradient, in place.

    A backward pass in two halves comes twice; what was multiplied the first time is divided by.
    """
    gradients: tuple[Tensor | None, ...] = ctx.saved_tensors
    before: Tensor | None = getattr(ctx, "grad_loss", None)
    # On a GPU to look would be to wait.
    if before is None and not grad_loss.is_cuda and grad_loss == 1:
        return gradients
    ctx.grad_loss = grad_loss
    for gradient in gradients:
        if gradient is not None:
            # Through data, or torch would take them for spoilt when they are asked for again.
            gradient.data.mul_(grad_loss if before is None else grad_loss / before)
    return gradients


def _suits_blocks(hidden_CD: Tensor, table_VD: Tensor, softmax_in_16_bit: bool) -> bool:
    """Whether a chunk goes by blocks of the table: on the CPU, if it has several, in fp32 or bf16, softmax in fp32."""
    if softmax_in_16_bit or len(table_VD) <= BLOCK or hidden_CD.device.type != "cpu":
        return False
    if hidden_CD.dtype == torch.bfloat16:
        return hidden_CD.numel() * BLOCK >= LEAST and not torch.compiler.is_compiling()
    return suits_onednn(hidden_CD, table_VD[:BLOCK])


def _slopes_and_losses(
    logits_CV: Tensor,
    labels_C1: Tensor,
    hidden_CD: Tensor,
    table_VD: Tensor,
    bias_V: Tensor | None,
    softmax_in_16_bit: bool,
) -> tuple[Tensor, Tensor]:
    """softmax(logits) - one_hot(labels), CV in the place of the logits, and the cross entropies, C.

    On the CPU fp32 logits become them in one pass over memory, and the loss is -log of the softmax at the label.
    Where that underflows the row is projected once more.
    """
    if logits_CV.is_cuda:
        return logits_CV, compiled(become_slopes)(logits_CV, labels_C1, softmax_in_16_bit)
    minus_one = logits_CV.new_full((1, 1), -1.0).expand_as(labels_C1)
    if logits_CV.dtype != torch.float32:
        logs_CV = torch.log_softmax(logits_CV, -1, dtype=logits_CV.dtype if softmax_in_16_bit else torch.float32)
        losses_C = -logs_CV.gather(1, labels_C1)[:, 0]
        slopes_CV = logs_CV.exp_().scatter_add_(1, labels_C1, minus_one.to(logs_CV.dtype))
        return logits_CV.copy_(slopes_CV), losses_C
    p_CV = torch.softmax(logits_CV, -1, out=logits_CV)
    label_p_C = p_CV.gather(1, labels_C1)[:, 0]
    losses_C = -label_p_C.log()
    lost = (label_p_C < 1e-30).nonzero()[:, 0]
    if len(lost):
        losses_C[lost] = _losses(hidden_CD[lost], table_VD, bias_V, labels_C1[lost, 0], False, len(lost))
    return p_CV.scatter_add_(1, labels_C1, minus_one), losses_C


def become_slopes(logits_CV: Tensor, labels_C1: Tensor, softmax_in_16_bit: bool) -> Tensor:
    """What `_slopes_and_losses` gives, the slopes in place of the logits, as a formula that the compiler fuses.

    Compiled it is two passes over the logits, of which the second writes; uncompiled it is seven.
    """
    logs_CV = torch.log_softmax(logits_CV, -1, dtype=logits_CV.dtype if softmax_in_16_bit else torch.float32)
    losses_C = -logs_CV.gather(1, labels_C1)[:, 0]
    is_label_CV = torch.arange(logits_CV.shape[1], device=logits_CV.device) == labels_C1
    logits_CV.copy_(logs_CV.exp() - is_label_CV.to(logs_CV.dtype))
    return losses_C


@cache
def compiled(formula: Callable[..., Any]) -> Callable[..., Any]:
    """A formula over logits as few passes over memory, for a GPU."""
    return torch.compile(formula, dynamic=False)


def _losses(
    hidden_ND: Tensor, table_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, softmax_in_16_bit: bool, chunk: int
) -> Tensor:
    losses_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
    for start in range(0, len(hidden_ND), chunk):
        part = slice(start, start + chunk)
        hidden, labels = hidden_ND[part], labels_N[part, None].clamp(min=0)
        if _suits_blocks(hidden, table_VD, softmax_in_16_bit):
            losses_N[part] = losses(hidden, table_VD, labels, bias_V)
            continue
        logits = F.linear(hidden, table_VD, bias_V)
        logs = torch.log_softmax(logits, -1, dtype=logits.dtype if softmax_in_16_bit else torch.float32)
        losses_N[part] = -logs.gather(1, labels)[:, 0]
        del logits, logs  # before the next chunk's are made
    return losses_N


def rows_per_chunk(hidden: Tensor) -> int:
    """How many of these rows are scored at once."""
    return chunk_rows("cuda" if hidden.is_cuda else "cpu", hidden.numel() // max(1, hidden.shape[-1]))


def chunk_rows(device_type: str, num_rows: int) -> int:
    """How many of so many rows are scored at once."""
    return CPU_ROWS if device_type == "cpu" else min(max(num_rows // 4, LEAST_ROWS), MOST_ROWS)
