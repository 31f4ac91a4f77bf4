"""What is done to all gradients together: unscaling, looking for overflow, the global norm, clipping.

The sums run over what this rank holds; a `reduce` adds what the ranks found. Its default is one rank. Where ranks hold
copies of a tensor, only one of them counts it: the caller chooses by what it passes. Cut tensors (DTensors) count by
the part that lies here.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megalith.optim.local import local_part

# Takes the scalar that a rank found, gives that of all ranks.
Reduction = Callable[[Tensor], Tensor]

ROW = 256  # elements summed in fp32 before fp64 takes over
CLIP_EPSILON = 1e-6  # keeps the factor finite for a zero gradient; Megatron-LM's value


def one_rank(found: Tensor) -> Tensor:
    """The reduction of a run on one rank."""
    return found


@torch.no_grad()
def unscale_gradients(gradients: Iterable[Tensor], scale: float) -> Tensor:
    """Divide the gradients by the loss scale, in place; give 1.0 if any was infinite or NaN, else 0.0.

    One pass over the gradients, which must be floating-point tensors on one device; at least one. The result is a
    scalar on that device, of this rank alone: see `finite.measure`.
    """
    local = [local_part(gradient) for gradient in gradients]
    found = torch.zeros((), dtype=torch.float32, device=local[0].device)
    inverse = torch.full((), 1.0 / scale, dtype=torch.float32, device=local[0].device)
    torch._amp_foreach_non_finite_check_and_unscale_(local, found, inverse)
    return found


@torch.no_grad()
def global_norm(tensors: Iterable[Tensor], *, device: torch.device, reduce: Reduction = one_rank) -> Tensor:
    """The L2 norm of all tensors together, an fp64 scalar on the device; of gradients or of weights.

    tensors: those that this rank counts, possibly none. reduce: the sum over ranks of squared norms.
    """
    local = [part for tensor in tensors if (part := local_part(tensor)).numel()]
    total = torch.zeros((), dtype=torch.float64, device=device)
    if local:
        total = torch.cat(_norms(local)).double().square().sum()
    norm: Tensor = reduce(total).sqrt()
    return norm


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """Norms of parts that make up the tensors, as vectors. On one device, none empty."""
    if tensors[0].device.type != "cpu":
        return [torch.stack(torch._foreach_norm(tensors))]
    # The CPU's norm adds one element after the other in fp32: 2e-3 off for 40 million elements, and differently so for
    # every way of cutting them. Rows of 256 are 1e-10 off at the same speed.
    parts = []
    for tensor in tensors:
        flat = tensor.reshape(-1)
        whole = flat.numel() // ROW * ROW
        parts.append(torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1))
        parts.append(torch.linalg.vector_norm(flat[whole:]).reshape(1))
    return parts


def is_clipped(norm: float, max_norm: float) -> bool:
    """Whether gradients of this norm are to be made smaller; 1 is what `clip_gradients` multiplies by otherwise."""
    return norm + CLIP_EPSILON > max_norm


@torch.no_grad()
def clip_gradients(gradients: Iterable[Tensor], norm: Tensor, max_norm: float, *, scale: float = 1.0) -> None:
    """Divide all gradients by the loss scale, and let their global L2 norm become at most max_norm, in place.

    norm: that of the gradients divided by the scale. Beside the scale the factor is max_norm / (norm + 1e-6), if it is
    below 1. A norm that is not finite makes gradients NaN or 0: look at it first. Nothing waits for the device.
    """
    scaled = [local_part(gradient) for gradient in gradients]
    torch._foreach_mul_(scaled, ((max_norm / (norm + CLIP_EPSILON)).clamp(max=1.0) / scale).float())


@torch.no_grad()
def count_zeros(gradients: Iterable[Tensor], *, device: torch.device, reduce: Reduction = one_rank) -> Tensor:
    """How many gradient entries are 0, an int64 scalar on the device. reduce: the sum over ranks."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for gradient in gradients:
        local = local_part(gradient)
        total += local.numel() - torch.count_nonzero(local)
    return reduce(total)
