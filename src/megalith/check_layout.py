"""Whether a run fits on its ranks: what has to divide what, and what cannot be combined, all at once.

The rules are Megatron-LM's where it has the setting, and those of the parts that take their place otherwise.
"""

from collections.abc import Iterator

from megalith.config import Fault, Run, fault
from megalith.derived import given_length, global_batch_size, num_layers, recompute_granularity
from megalith.models.shape import inner_width
from megalith.parallel.settings import SPLIT_BACKWARD
from megalith.terminal import counted

# Schedules that hold several parts of the model on a rank.
OF_SEVERAL_PARTS = ("interleaved", SPLIT_BACKWARD)
MOST_PARTS = 1 << 20  # no model is shared out by more ranks


def layout_faults(run: Run, world_size: int) -> list[Fault]:
    """Every fault of how the run is laid over that many ranks."""
    parallel = run.parallel
    sizes = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    if min(sizes) < 1:
        return []
    return [
        *_world(run, world_size),
        *_tensor(run),
        *_sequence(run),
        *_context_heads(run),
        *_parts(run),
        *_schedule(run),
        *_microbatches(run, world_size),
        *_replicas(run, world_size),
        *_recomputation(run),
        *_compiler(run),
    ]


def num_replicas(run: Run, world_size: int) -> int | None:
    """Ranks with batches of their own; None where the ranks cannot be shared out."""
    model_ranks = (
        run.parallel.tensor_model_parallel_size
        * run.parallel.pipeline_model_parallel_size
        * run.parallel.context_parallel_size
    )
    return world_size // model_ranks if model_ranks > 0 and world_size % model_ranks == 0 else None


def divisors(number: int) -> list[int]:
    """What divides it, in order, up to MOST_PARTS."""
    return [n for n in range(1, min(number, MOST_PARTS) + 1) if number % n == 0]


def _world(run: Run, world_size: int) -> Iterator[Fault]:
    if num_replicas(run, world_size) is not None:
        return
    others = f"--pipeline-model-parallel-size = {run.parallel.pipeline_model_parallel_size}"
    if run.parallel.context_parallel_size > 1:
        others += f" x --context-parallel-size = {run.parallel.context_parallel_size}"
    yield fault(
        "tensor_model_parallel_size",
        run.parallel.tensor_model_parallel_size,
        f"times {others} does not divide the {world_size} ranks",
        f"Products that fit: {divisors(world_size)}; or start another number of ranks (torchrun --nproc-per-node)",
    )


def _tensor(run: Run) -> Iterator[Fault]:
    """What is cut over tensor ranks: whole heads, and inner features."""
    size, model = run.parallel.tensor_model_parallel_size, run.model
    heads, inner = model.num_attention_heads, inner_width(model)
    shared = model.num_query_groups if model.group_query_attention else 0
    fits = [n for n in divisors(heads or 1) if inner % n == 0 and shared % n == 0]
    remedy = f"Tensor-parallel sizes that fit this model: {fits}"
    if heads and heads % size:
        rule = f"is not divisible by --tensor-model-parallel-size = {size}"
        yield fault("num_attention_heads", heads, rule, remedy)
    if shared > 0 and shared % size:
        rule = f"is not divisible by --tensor-model-parallel-size = {size}, whose ranks hold whole groups"
        yield fault("num_query_groups", shared, rule, remedy)
    if inner and inner % size:
        rule = f"is not divisible by --tensor-model-parallel-size = {size}"
        yield fault("ffn_hidden_size", inner, rule, remedy)


def _sequence(run: Run) -> Iterator[Fault]:
    """What is cut along the tokens: over context ranks, and the stream between blocks over tensor ranks."""
    name, length = given_length(run)
    if length is None or length < 1 or run.task == "vit":  # a vit's places are checked with its patches
        return
    context, tensor = run.parallel.context_parallel_size, run.parallel.tensor_model_parallel_size
    if context > 1 and length % (2 * context):
        fits = [n for n in range(1, 65) if n == 1 or length % (2 * n) == 0]
        yield fault(
            name,
            length,
            f"is not divisible by 2 x --context-parallel-size = {2 * context}",
            f"Context-parallel sizes that fit: {fits}; or the nearest lengths: {_nearest(length, 2 * context)}",
        )
    kept = run.parallel.distribute_checkpointed_activations
    why = "--sequence-parallel" if run.parallel.sequence_parallel else "--distribute-checkpointed-activations"
    if (run.parallel.sequence_parallel or kept) and length % (context * tensor):
        ranks = f"--tensor-model-parallel-size = {tensor}"
        if context > 1:
            ranks += f" x --context-parallel-size = {context}"
        yield fault(
            name,
            length,
            f"is not divisible by {ranks}, over which {why} cuts it",
            f"Nearest lengths: {_nearest(length, context * tensor)}; or leave {why} out",
        )


def _nearest(number: int, divisor: int) -> list[int]:
    below = number // divisor * divisor
    return [n for n in (below, below + divisor) if n > 0]


def _context_heads(run: Run) -> Iterator[Fault]:
    context, tensor = run.parallel.context_parallel_size, run.parallel.tensor_model_parallel_size
    heads, kind = run.model.num_attention_heads, "heads"
    if run.model.group_query_attention:
        heads, kind = run.model.num_query_groups, "groups of heads"
    if context == 1 or run.parallel.context_exchange != "all-to-all" or not heads or heads < 1 or heads % tensor:
        return
    if (heads // tensor) % context:
        yield fault(
            "context_parallel_size",
            context,
            f"does not divide the {heads // tensor} {kind} of a tensor rank, which "
            "--context-exchange all-to-all trades",
            f"Sizes that fit: {divisors(heads // tensor)}; or use --context-exchange gather",
        )


def _parts(run: Run) -> Iterator[Fault]:
    """The layers of the model's parts."""
    stages, layers = run.parallel.pipeline_model_parallel_size, num_layers(run)
    chunk = run.parallel.num_layers_per_virtual_pipeline_stage
    if chunk is not None and stages < 2:
        yield fault(
            "num_layers_per_virtual_pipeline_stage", chunk, "needs more than one pipeline stage", "Leave it out"
        )
    if layers < 1:
        return
    if layers < stages:
        yield fault(
            "pipeline_model_parallel_size",
            stages,
            f"is more than the {layers} layers, of which each stage needs one",
            f"Use at most {layers} stages",
        )
    elif chunk is not None and chunk > 0 and stages > 1 and layers % (stages * chunk):
        fits = divisors(layers // stages) if layers % stages == 0 else []
        stages_fit = [n for n in divisors(layers) if n > 1]
        yield fault(
            "num_layers_per_virtual_pipeline_stage",
            chunk,
            f"times --pipeline-model-parallel-size = {stages} does not divide the {layers} layers",
            f"Layers per virtual stage that fit: {fits}"
            if fits
            else f"Use one of {stages_fit} pipeline stages, or {_nearest(layers, stages * chunk)} layers",
        )


def _schedule(run: Run) -> Iterator[Fault]:
    parallel = run.parallel
    schedule, chunk = parallel.pipeline_schedule, parallel.num_layers_per_virtual_pipeline_stage
    if schedule is None:
        return
    if parallel.pipeline_model_parallel_size < 2:
        yield fault("pipeline_schedule", schedule, "needs more than one pipeline stage", "Leave it out")
    elif schedule == "interleaved" and chunk is None:
        yield fault(
            "pipeline_schedule",
            schedule,
            "needs several parts of the model on each rank",
            "Add --num-layers-per-virtual-pipeline-stage N, or use 1f1b",
        )
    elif schedule not in OF_SEVERAL_PARTS and chunk is not None:
        yield fault(
            "pipeline_schedule",
            schedule,
            f"runs one part of the model on each rank, against --num-layers-per-virtual-pipeline-stage = {chunk}",
            f"Use {' or '.join(OF_SEVERAL_PARTS)}, or leave one of them out",
        )
    if schedule == SPLIT_BACKWARD and parallel.data_parallel_sharding == "parameters":
        # torch's FSDP2 then leaves gradients out, without a word (seen with torch 2.13).
        yield fault(
            "data_parallel_sharding",
            "parameters",
            "gives wrong gradients where --pipeline-schedule zero-bubble splits the backward pass",
            "Use --data-parallel-sharding gradients, or another schedule",
        )


def _microbatches(run: Run, world_size: int) -> Iterator[Fault]:
    """How many microbatches a pipeline needs in every step, also during a ramp of the batch size."""
    stages, micro = run.parallel.pipeline_model_parallel_size, run.optimizer.micro_batch_size
    replicas = num_replicas(run, world_size)
    if stages < 2 or not micro or micro < 1 or replicas is None:
        return
    group, sizes = micro * replicas, [global_batch_size(run, replicas)]
    ramp = run.optimizer.rampup_batch_size
    if ramp is not None and len(ramp) == 3 and all(word.isdecimal() for word in ramp) and int(ramp[1]) > 0:
        sizes += range(int(ramp[0]), sizes[0], int(ramp[1]))
    several = run.parallel.num_layers_per_virtual_pipeline_stage is not None
    several = several or run.parallel.pipeline_schedule in OF_SEVERAL_PARTS
    for size in sorted({size for size in sizes if size > 0 and size % group == 0}):
        count = size // group
        made = counted(count, "microbatch", "microbatches")
        if several and count % stages:
            rule = f"gives {made}, not divisible by the {stages} stages of an interleaved schedule"
        elif count < stages:
            rule = f"gives {made}, fewer than the {stages} pipeline stages"
        else:
            continue
        name = "global_batch_size" if size == sizes[0] else "rampup_batch_size"
        yield fault(
            name,
            size,
            rule,
            f"Batch sizes that fit nearby: {_nearest(size, group * stages)}; or use fewer stages or replicas",
        )


def _replicas(run: Run, world_size: int) -> Iterator[Fault]:
    """What replicas of the model do with their gradients."""
    parallel, replicas = run.parallel, num_replicas(run, world_size)
    shard = parallel.data_parallel_shard_size
    if shard is not None and parallel.data_parallel_sharding not in ("gradients", "parameters"):
        yield fault(
            "data_parallel_shard_size",
            shard,
            f"has nothing to share out with --data-parallel-sharding {parallel.data_parallel_sharding}",
            "Use --data-parallel-sharding parameters or gradients, or leave it out",
        )
    sharing = None if replicas is None else replicas * parallel.context_parallel_size
    if shard is not None and shard > 0 and sharing is not None and sharing % shard:
        yield fault(
            "data_parallel_shard_size",
            shard,
            f"does not divide the {sharing} ranks that hold the same part of the model",
            f"Sizes that fit: {divisors(sharing)}",
        )
    if not parallel.deterministic:
        return
    if parallel.data_parallel_sharding != "none":
        yield fault(
            "deterministic",
            None,
            f"cannot order the sums of --data-parallel-sharding {parallel.data_parallel_sharding}",
            "Leave one of them out",
        )
    if parallel.pipeline_model_parallel_size > 1:
        yield fault(
            "deterministic",
            None,
            "cannot order the sums of a pipeline, whose schedule adds microbatches as they come",
            "Leave it out, or use --pipeline-model-parallel-size 1",
        )


def _recomputation(run: Run) -> Iterator[Fault]:
    parallel = run.parallel
    if parallel.distribute_checkpointed_activations and recompute_granularity(run) != "full":
        yield fault(
            "distribute_checkpointed_activations", None, "needs --checkpoint-activations", "Add that, or leave this out"
        )
    if parallel.distribute_checkpointed_activations and parallel.sequence_parallel:
        yield fault(
            "distribute_checkpointed_activations",
            None,
            "contradicts --sequence-parallel, which has cut what is kept already",
            "Leave it out",
        )
    if parallel.checkpoint_activations and parallel.recompute_granularity == "selective":
        yield fault(
            "checkpoint_activations", None, "contradicts --recompute-granularity = selective", "Give only one of them"
        )


def _compiler(run: Run) -> Iterator[Fault]:
    parallel = run.parallel
    budget = parallel.activation_memory_budget
    if budget is not None and not 0 <= budget <= 1:
        yield fault("activation_memory_budget", budget, "must be from 0 to 1", "Give the share to keep")
    if budget is not None and parallel.compile == "off":
        yield fault("activation_memory_budget", budget, "is kept by the compiler", "Add --compile on")
    if parallel.fp8_format is not None and parallel.pipeline_schedule == SPLIT_BACKWARD:
        yield fault("fp8_format", parallel.fp8_format, "cannot split the backward pass", "Use another schedule")
    if parallel.compile == "on" and parallel.pipeline_schedule == SPLIT_BACKWARD:
        yield fault("compile", parallel.compile, "cannot split the backward pass", "Use another --pipeline-schedule")
