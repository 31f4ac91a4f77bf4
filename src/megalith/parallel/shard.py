"""Data parallelism: gradients of all replicas are summed in buckets after the last microbatch."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megalith.parallel.collectives import Group, all_reduce, size_of

# Large enough that a reduction is bound by bandwidth, small enough that the copy of a bucket costs little memory.
BUCKET_BYTES = 64 * 2**20


def buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type gathered, in their order, until a bucket is full."""
    bucket: list[Tensor] = []
    held = 0
    for gradient in gradients:
        if bucket and (held >= BUCKET_BYTES or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(gradient)
        held += gradient.numel() * gradient.element_size()
    if bucket:
        yield bucket


@torch.no_grad()
def reduce_gradients(parameters: Iterable[Tensor], group: Group) -> None:
    """Sum the gradients over the group, in place. Every parameter has one: a missing gradient counts as zero."""
    if size_of(group) == 1:
        return
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    for bucket in buckets(gradients):
        flat = all_reduce(torch.cat([gradient.reshape(-1) for gradient in bucket]), group)
        offset = 0
        for gradient in bucket:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()
