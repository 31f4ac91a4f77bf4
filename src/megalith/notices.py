"""One line each: arguments of Megatron-LM whose job something else does now, and what a good engineer would warn of.

A notice never stops a run; what does is in `check.py`. docs/from-megatron.md tells it at length, for all arguments.
"""

import math
from collections.abc import Iterator

from megalith.config import Run, flag_of, known_settings
from megalith.derived import TASK_DEFAULTS
from megalith.fields import describe

# Accepted, and done by something else: setting -> what does its job now. Answered when it is given a value of its own.
REPLACED = {
    "bias_dropout_fusion": "dropout masks are computed by counter beside the residual addition, always",
    "masked_softmax_fusion": "attention runs through PyTorch's own fused kernels",
    "onnx_safe": "models are exported from the checkpoint; only its erf GELU is kept",
    "lazy_mpu_init": "the process group is joined once at start-up; another program cannot take that over",
    "use_cpu_initialization": "weights are drawn by counter from the seed, the same on every device and layout",
    "use_contiguous_buffers_in_ddp": "gradients are reduced in buckets whether or not it is given",
    "accumulate_allreduce_grads_in_fp32": "weights and their gradients are always fp32; activations are in 16 bit",
    "attention_softmax_in_fp32": "the softmax of attention is always computed in fp32",
    "scatter_gather_tensors_in_pipeline": "stages exchange activations through torch.distributed.pipelining",
    "local_rank": "the launcher's environment (LOCAL_RANK) tells the local rank",
    "distributed_backend": "the backend follows the device: NCCL with GPUs, gloo without",
    "DDP_impl": "one reduction of gradients serves all layouts",
    "mmap_warmup": "the page cache warms up as samples are read",
    "data_impl": "the reader follows the file's own header",
    "num_workers": "samples are cut by one background thread, which no step waits for",
    "block_data_path": "no program reads it, in Megatron-LM neither",
    "no_save_rng": "there is no generator state to save: everything random is derived from the seed and the step",
    "no_load_rng": "there is no generator state to load: everything random is derived from the seed and the step",
    "adlr_autoresume": "send SIGUSR1 to save and stop with exit status 75, which a scheduler's script can test",
    "adlr_autoresume_interval": "a signal is looked at after every step",
    "distribute_checkpointed_activations": "inputs kept for recomputation are whole on each rank in this version",
}

# Values whose job is done just as asked: no line for them.
QUIET_VALUES = {"distributed_backend": ("nccl", "gloo"), "data_impl": ("infer", "mmap"), "DDP_impl": ("local",)}


def notices(run: Run, world_size: int) -> list[str]:
    """Every line that the user should read before the run starts."""
    return [*_replaced(run), *_of_other_tasks(run), *_overridden(run), *_warnings(run, world_size)]


def _replaced(run: Run) -> Iterator[str]:
    known = known_settings()
    for name, instead in REPLACED.items():
        value = getattr(getattr(run, known[name].part), name)
        if value != known[name].field.default and value not in QUIET_VALUES.get(name, ()):
            yield f"note: {known[name].flag} is accepted; {instead}."


def _of_other_tasks(run: Run) -> Iterator[str]:
    for name, known in known_settings().items():
        task = describe(known.field)["task"]
        value = getattr(getattr(run, known.part), name)
        if task and task != run.task and value != known.field.default:
            yield f"note: {known.flag} belongs to the task {task}; it changes nothing for {run.task}."


def _overridden(run: Run) -> Iterator[str]:
    """Megatron-LM's own words where a command line overrides what its program for the task fills in."""
    for name, default in TASK_DEFAULTS[run.task].items():
        value = getattr(run.data, name)
        if value is not None:
            given = f"with {name}:{value}"
            yield f"WARNING: overriding default arguments for {name}:{default}                        {given}"


def _warnings(run: Run, world_size: int) -> Iterator[str]:
    train, optimizer = run.train, run.optimizer
    if run.checkpoint.save is None:
        yield "warning: nothing will be saved: --save was not given, so a stopped run cannot go on."
    elif train.train_iters and run.checkpoint.save_interval and run.checkpoint.save_interval > train.train_iters:
        yield (
            f"warning: --save-interval = {run.checkpoint.save_interval} is longer than the run of {train.train_iters} "
            "steps: only its end is saved."
        )
    if train.train_iters and run.evaluate.eval_iters and run.evaluate.eval_interval > train.train_iters:
        yield (
            f"warning: --eval-interval = {run.evaluate.eval_interval} is longer than the run of {train.train_iters} "
            "steps: only its end is evaluated."
        )
    if optimizer.fp16 and optimizer.loss_scale is None and optimizer.initial_loss_scale > 2**16:
        wasted = int(math.log2(optimizer.initial_loss_scale / 2**16)) + optimizer.hysteresis - 1
        yield (
            f"warning: an initial loss scale of {optimizer.initial_loss_scale:.0f} overflows in a usual model: about "
            f"{wasted} steps will be skipped. --initial-loss-scale 65536 or --bf16 skips none."
        )
    heads = run.model.num_attention_heads or 1
    if heads > 1 and heads % 2:
        fits = [n for n in range(2, heads + 1) if heads % n == 0]
        yield (
            f"warning: {heads} attention heads can be cut over {fits} tensor-parallel ranks only, "
            f"by no power of two ({flag_of('num_attention_heads')})."
        )


def data_notices(*, epochs: int, tokenizer_size: int, padded_size: int, part: str) -> Iterator[str]:
    """What is known to deserve a warning only once the data is open."""
    if epochs > 10:
        yield f"warning: the {part} data is repeated {epochs:,} times: the model will learn it by heart."
    if padded_size > 2 * tokenizer_size:
        yield f"warning: the vocabulary of {padded_size:,} is more than twice the tokenizer's {tokenizer_size:,}."
