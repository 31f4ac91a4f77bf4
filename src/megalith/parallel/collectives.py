"""Collectives with gradients: what goes forward over a group of ranks, and what comes back.

Each pair is conjugate, so that a model cut over a group has the gradients of the whole one. A group of one rank, or
none, costs nothing. Sums run over ranks in the order that the backend chooses; `fixed_order_sum` is for when that must
not matter.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megalith.layers.entering import Started
from megalith.parallel.journal import JOURNAL

Group = ProcessGroup | None
# What is noted of a collective.
SUMMED, GATHERED = "a sum over ranks", "what ranks gather"


def size_of(group: Group) -> int:
    """Ranks in a group; 1 for no group."""
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: Group) -> int:
    """This rank's number inside a group; 0 for no group."""
    return 0 if group is None else dist.get_rank(group)


def all_gather(local: Tensor, dim: int, group: Group) -> Tensor:
    """The parts of all ranks joined along dim, in rank order. No gradient."""
    if size_of(group) == 1:
        return local
    moved = local.movedim(dim, 0).contiguous()
    JOURNAL.made(moved, GATHERED)
    _, whole = start_all_gather(moved, group, is_waited_for=True)
    JOURNAL.received(whole, GATHERED)
    return whole.movedim(0, dim)


def reduce_scatter(whole: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part along dim of the sum over ranks. No gradient."""
    ranks = size_of(group)
    if ranks == 1:
        return whole
    moved = whole.movedim(dim, 0).contiguous()
    JOURNAL.made(moved, SUMMED)
    _, local = start_reduce_scatter(moved, group, is_waited_for=True)
    JOURNAL.received(local, SUMMED)
    return local.movedim(0, dim)


def start_all_gather(local: Tensor, group: Group, *, is_waited_for: bool = False) -> tuple[Any, Tensor]:
    """What to wait for, and where the parts of all ranks joined along the first dimension will be.

    is_waited_for: as of `start_reduce_scatter`.
    """
    whole = local.new_empty((size_of(group) * local.shape[0], *local.shape[1:]))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name until torch 2.12
    return gather(whole, local, group=group, async_op=not is_waited_for), whole


def start_reduce_scatter(whole: Tensor, group: Group, *, is_waited_for: bool = False) -> tuple[Any, Tensor]:
    """What to wait for, and where this rank's part along the first dimension of the sum over ranks will be.

    is_waited_for: it is there already; all that the compiler can take in.
    """
    local = whole.new_empty((whole.shape[0] // size_of(group), *whole.shape[1:]))
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # the name until torch 2.12
    return scatter(local, whole, group=group, async_op=not is_waited_for), local


def all_reduce(value: Tensor, group: Group, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """The reduction over ranks, as a new tensor. No gradient."""
    if size_of(group) == 1:
        return value
    value = value.clone(memory_format=torch.contiguous_format)
    JOURNAL.made(value, SUMMED)
    dist.all_reduce(value, op=op, group=group)
    JOURNAL.received(value, SUMMED)
    return value


def start_gather(local: Tensor, group: Group, *, after: Tensor) -> Started:
    """`all_gather` along the first dimension, under way until it is waited for. after: what the backward pass was given
    in which this is."""
    assert group is not None
    if torch.compiler.is_compiling():
        gathered = _start_gather_op(local, after, size_of(group), group.group_name)
        return lambda: torch.ops._c10d_functional.wait_tensor(gathered)
    local = local.contiguous()
    JOURNAL.made(local, GATHERED)
    return _waiting(*start_all_gather(local, group), GATHERED)


@torch.library.custom_op("megalith::start_gather", mutates_args=())
def _start_gather_op(local: Tensor, after: Tensor, ranks: int, group: str) -> Tensor:
    """Gathering as an operation of a backward pass alone, to be waited for: the compiler would take torch's own for the
    same as that of the forward pass, and keep what came of it."""
    # In memory that nothing else is given before this has ended.
    local = local.clone(memory_format=torch.contiguous_format)
    gathered: Tensor = torch.ops._c10d_functional.all_gather_into_tensor(local, ranks, group)
    return gathered


@_start_gather_op.register_fake
def _(local: Tensor, after: Tensor, ranks: int, group: str) -> Tensor:
    return local.new_empty((ranks * local.shape[0], *local.shape[1:]))


def start_scatter_sum(whole: Tensor, group: Group) -> Started:
    """`reduce_scatter` along the first dimension, under way until it is waited for."""
    assert group is not None
    whole = whole.contiguous()
    if torch.compiler.is_compiling():
        part = torch.ops._c10d_functional.reduce_scatter_tensor(whole, "sum", size_of(group), group.group_name)
        return lambda: torch.ops._c10d_functional.wait_tensor(part)
    JOURNAL.made(whole, SUMMED)
    return _waiting(*start_reduce_scatter(whole, group), SUMMED)


def start_sum(value: Tensor, group: Group) -> Started:
    """The sum over ranks, perhaps in place, under way until it is waited for."""
    assert group is not None
    if torch.compiler.is_compiling():
        summed = torch.ops._c10d_functional.all_reduce(value, "sum", group.group_name)
        return lambda: torch.ops._c10d_functional.wait_tensor(summed)
    value = value.contiguous()
    JOURNAL.made(value, SUMMED)
    return _waiting(dist.all_reduce(value, group=group, async_op=True), value, SUMMED)


def _waiting(work: Any, arriving: Tensor, what: str) -> Started:
    def wait() -> Tensor:
        work.wait()
        JOURNAL.received(arriving, what)
        return arriving

    return wait


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return all_reduce(gradients[0], ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        total = all_reduce(value, group)
        # torch 2.11's compiler gives zeros as the gradient by what was changed in place; it fuses the copy away.
        return total.clone() if torch.compiler.is_compiling() else total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, dim: int, group: Group, summed: bool) -> Tensor:
        ctx.dim, ctx.group, ctx.summed = dim, group, summed
        return all_gather(local, dim, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.summed:
            return reduce_scatter(gradients[0], ctx.dim, ctx.group), None, None, None
        part = gradients[0].chunk(size_of(ctx.group), ctx.dim)[rank_in(ctx.group)]
        return part.contiguous(), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, dim: int, group: Group, summed: bool) -> Tensor:
        ctx.dim, ctx.group = dim, group
        if summed:
            return reduce_scatter(whole, dim, group)
        # Not contiguous(), which may give a view: torch 2.11's compiler gives zeros as the gradient by that.
        return whole.chunk(size_of(group), dim)[rank_in(group)].clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return all_gather(gradients[0], ctx.dim, ctx.group), None, None, None


def copy_to_group(value: Tensor, group: Group) -> Tensor:
    """The value itself; its gradients are summed over the group. Before a column-parallel product."""
    return value if size_of(group) == 1 else _Copy.apply(value, group)


def reduce_from_group(value: Tensor, group: Group) -> Tensor:
    """The sum over the group; its gradient is passed on as it is. After a row-parallel product."""
    return value if size_of(group) == 1 else _Reduce.apply(value, group)


def gather_for_product(local: Tensor, dim: int, group: Group) -> Tensor:
    """All parts along dim; gradients are summed and cut. Before a column-parallel product of a cut sequence."""
    return local if size_of(group) == 1 else _Gather.apply(local, dim, group, True)


def gather_copies(local: Tensor, dim: int, group: Group) -> Tensor:
    """All parts along dim, for work that every rank does alike; each rank keeps its part of the gradient."""
    return local if size_of(group) == 1 else _Gather.apply(local, dim, group, False)


def scatter_sum(whole: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part of the sum; gradients are gathered. After a row-parallel product, for a cut sequence."""
    return whole if size_of(group) == 1 else _Scatter.apply(whole, dim, group, True)


def scatter_copies(whole: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part of what all ranks hold alike; gradients are gathered."""
    return whole if size_of(group) == 1 else _Scatter.apply(whole, dim, group, False)


def fixed_order_sum(value: Tensor, group: Group) -> Tensor:
    """The sum over the group, added pairwise by halves (rank r and r + n/2 first), so that it nests for n, n/2, ...

    An odd one out is added last.
    """
    parts: list[Tensor] = list(all_gather(value[None], 0, group))
    while len(parts) > 1:
        half = len(parts) // 2
        odd = parts[2 * half :]
        parts = [parts[i] + parts[i + half] for i in range(half)] + odd
    return parts[0]
