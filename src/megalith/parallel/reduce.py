"""What ranks do with their gradients before the update, and with their weights after it, for replicas that hold both.

`Replicated` is plain data parallelism: gradients are summed in buckets, each as soon as the backward pass filled it.
`OptimizerSharded` (ZeRO stage 1, Rajbhandari et al. 2020, arXiv:1910.02054): each rank gets the sum of its rows only,
as early, updates them, and the rows are gathered. `FixedOrder` adds in an order that does not depend on the number of
replicas. Where gradients or weights themselves are sharded, FSDP2 does all this.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalith.parallel.collectives import (
    SUMMED,
    Group,
    all_gather,
    all_reduce,
    fixed_order_sum,
    rank_in,
    size_of,
    start_reduce_scatter,
)
from megalith.parallel.journal import JOURNAL

# Large enough that a reduction is bound by bandwidth, small enough that its copy costs little memory.
BUCKET_BYTES = 32 * 2**20


class Reduction(Protocol):
    """The sum of gradients over replicas."""

    def before_last_backward(self, passes: int = 1) -> None:
        """The next backward passes, so many through each part, are the step's last: what they complete may travel."""

    def after_last_backward(self) -> None:
        """They are over: what it did not complete leaves before anything else travels in the same group."""

    def finish(self) -> None:
        """All gradients that the optimizer will look at are those of the whole step."""

    def after_update(self) -> None:
        """The optimizer has changed what it was given; all ranks hold all weights again."""


def make_buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters gathered, last first, until a bucket is full: the backward pass fills them in about this order."""
    buckets: list[list[nn.Parameter]] = []
    held = BUCKET_BYTES
    for parameter in reversed(parameters):
        size = parameter.numel() * parameter.element_size()
        if held + size > BUCKET_BYTES:
            buckets.append([])
            held = 0
        buckets[-1].append(parameter)
        held += size
    return buckets


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """The gradient; a missing one counts as zero, since another rank may have one."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


class _Buckets:
    """Buckets of gradients that travel while the backward pass goes on, each as soon as it and those before are filled.

    One that some rank cannot fill, for it has no gradient for one of its parameters, would else leave there at another
    place among the others than elsewhere, and the sums be of different buckets.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: Group, *, overlap: bool) -> None:
        self._group = group
        self._buckets = make_buckets(parameters) if size_of(group) > 1 else []
        self._bucket_of = {id(p): number for number, bucket in enumerate(self._buckets) for p in bucket}
        self._missing: list[int] = []
        self._travelling: list[tuple[Any, Tensor]] = []
        self._overlap = overlap
        if overlap:
            for bucket in self._buckets:
                for parameter in bucket:
                    parameter.register_post_accumulate_grad_hook(self._filled)

    def before_last_backward(self, passes: int = 1) -> None:
        self._missing = [passes * len(bucket) for bucket in self._buckets]

    def _filled(self, parameter: Tensor) -> None:
        if not self._missing:
            return
        self._missing[self._bucket_of[id(parameter)]] -= 1
        while len(self._travelling) < len(self._buckets) and self._missing[len(self._travelling)] == 0:
            self._send_next()

    def _send_next(self) -> None:
        with torch.no_grad():
            self._travelling.append(self._start(self._buckets[len(self._travelling)]))

    def _start(self, bucket: Sequence[nn.Parameter]) -> tuple[Any, Tensor]:
        """What to wait for, and what is there then."""
        raise NotImplementedError

    def _arrived(self, bucket: Sequence[nn.Parameter], summed: Tensor) -> None:
        """Take over what has come."""
        raise NotImplementedError

    def after_last_backward(self) -> None:
        """What this rank could not complete leaves, so that it has the same place among what travels on every rank."""
        if self._overlap:
            self._send_rest()

    def _send_rest(self) -> None:
        while len(self._travelling) < len(self._buckets):
            self._send_next()

    @torch.no_grad()
    def finish(self) -> None:
        """All gradients that the optimizer will look at are those of the whole step."""
        self._send_rest()
        for bucket, (work, summed) in zip(self._buckets, self._travelling, strict=True):
            work.wait()
            JOURNAL.received(summed, SUMMED)
            self._arrived(bucket, summed)
        self._travelling, self._missing = [], []


class Replicated(_Buckets):
    """Every rank has all gradients, and sums them."""

    def _start(self, bucket: Sequence[nn.Parameter]) -> tuple[Any, Tensor]:
        flat = torch.cat([gradient_of(parameter).reshape(-1) for parameter in bucket])
        return dist.all_reduce(flat, group=self._group, async_op=True), flat

    def _arrived(self, bucket: Sequence[nn.Parameter], summed: Tensor) -> None:
        parts = summed.split([parameter.numel() for parameter in bucket])
        for parameter, part in zip(bucket, parts, strict=True):
            gradient_of(parameter).copy_(part.view_as(parameter))

    def after_update(self) -> None:
        """Every rank has updated every weight alike."""


class FixedOrder:
    """Sums over replicas by halves, whatever their number; see `collectives.fixed_order_sum`."""

    def __init__(self, parameters: Sequence[nn.Parameter], group: Group) -> None:
        self._buckets = make_buckets(parameters) if size_of(group) > 1 else []
        self._group = group

    def before_last_backward(self, passes: int = 1) -> None:
        """Nothing may travel early: the order is fixed."""

    def after_last_backward(self) -> None:
        """Nothing has travelled yet."""

    @torch.no_grad()
    def finish(self) -> None:
        for bucket in self._buckets:
            flat = torch.cat([gradient_of(parameter).reshape(-1) for parameter in bucket])
            total = fixed_order_sum(flat, self._group)
            parts = total.split([parameter.numel() for parameter in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                gradient_of(parameter).copy_(part.view_as(parameter))

    def after_update(self) -> None:
        """Every rank has updated every weight alike."""


class OptimizerSharded(_Buckets):
    """Each rank owns some rows of every parameter: their gradients are summed to it, and it updates them.

    shards: by name, the rows owned here, sharing memory with the parameter; and the number of the first.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], group: Group, *, overlap: bool) -> None:
        super().__init__(list(parameters.values()), group, overlap=overlap)
        self.shards: dict[str, tuple[nn.Parameter, int]] = {}
        self._shard_of: dict[int, nn.Parameter] = {}
        for name, parameter in parameters.items():
            first, count = self._rows(parameter)
            shard = nn.Parameter(parameter.data.narrow(0, first, count))
            self.shards[name] = (shard, first)
            self._shard_of[id(parameter)] = shard

    def _rows(self, parameter: Tensor) -> tuple[int, int]:
        share = self._share(parameter)
        first = min(rank_in(self._group) * share, parameter.shape[0])
        return first, min(share, parameter.shape[0] - first)

    def _share(self, parameter: Tensor) -> int:
        return -(-parameter.shape[0] // size_of(self._group))

    def _start(self, bucket: Sequence[nn.Parameter]) -> tuple[Any, Tensor]:
        return start_reduce_scatter(torch.cat([self._padded(gradient_of(p)) for p in bucket], 1), self._group)

    def _arrived(self, bucket: Sequence[nn.Parameter], summed: Tensor) -> None:
        for parameter, part in zip(bucket, summed[0].split(self._widths(bucket)), strict=True):
            shard = self._shard_of[id(parameter)]
            shard.grad = part[: shard.numel()].view_as(shard)
            parameter.grad = None

    @torch.no_grad()
    def after_update(self) -> None:
        for bucket in self._buckets:
            mine = torch.cat([self._row_of(parameter) for parameter in bucket])
            whole = all_gather(mine[None], 0, self._group)
            for parameter, part in zip(bucket, whole.split(self._widths(bucket), 1), strict=True):
                parameter.data.copy_(part.reshape(-1)[: parameter.numel()].view_as(parameter))

    def _padded(self, tensor: Tensor) -> Tensor:
        """[ranks, elements of a share]: the tensor's rows, filled up so that every rank has as many."""
        share, ranks = self._share(tensor), size_of(self._group)
        flat = tensor.reshape(tensor.shape[0], -1)
        missing = share * ranks - tensor.shape[0]
        # Padding copies, also where there is nothing to fill.
        return (nn.functional.pad(flat, (0, 0, 0, missing)) if missing else flat).reshape(ranks, -1)

    def _row_of(self, parameter: nn.Parameter) -> Tensor:
        shard = self._shard_of[id(parameter)].detach().reshape(-1)
        return nn.functional.pad(shard, (0, self._widths([parameter])[0] - shard.numel()))

    def _widths(self, bucket: Sequence[Tensor]) -> list[int]:
        return [self._share(parameter) * (parameter.numel() // parameter.shape[0]) for parameter in bucket]


class Sharded:
    """FSDP2 sums and gathers.

    It reduces after every backward pass, since it keeps only shards of gradients. keep_gathered: what is gathered for
    the first microbatch of a step serves for the others too.
    """

    def __init__(self, parts: Sequence[Any], *, keep_gathered: bool) -> None:
        self._parts = parts if keep_gathered else ()
        self.finish()

    def before_last_backward(self, passes: int = 1) -> None:
        """The optimizer will change the shards, so nothing gathered may stay."""
        for part in self._parts:
            part.set_reshard_after_backward(True)

    def after_last_backward(self) -> None:
        """FSDP2 has reduced in it."""

    def finish(self) -> None:
        """The gradients are the shards of the sums."""
        for part in self._parts:
            part.set_reshard_after_backward(False)

    def after_update(self) -> None:
        """FSDP2 gathers weights where they are used."""


@torch.no_grad()
def sum_gradients(gradients: Sequence[Tensor], group: Group) -> None:
    """Sum a few small gradients over a group with one collective, in place."""
    if size_of(group) == 1 or not gradients:
        return
    flat = all_reduce(torch.cat([gradient.reshape(-1) for gradient in gradients]), group)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
