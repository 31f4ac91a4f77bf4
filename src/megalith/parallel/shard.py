"""Sharded gradients and parameters (ZeRO stages 2 and 3) by FSDP2 (torch.distributed.fsdp.fully_shard).

Every block is a unit that is gathered for its forward pass; gradients are reduced to shards as they come. Sums, not
means, leave the reduction: the loss is divided by the global count already. With a shard size (hybrid sharding) the
gathers stay within that many ranks, and what they have summed is summed over the groups.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megalith.layers.block import Block
from megalith.parallel.collectives import SUMMED, size_of
from megalith.parallel.journal import JOURNAL
from megalith.parallel.mesh import Groups
from megalith.parallel.settings import ParallelConfig


def shard_parameters(part: nn.Module, mesh: DeviceMesh, config: ParallelConfig, compute_dtype: torch.dtype) -> None:
    """Shard the parameters of a part over the replicas, in place. mesh: as `replica_mesh` makes it.

    Inside blocks every use of a weight casts it to the type of the computation, so it travels in that type with the
    same result; the tables outside stay fp32.
    """
    regather = config.data_parallel_sharding == "parameters"
    narrow = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in part.modules():
        if isinstance(module, Block):
            _sum(fully_shard(module, mesh=mesh, mp_policy=narrow, reshard_after_forward=regather))
    _sum(fully_shard(part, mesh=mesh, mp_policy=whole, reshard_after_forward=regather))


def replica_mesh(groups: Groups, device: torch.device) -> DeviceMesh:
    """The replicas of this rank's parts: in one line, or in rows of shards that hold copies of each other."""
    assert groups.replicas is not None
    if groups.shards is None or groups.copies is None:
        return DeviceMesh.from_group(groups.replicas, device.type, mesh_dim_names=("replicas",))
    ranks = torch.tensor(dist.get_process_group_ranks(groups.replicas)).view(-1, size_of(groups.shards))
    axes = ("copies", "shards")
    return DeviceMesh.from_group([groups.copies, groups.shards], device.type, ranks, mesh_dim_names=axes)


def become_root(around: nn.Module, part: nn.Module) -> None:
    """Make a module around a sharded part the one that FSDP2 and pipeline stages talk to; in place."""
    sharded = next(iter(part.parameters()))
    assert isinstance(sharded, DTensor)
    fully_shard(around, mesh=sharded.device_mesh)


class _NotedReduceScatter(DefaultReduceScatter):
    """FSDP2's own, but what this rank adds to the sum is noted."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        JOURNAL.made(input_tensor, SUMMED)
        return super().__call__(output_tensor, input_tensor, *args, **kwargs)


def _sum(module: Any) -> None:
    module.set_gradient_divide_factor(1.0)
    # gloo has no reduction that scales as it sums.
    module.set_force_sum_reduction_for_comms(True)
    module.set_custom_reduce_scatter(_NotedReduceScatter())


def offset_of_shard(parameter: Tensor) -> tuple[int, ...]:
    """Where this rank's shard begins in a sharded parameter."""
    assert isinstance(parameter, DTensor)
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return cast(tuple[int, ...], tuple(offset))
