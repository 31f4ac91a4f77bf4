"""One line each: arguments of Megatron-LM whose job something else does now, and what a good engineer would warn of.

A notice never stops a run; what does is in `check.py`. docs/from-megatron.md tells it at length, for all arguments.
"""

import math
import os
from collections.abc import Iterator

import torch

from megalith.check_layout import divisors
from megalith.config import Run, known_settings
from megalith.data.tokenizer import KINDS
from megalith.derived import TASK_DEFAULTS, compute_dtype, recompute_granularity, tokenizer_type
from megalith.fields import describe
from megalith.layers.float8 import MULTIPLE
from megalith.layers.products import has_instructions_for
from megalith.terminal import counted

# Accepted, and done by something else: setting -> what does its job now. Answered when it is given a value of its own.
REPLACED = {
    "bias_dropout_fusion": "dropout masks are computed by counter beside the residual addition, always",
    "masked_softmax_fusion": "attention runs through PyTorch's own fused kernels",
    "onnx_safe": "nothing is exported while training; only its form of the erf GELU is kept",
    "lazy_mpu_init": "the process group is joined once at start-up; another program cannot take that over",
    "use_cpu_initialization": "weights are drawn by counter from the seed, the same on every device and layout",
    "use_contiguous_buffers_in_ddp": "gradients are reduced in buckets whether or not it is given",
    "accumulate_allreduce_grads_in_fp32": "weights and their gradients are always fp32; activations are in 16 bit",
    "attention_softmax_in_fp32": "the softmax of attention is always computed in fp32",
    "scatter_gather_tensors_in_pipeline": "stages exchange activations through torch.distributed.pipelining",
    "local_rank": "the launcher's environment (LOCAL_RANK) tells the local rank",
    "distributed_backend": "the backend follows the device: NCCL with GPUs, gloo without",
    "DDP_impl": "one reduction of gradients serves all layouts",
    "data_impl": "every file is memory-mapped; one that is not of the named format is refused; lazy and cached are one",
    "num_workers": "one background thread makes samples, which no step waits for; images are decoded by so many",
    "ict_load": "megalith index takes the run directory of the bi-encoder as its first word",
    "ict_head_size": "no program reads it, in Megatron-LM neither; --biencoder-projection-dim narrows embeddings",
    "sample_rate": "megalith index takes it, and embeds all passages where it is not told",
    "block_data_path": "no program reads it, in Megatron-LM neither",
    "no_save_rng": "there is no generator state to save: everything random is derived from the seed and the step",
    "no_load_rng": "there is no generator state to load: everything random is derived from the seed and the step",
    "adlr_autoresume": "send SIGUSR1 to save and stop with exit status 75, which a scheduler's script can test",
    "adlr_autoresume_interval": "a signal is looked at after every step",
}

# Values whose job is done just as asked: no line for them.
QUIET_VALUES = {"distributed_backend": ("nccl", "gloo"), "data_impl": ("infer", "mmap"), "DDP_impl": ("local",)}

USUAL_LOSS_SCALE = 2**16  # at which the gradients of usual models fit into 16 bits
USUAL_PADDING = 128  # tokens that Megatron-LM's padding adds at most, unless told otherwise
MOST_EPOCHS = 10  # after which a language model has learnt its data by heart


def notes(run: Run) -> Iterator[str]:
    """A line for each setting that something else answers, that only another task uses, or that has a price."""
    known = known_settings()
    for name, instead in REPLACED.items():
        value = getattr(getattr(run, known[name].part), name)
        if value != known[name].field.default and value not in QUIET_VALUES.get(name, ()):
            yield f"note: {known[name].flag} is accepted; {instead}."
    for name, setting in known.items():
        tasks = describe(setting.field)["task"]
        value = getattr(getattr(run, setting.part), name)
        if not setting.concerns(run.task) and name not in REPLACED and value != setting.field.default:
            yield f"note: {setting.flag} belongs to the task {tasks}; it changes nothing for {run.task}."
    if run.parallel.deterministic:
        yield "note: --deterministic adds gradients in a fixed order and computes with one CPU thread a rank: slower."
    for name, why in idle(run):
        setting = known[name]
        if getattr(getattr(run, setting.part), name) != setting.field.default:
            yield f"note: {setting.flag} changes nothing: {why}."


def _rows_of_products(run: Run) -> int:
    """Tokens of a microbatch that a rank multiplies at once."""
    length = run.data.seq_length or 0
    return (run.optimizer.micro_batch_size or 0) * length // run.parallel.context_parallel_size


def idle(run: Run) -> Iterator[tuple[str, str]]:
    """Settings that this run has no use for, and why; also those that were not given."""
    parallel, optimizer = run.parallel, run.optimizer
    if parallel.tensor_model_parallel_size == 1:
        yield "sequence_parallel", "it cuts the sequence over tensor ranks, and there is one"
        yield "distribute_checkpointed_activations", "tensor ranks share out what is kept, and there is one"
    if parallel.context_parallel_size == 1:
        yield "context_exchange", "context ranks exchange, and there is one"
    if recompute_granularity(run) != "full":
        yield "checkpoint_num_layers", "nothing is computed again layer by layer without --checkpoint-activations"
    if not parallel.check_replicas:
        yield "on_replica_fault", "nobody looks without --check-replicas"
    if parallel.nproc is None:
        yield "max_restarts", "only --nproc starts lost ranks again"
    if run.task in ("gpt", "bert") and (rows := _rows_of_products(run)) % MULTIPLE:
        yield (
            "fp8_format",
            f"the {rows} tokens of a microbatch on a rank are no multiple of {MULTIPLE}, as products in 8 bits need",
        )
    if compute_dtype(run) == "float32":
        yield "loss_scale", "in fp32 the loss is not scaled"
    if not optimizer.fp16 or optimizer.loss_scale is not None:
        for name in ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"):
            yield name, "only --fp16 without --loss-scale has a loss scale that moves"
    if optimizer.lr_decay_style == "constant":
        yield "min_lr", "a constant rate does not fall"
    if not (optimizer.lr_warmup_iters or optimizer.lr_warmup_samples or optimizer.lr_warmup_fraction):
        yield "lr_warmup_init", "there is no warm-up"
    if optimizer.lr_decay_style != "WSD":
        for name in ("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples"):
            yield name, "only --lr-decay-style WSD falls at its end alone"
    if not optimizer.spike_threshold:
        yield "spike_window", "nothing is a spike without --spike-threshold"
    if run.monitor.tensorboard_dir is None and run.checkpoint.save is None:
        for name in (name for name in known_settings() if "tensorboard" in name):
            yield name, "TensorBoard's files have no place without --tensorboard-dir or --save"
    if not run.monitor.profile:
        for name in ("profile_step_start", "profile_step_end", "profile_dir"):
            yield name, "nothing is traced without --profile"
    if run.evaluate.eval_iters == 0:
        yield "eval_first", "an evaluation has --eval-iters = 0 batches"
    for name in ("sgd_momentum",) if optimizer.optimizer == "adam" else ("adam_beta1", "adam_beta2", "adam_eps"):
        yield name, f"the optimizer is {optimizer.optimizer}"
    if run.task == "t5" and run.model.position_embedding_type != "relative":
        for name in ("relative_attention_num_buckets", "relative_attention_max_distance"):
            yield name, "there is no table of distances without --position-embedding-type relative"
    if run.task == "vit":
        yield "split", "the folders train and val part the images"
    if run.task == "vit" or run.data.mock_data:
        why = (
            "a vit reads no text"
            if run.task == "vit"
            else "--mock-data draws from --vocab-size tokens, and reads no text"
        )
        for name in ("vocab_file", "merge_file", "tokenizer_model", "tokenizer_type"):
            yield name, why
    else:
        for name in ("vocab_file", "merge_file", "tokenizer_model"):
            if name not in KINDS[tokenizer_type(run)].values():
                yield name, f"{tokenizer_type(run)} does not read it"
    if run.task in ("classify", "retriever"):
        for name in ("split", "data_path"):
            yield name, "its samples are those of --train-data and --valid-data"
    if run.task != "gpt":
        yield "sample_prompt", f"{run.task} continues no text"
        for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss"):
            yield name, f"a sample of {run.task} is no cut through documents"


def overridden(run: Run) -> list[str]:
    """Megatron-LM's own words where a command line overrides what its program for the task fills in.

    It says so even where both are the same, as after --corpus; that is left out.
    """
    lines = []
    for name, default in TASK_DEFAULTS[run.task].items():
        value = getattr(run.data, name)
        if value not in (None, default):
            words = f"WARNING: overriding default arguments for {name}:{default}"
            lines.append(f"{words}{' ' * 24}with {name}:{value}")
    return lines


def warnings_of(run: Run, *, num_steps: int, device_type: str) -> Iterator[str]:
    """What a good engineer would want to know before a run of that many steps on such devices."""
    saves, optimizer = run.checkpoint.save is not None, run.optimizer
    if not saves:
        yield "nothing will be saved: --save was not given, so a stopped run cannot go on."
    intervals = [
        ("--log-interval", run.monitor.log_interval, True, "no step is reported"),
        ("--save-interval", run.checkpoint.save_interval, saves, "only its end is saved"),
        ("--eval-interval", run.evaluate.eval_interval, run.evaluate.eval_iters > 0, "only its end is evaluated"),
    ]
    for flag, interval, is_used, consequence in intervals:
        if is_used and interval is not None and interval > num_steps:
            yield f"{flag} = {interval} is longer than the run of {counted(num_steps, 'step')}: {consequence}."
    warmup = "lr_warmup_iters" if run.train.train_iters else "lr_warmup_samples"
    if optimizer.lr_warmup_fraction is not None:
        warmup = "lr_warmup_fraction"
    if num_steps == 1 and getattr(optimizer, warmup) > 0 and not optimizer.lr_warmup_init:
        yield (
            "the one step is the first of the warm-up, at learning rate 0: it changes nothing. "
            f"{known_settings()[warmup].flag} 0 leaves the warm-up out."
        )
    if optimizer.fp16 and optimizer.loss_scale is None and optimizer.initial_loss_scale > USUAL_LOSS_SCALE:
        halvings = math.ceil(math.log2(optimizer.initial_loss_scale / USUAL_LOSS_SCALE))
        yield (
            f"an initial loss scale of {optimizer.initial_loss_scale:.0f} overflows in a usual model: about "
            f"{halvings + optimizer.hysteresis - 1} steps will be skipped. --initial-loss-scale 65536 or --bf16 skips "
            "none."
        )
    if device_type == "cpu" and not has_instructions_for(getattr(torch, compute_dtype(run))):
        flag = "--fp16" if optimizer.fp16 else "--bf16"
        yield (
            f"{flag}: this processor has no instructions for products of that type, so a step takes many times as long "
            f"as in fp32. Leave {flag} out, unless the run rehearses that of another machine."
        )
    heads = run.model.num_attention_heads or 1
    if heads > 1 and heads % 2:
        fits = divisors(heads)[1:]
        yield (
            f"--num-attention-heads = {heads} can be cut over {fits} tensor-parallel ranks only, by no power of two: "
            "2, 4 or 8 GPUs of a machine cannot share a layer."
        )


def padding_warning(run: Run, tokenizer_size: int, padded_size: int) -> str | None:
    """What to say of a vocabulary that is much larger than its tokenizer, sizes in tokens."""
    dummies = padded_size - tokenizer_size
    if dummies <= max(USUAL_PADDING, tokenizer_size // 10):
        return None
    multiple = run.model.make_vocab_size_divisible_by
    return (
        f"{dummies:,} of the vocabulary's {padded_size:,} entries are padding, the tokenizer has "
        f"{tokenizer_size:,} tokens: --make-vocab-size-divisible-by = {multiple} could be smaller."
    )


def repeated_warning(prefix: str | os.PathLike[str], num_epochs: int) -> str | None:
    """What to say of training data that is read that many times."""
    if num_epochs <= MOST_EPOCHS:
        return None
    return f"{os.fspath(prefix)} is repeated {num_epochs:,} times: the model will learn it by heart. More text helps."
