"""A model laid over the ranks: everything that is done to it, in one visible order."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalith.layers.float8 import use_float8
from megalith.layers.initial import Shard, draw_weights
from megalith.layers.linear import split_backward_passes
from megalith.optim.local import local_part
from megalith.parallel.collectives import Group, all_reduce, size_of
from megalith.parallel.context import cut_context
from megalith.parallel.contrast import share_candidates
from megalith.parallel.mesh import Groups, Layout
from megalith.parallel.narrow import AddedUp, Narrowed
from megalith.parallel.recompute import compile_blocks, recompute_blocks, recomputes_inside
from megalith.parallel.reduce import (
    FixedOrder,
    OptimizerSharded,
    Reduction,
    Replicated,
    Sharded,
    gradient_of,
    sum_gradients,
)
from megalith.parallel.settings import SPLIT_BACKWARD, ParallelConfig
from megalith.parallel.stages import assign_layers
from megalith.parallel.step import Engine, OrderedWholeModel, RunPart, WholeModel
from megalith.parallel.tensor import Cut, split_tensors

# The table that stands on the first and on the last stage, if it is tied.
TIED = "word_embedding.weight"


class BuildPart(Protocol):
    """Builds, on the meta device, the part of a model with these layers."""

    def __call__(self, *, layers: range, first: bool, last: bool) -> nn.Module: ...


@dataclass(frozen=True)
class Sizes:
    """What the layout needs to know of a model."""

    num_layers: int
    width: int
    first_cost: float  # of the embedding, in layers
    last_cost: float  # of the output layer and the loss, in layers
    stream_dtype: torch.dtype
    num_losses: int
    tokens: int  # places of a sample in the stream
    entering: str = "tokens"  # the entry of a batch that enters the first part


@dataclass(frozen=True)
class Held:
    """What this rank holds of a parameter for the optimizer and for checkpoints."""

    parameter: nn.Parameter
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    counted: bool  # this rank adds it to a norm over all ranks; of several copies one does


class Trained(nn.Module):
    """The parameters that the optimizer updates, under the names that they have in the whole model."""

    def __init__(self, held: Mapping[str, Held]) -> None:
        super().__init__()
        self.held = dict(held)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, held.parameter) for name, held in self.held.items())


@dataclass
class Laid:
    """A model on its ranks."""

    parts: dict[int, nn.Module]  # held here, by number
    engine: Engine
    trained: Trained
    reduction: Reduction
    cuts: dict[str, Cut]
    groups: Groups
    has_tied_copy: bool  # the tied table stands on the first and on the last stage
    num_parameters: int  # held here

    def finish_gradients(self) -> None:
        """After the last backward pass: every gradient that the optimizer looks at is whole; in place."""
        self.reduction.finish()
        # Sums over other ranks than replicas are of what these have, which travelled during the backward pass.
        held = {name: one.parameter for name, one in self.trained.held.items()}
        by_rank = [parameter for name, parameter in held.items() if self.cuts[name].partial_gradient]
        sum_gradients([local_part(gradient_of(parameter)) for parameter in by_rank], self.groups.tensor)
        if self.has_tied_copy and self.groups.embedding is not None:
            sum_gradients([local_part(gradient_of(held[TIED]))], self.groups.embedding)

    def clear_gradients(self) -> None:
        """Forget all gradients, in place."""
        for part in self.parts.values():
            part.zero_grad(set_to_none=True)
        for held in self.trained.held.values():
            held.parameter.grad = None

    def gradients(self, *, counted: bool | None = None) -> list[Tensor]:
        """What lies here of the gradients that the optimizer looks at.

        counted: only what this rank adds to a norm, or only the copies that another rank adds.
        """
        held = [h for h in self.trained.held.values() if counted is None or h.counted == counted]
        return [local_part(gradient_of(h.parameter)) for h in held]

    def weights(self, *, counted: bool = False) -> list[Tensor]:
        """What lies here of the weights."""
        return [local_part(h.parameter) for h in self.trained.held.values() if h.counted or not counted]

    def total(self, found: Tensor) -> Tensor:
        """The sum over all ranks."""
        return all_reduce(found, self.groups.world)

    def largest(self, found: Tensor) -> Tensor:
        """The maximum over all ranks."""
        return all_reduce(found, self.groups.world, dist.ReduceOp.MAX)


def lay_out(
    build_part: BuildPart,
    run_part: RunPart,
    sizes: Sizes,
    config: ParallelConfig,
    layout: Layout,
    groups: Groups,
    *,
    device: torch.device,
    seed: int | None,
    recompute: str | None,
    compiled: bool,
    compute_dtype: torch.dtype,
    is_tied: bool,
) -> Laid:
    """Build this rank's parts of the model and connect them with those of the others.

    seed: of the weights; None leaves them on the meta device. recompute: full, selective or None. compiled: whether
    every block is.
    """
    if config.deterministic:
        fix_arithmetic(device)
    sharded = config.data_parallel_sharding in ("gradients", "parameters") and groups.replicas is not None
    # Whether no other rank takes part in a block, and each block's input is kept.
    alone = not sharded and size_of(groups.tensor) == size_of(groups.context) == config.checkpoint_num_layers == 1
    parts = _build_parts(build_part, sizes, config, layout)
    cuts: dict[str, Cut] = {}
    for part in parts.values():
        cuts |= split_tensors(part, groups.tensor, sequence=config.sequence_parallel)
        cut_context(part, groups.context, exchange=config.context_exchange)
        if layout.pipeline > 1 and config.pipeline_schedule == SPLIT_BACKWARD:
            split_backward_passes(part)
        if config.fp8_format is not None:
            use_float8(part, config.fp8_format)  # type: ignore[arg-type]
        share_candidates(part, groups.replicas)
        inside = compiled and alone and recomputes_inside(part, recompute, device=device)
        if not inside:
            saved_over = _saved_over(config, groups)
            recompute_blocks(part, recompute, every=config.checkpoint_num_layers, group=saved_over, compiled=compiled)
        if compiled:
            budget = config.activation_memory_budget
            # What tensor ranks exchange goes on beside products.
            ordered = size_of(groups.tensor) > 1
            compile_blocks(part, memory_budget=budget, device=device, recompute_inside=inside, keep_order=ordered)
    count = sum(parameter.numel() for part in parts.values() for parameter in part.parameters())
    if sharded:
        # FSDP2 takes seconds to import.
        from megalith.parallel.shard import replica_mesh, shard_parameters

        mesh = replica_mesh(groups, device)
        for part in parts.values():
            shard_parameters(part, mesh, config, compute_dtype)
    if seed is not None:
        for part in parts.values():
            _take_memory(part, device)
            by_id = {id(p): name for name, p in part.named_parameters()}
            draw_weights(part, seed, shard_of=lambda p, by_id=by_id: _shard(p, cuts[by_id[id(p)]]))  # type: ignore[misc]
    parameters = {name: p for part in parts.values() for name, p in part.named_parameters()}
    copies = is_tied and layout.pipeline > 1 and not layout.is_first_stage
    held = {name: _held(name, p, cuts[name], layout, _counts(config, layout), copies) for name, p in parameters.items()}
    reduction = _reduction(parts, parameters, config, groups, sharded, layout)
    if isinstance(reduction, OptimizerSharded):
        held = _held_by_rows(reduction, held)
    engine = _engine(parts, run_part, sizes, config, layout, groups, reduction, device)
    if device.type == "cuda" and compute_dtype != torch.float32 and not sharded:
        engine = AddedUp(engine, parts.values())
        if recompute != "full" and config.activation_memory_budget is None:
            engine = Narrowed(engine, parts.values(), compute_dtype)
    return Laid(parts, engine, Trained(held), reduction, cuts, groups, is_tied and layout.pipeline > 1, count)


def _take_memory(part: nn.Module, device: torch.device) -> None:
    """Give the parameters memory on a device, in place; what it holds is left as it is found."""

    def empty(tensor: Tensor) -> Tensor:
        if hasattr(tensor, "placements"):
            return torch.empty_like(tensor, device=device)
        # empty_like of a meta tensor, which Module.to_empty takes, imports sympy: 0.5 CPU-seconds of start-up.
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    part._apply(empty)


def fix_arithmetic(device: torch.device) -> None:
    """Let this process compute the same bits for the same numbers, whatever the machine; it stays so.

    On a CPU the number of threads decides in which order products are summed, so there is one; on a GPU PyTorch must
    choose algorithms without atomic additions, which raises RuntimeError where it has none.
    """
    if device.type == "cpu":
        torch.set_num_threads(1)
        return
    # Read when the first product of the process is computed.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def _build_parts(build_part: BuildPart, sizes: Sizes, config: ParallelConfig, layout: Layout) -> dict[int, nn.Module]:
    """This rank's parts on the meta device, by their number in the whole model."""
    chunks = num_chunks(config, sizes.num_layers)
    assigned = assign_layers(
        sizes.num_layers, layout.pipeline, chunks, first_cost=sizes.first_cost, last_cost=sizes.last_cost
    )
    stage, last = layout.place("pipeline"), layout.pipeline * chunks - 1
    numbers = [chunk * layout.pipeline + stage for chunk in range(chunks)]
    return {
        number: build_part(layers=layers, first=number == 0, last=number == last)
        for number, layers in zip(numbers, assigned[stage], strict=True)
    }


def num_chunks(config: ParallelConfig, num_layers: int) -> int:
    """Parts of the model per rank."""
    per_chunk = config.num_layers_per_virtual_pipeline_stage
    if per_chunk is None:
        return 1
    return num_layers // config.pipeline_model_parallel_size // per_chunk


def _saved_over(config: ParallelConfig, groups: Groups) -> Group:
    return groups.tensor if config.distribute_checkpointed_activations else None


def _shard(parameter: nn.Parameter, cut: Cut) -> Shard:
    """What `draw_weights` needs: this rank's part, cut over tensor ranks and perhaps again over replicas."""
    offset = [a + b for a, b in zip(cut.offset, shard_offset(parameter), strict=True)]
    return Shard(local_part(parameter), cut.whole, offset)


def shard_offset(parameter: Tensor) -> tuple[int, ...]:
    """Where this rank's shard begins in the parameter as it was before it was sharded over replicas."""
    if not hasattr(parameter, "placements"):
        return (0,) * parameter.dim()
    from megalith.parallel.shard import offset_of_shard

    return offset_of_shard(parameter)


def _counts(config: ParallelConfig, layout: Layout) -> bool:
    """Whether this rank, of those with the same part of the model, adds what it holds to a norm."""
    replica = layout.place("data") * layout.context + layout.place("context")
    if config.data_parallel_sharding == "none":
        return replica == 0
    # Where rows are shared out every rank adds its own, or those of the first group that shares them out.
    return config.data_parallel_shard_size is None or replica < config.data_parallel_shard_size


def _held(name: str, parameter: nn.Parameter, cut: Cut, layout: Layout, counts: bool, copies: bool) -> Held:
    offset = tuple(a + b for a, b in zip(cut.offset, shard_offset(parameter), strict=True))
    counted = (layout.place("tensor") == 0 or not cut.is_copy) and counts
    return Held(parameter, cut.whole, offset, counted and not (copies and name == TIED))


def _held_by_rows(reduction: OptimizerSharded, held: Mapping[str, Held]) -> dict[str, Held]:
    """The rows that this rank owns, where the optimizer's state is sharded."""
    owned = {}
    for name, (shard, first) in reduction.shards.items():
        whole = held[name]
        offset = (whole.offset[0] + first, *whole.offset[1:])
        owned[name] = Held(shard, whole.whole, offset, counted=whole.counted)
    return owned


def _reduction(
    parts: Mapping[int, nn.Module],
    parameters: Mapping[str, nn.Parameter],
    config: ParallelConfig,
    groups: Groups,
    sharded: bool,
    layout: Layout,
) -> Reduction:
    if sharded:
        # Pipeline stages tell FSDP2 themselves which backward pass is the last.
        keep_gathered = config.data_parallel_sharding == "gradients" and layout.pipeline == 1
        return Sharded(list(parts.values()), keep_gathered=keep_gathered)
    if config.deterministic:
        return FixedOrder(list(parameters.values()), groups.replicas)
    # torch's pipelines do not tell when they have made the gradients of weights by themselves.
    overlap = layout.pipeline == 1 or schedule_of(config) != SPLIT_BACKWARD
    if config.data_parallel_sharding == "optimizer" and groups.replicas is not None:
        return OptimizerSharded(parameters, groups.replicas, overlap=overlap)
    return Replicated(list(parameters.values()), groups.replicas, overlap=overlap)


def _engine(
    parts: Mapping[int, nn.Module],
    run_part: RunPart,
    sizes: Sizes,
    config: ParallelConfig,
    layout: Layout,
    groups: Groups,
    reduction: Reduction,
    device: torch.device,
) -> Engine:
    if layout.pipeline == 1:
        model = parts[0]
        if config.deterministic:
            return OrderedWholeModel(model, run_part, groups.replicas, entering=sizes.entering)
        return WholeModel(model, run_part, reduction, groups.replicas, entering=sizes.entering)
    from megalith.parallel.pipeline import Pipeline

    assert groups.pipeline is not None
    tokens = sizes.tokens // layout.context
    if config.sequence_parallel:
        tokens //= layout.tensor
    return Pipeline(
        parts,
        run_part,
        num_parts=layout.pipeline * num_chunks(config, sizes.num_layers),
        schedule=schedule_of(config),
        group=groups.pipeline,
        device=device,
        stream_shape=(tokens, sizes.width),
        stream_dtype=sizes.stream_dtype,
        reduction=reduction,
        num_losses=sizes.num_losses,
        entering=sizes.entering,
        sums_over=(groups.replicas, groups.pipeline),
    )


def schedule_of(config: ParallelConfig) -> str:
    """The schedule asked for, or the usual one for one part or several on a rank."""
    if config.pipeline_schedule is not None:
        return config.pipeline_schedule
    return "1f1b" if config.num_layers_per_virtual_pipeline_stage is None else "interleaved"
