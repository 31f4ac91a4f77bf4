"""Tensors that may be cut: DTensors, as FSDP2 and tensor parallelism make them."""

from torch import Tensor


def local_part(tensor: Tensor) -> Tensor:
    """What lies on this rank of a tensor that may be cut, sharing its memory, outside of any autograd graph."""
    # Asked by attribute, so that a run on one rank need not import torch.distributed.tensor (a second of start-up).
    to_local = getattr(tensor, "to_local", None)
    local: Tensor = tensor if to_local is None else to_local()
    return local.detach() if local.requires_grad else local
