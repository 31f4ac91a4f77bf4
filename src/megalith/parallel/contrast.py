"""Losses in which samples are compared with each other: what every replica made of its own is gathered by all.

Each replica computes the losses of its own samples against those of all; the gradients that all losses have for a
sample's embedding are summed where it was made. So the sum over replicas is the loss over the whole microbatch.
"""

from functools import partial

from torch import Tensor, nn

from megalith.parallel.collectives import Group, gather_for_product, rank_in, size_of


def share_candidates(model: nn.Module, replicas: Group) -> None:
    """Let a model that compares samples see those of all replicas; in place. Such a model has the seam gathered."""
    if size_of(replicas) > 1 and hasattr(model, "gathered"):
        model.gathered = partial(gather_candidates, group=replicas)  # type: ignore[assignment]


def gather_candidates(own: Tensor, *, group: Group) -> tuple[Tensor, int]:
    """The rows of all replicas, in rank order, and at which one's own begin. All replicas have as many."""
    return gather_for_product(own, 0, group), rank_in(group) * len(own)
