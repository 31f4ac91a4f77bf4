"""A run is checked before anything is built: every fault at once, each with setting, value, rule and remedy.

The rules are those of Megatron-LM's argument parser (R0 to R19 in docs/from-megatron.md) and what would fail later in
the run. Where Megatron-LM silently corrects a value (a tensor-parallel size above the world size), it is a fault here.
"""

import math
import os
from collections.abc import Iterator

from megalith.check_data import data_faults
from megalith.check_layout import layout_faults, num_replicas
from megalith.check_tasks import task_faults
from megalith.checkpoint.settings import TRACKER
from megalith.config import Fault, Run, fault, flag_of, known_settings
from megalith.derived import compute_dtype, global_batch_size
from megalith.optim.batch_size import make_batch_sizes

MOST = 2**62  # of anything that is counted
LONGEST_WAIT = 10**8  # seconds, three years; a group of ranks counts them in nanoseconds
MOST_SEED = 2**32 - 1  # of numpy's generator, which shuffles


def check(run: Run, world_size: int) -> list[Fault]:
    """Every fault of the run on that many ranks; none if it can start."""
    return [
        *_required(run),
        *_named(run),
        *_finite(run),
        *_positive(run),
        *_shape(run),
        *layout_faults(run, world_size),
        *_batches(run, world_size),
        *_first_step(run, world_size),
        *_length(run),
        *_schedule(run),
        *_precision(run),
        *_numbers(run),
        *data_faults(run),
        *task_faults(run),
        *_checkpoint(run),
        *_profile(run),
    ]


def _required(run: Run) -> Iterator[Fault]:
    needed: dict[str, object] = {
        "num_layers": run.model.num_layers,
        "hidden_size": run.model.hidden_size,
        "num_attention_heads": run.model.num_attention_heads,
        "max_position_embeddings": run.model.max_position_embeddings,
        "micro_batch_size": run.optimizer.micro_batch_size,
        "lr": run.optimizer.lr,
    }
    for name, value in needed.items():
        if value is None:
            yield fault(name, None, "is required and was not given", f"Add {flag_of(name)}, or start from a --preset")
    if run.data.seq_length is None and run.data.encoder_seq_length is None:
        yield fault("seq_length", None, "is required and was not given", "Add --seq-length, or start from a --preset")


def _named(run: Run) -> Iterator[Fault]:
    """A directory without a name would be the current one: of --save "$DIR" where DIR is not set."""
    places = {
        "save": run.checkpoint.save,
        "tensorboard_dir": run.monitor.tensorboard_dir,
        "profile_dir": run.monitor.profile_dir,
        "data_cache_path": run.data.data_cache_path,
    }
    for name, place in places.items():
        if place == "":
            yield fault(name, None, "is empty", "Name a directory, or leave it out")


def _finite(run: Run) -> Iterator[Fault]:
    """Numbers that are none, or that no counter holds; the grace of a stop may have no end."""
    for name, known in known_settings().items():
        value = getattr(getattr(run, known.part), name)
        if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and known.part != "parallel")):
            yield fault(name, value, "must be a finite number", "Give one")
        elif isinstance(value, int) and abs(value) > MOST and name != "seed":
            yield fault(name, value, f"is beyond {MOST}", "Give a smaller number")
    for name, remedy in (("join_timeout", "Give less"), ("hang_timeout", "Give less, or 0 for no limit")):
        if (seconds := getattr(run.parallel, name)) > LONGEST_WAIT:
            yield fault(name, seconds, f"is beyond {LONGEST_WAIT} seconds", remedy)
    if 0 < run.parallel.hang_timeout < 1:
        rule = "is below 1 second, in which a rank is hardly looked at"
        yield fault("hang_timeout", run.parallel.hang_timeout, rule, "Give more, or 0 for no limit")
    if run.train.seed > MOST_SEED:
        yield fault("seed", run.train.seed, f"must be from 1 to {MOST_SEED}", "Give such a number")


def _positive(run: Run) -> Iterator[Fault]:
    """Counts that must be at least 1, where they are given."""
    counts = {
        "model": "num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels max_position_embeddings "
        "make_vocab_size_divisible_by img_dim num_channels num_classes patch_dim layernorm_epsilon num_query_groups",
        "data": "seq_length encoder_seq_length decoder_seq_length retriever_seq_length corpus_vocab_size vocab_size "
        "max_epochs",
        "optimizer": "micro_batch_size global_batch_size hysteresis loss_scale_window loss_scale initial_loss_scale "
        "min_loss_scale adam_eps lr_decay_iters lr_decay_samples spike_window",
        "parallel": "tensor_model_parallel_size pipeline_model_parallel_size checkpoint_num_layers nproc "
        "num_layers_per_virtual_pipeline_stage context_parallel_size data_parallel_shard_size join_timeout "
        "check_replicas",
        "checkpoint": "save_interval keep_last keep_every adlr_autoresume_interval",
        "monitor": "profile_step_start profile_step_end log_interval tensorboard_log_interval tensorboard_queue_size",
        "evaluate": "eval_interval indexer_batch_size indexer_log_interval",
        "train": "train_iters train_samples exit_interval exit_duration_in_mins seed",
    }
    for part, names in counts.items():
        for name in names.split():
            value = getattr(getattr(run, part), name)
            if value is not None and value <= 0:
                yield fault(name, value, "must be greater than 0", "Give a positive number")
    not_negative = {
        "model": "init_method_std",
        "optimizer": "lr min_lr lr_warmup_init weight_decay clip_grad lr_warmup_iters lr_warmup_samples max_bad_steps "
        "spike_threshold",
        "data": "num_workers vocab_extra_ids train_hard_neg val_av_rank_hard_neg val_av_rank_other_neg",
        "evaluate": "eval_iters",
        "parallel": "max_restarts stop_grace hang_timeout check_compute",
    }
    for part, names in not_negative.items():
        for name in names.split():
            value = getattr(getattr(run, part), name)
            if value is not None and value < 0:
                yield fault(name, value, "must not be negative", "Give 0 or more")
    for part, names in {
        "model": "attention_dropout hidden_dropout",
        "optimizer": "adam_beta1 adam_beta2 sgd_momentum",
    }.items():
        for name in names.split():
            value = getattr(getattr(run, part), name)
            if not 0 <= value < 1:
                yield fault(name, value, "must be at least 0 and below 1", "Give such a number")


def _shape(run: Run) -> Iterator[Fault]:
    model, data = run.model, run.data
    width, heads = model.hidden_size, model.num_attention_heads
    if width and heads and model.kv_channels is None and width % heads:
        fits = ", ".join(str(n) for n in range(max(1, heads - 8), heads + 9) if width % n == 0)
        remedy = f"Heads that divide it nearby: {fits}; or give --kv-channels" if fits else "Give --kv-channels"
        yield fault("hidden_size", width, f"is not divisible by --num-attention-heads = {heads}", remedy)
    if data.seq_length is not None and data.encoder_seq_length is not None:
        yield fault(
            "encoder_seq_length", data.encoder_seq_length, "stands beside --seq-length", "Give only one of them"
        )
    longest = {"seq_length": data.seq_length, "encoder_seq_length": data.encoder_seq_length}
    longest["decoder_seq_length"] = data.decoder_seq_length
    for name, length in longest.items():
        if length and model.max_position_embeddings and length > model.max_position_embeddings:
            yield fault(
                name,
                length,
                f"is longer than --max-position-embeddings = {model.max_position_embeddings}",
                f"Shorten it, or raise --max-position-embeddings to {length}",
            )


def _batches(run: Run, world_size: int) -> Iterator[Fault]:
    micro = run.optimizer.micro_batch_size
    replicas = num_replicas(run, world_size)
    if not micro or micro < 1 or replicas is None:
        return
    batch = global_batch_size(run, replicas)
    group = micro * replicas
    if run.task == "ict" and group == 1:
        rule = "leaves a query one block to choose from, so that there is nothing to learn"
        yield fault("micro_batch_size", micro, rule, "Give 2 or more, or more ranks")
    if run.task == "retriever" and group == 1 and not run.data.train_with_neg:
        rule = "leaves a question one passage to choose from, so that there is nothing to learn"
        yield fault(
            "micro_batch_size", micro, rule, "Give 2 or more, more ranks, or wrong passages by --train-with-neg"
        )
    if batch > 0 and batch % group:
        near = sorted({max(group, batch // group * group), (batch // group + 1) * group})
        yield fault(
            "global_batch_size",
            batch,
            f"is not divisible by --micro-batch-size x data-parallel size = {micro} x {replicas} = {group}",
            f"Nearest that are: {near}",
        )
    ramp = run.optimizer.rampup_batch_size
    if ramp is None:
        return
    if len(ramp) != 3 or not all(word.isdecimal() for word in ramp):
        yield fault("rampup_batch_size", " ".join(ramp), "takes three whole numbers", "Give START INCREMENT SAMPLES")
        return
    start, increment, samples = (int(word) for word in ramp)
    if start < 1 or increment < 1 or samples < 1:
        yield fault("rampup_batch_size", " ".join(ramp), "takes numbers above 0", "Give START INCREMENT SAMPLES")
        return
    if batch < start or (batch - start) % increment or batch == start:
        yield fault(
            "rampup_batch_size",
            " ".join(ramp),
            f"must reach --global-batch-size = {batch} from {start} in whole steps of {increment}",
            "Change the start or the increment",
        )
    elif start % group or increment % group:
        yield fault(
            "rampup_batch_size",
            " ".join(ramp),
            f"goes through batches not divisible by --micro-batch-size x data-parallel size = {group}",
            f"Make start and increment multiples of {group}",
        )


def _first_step(run: Run, world_size: int) -> Iterator[Fault]:
    """Whether a length in samples holds a step."""
    samples, replicas = run.train.train_samples, num_replicas(run, world_size)
    if samples is None or samples < 1 or replicas is None:
        return
    try:
        batches = make_batch_sizes(run.optimizer, data_parallel=replicas)
    except ValueError:
        return  # told with the batches
    if samples < batches.batch_size(0):
        rule = f"is too short for one step of {batches.batch_size(0)} samples"
        yield fault("train_samples", samples, rule, "Raise it, or make the first batch smaller")


def _length(run: Run) -> Iterator[Fault]:
    train, optimizer = run.train, run.optimizer
    if train.train_iters is None and train.train_samples is None:
        yield fault("train_iters", None, "is required and was not given", "Add --train-iters or --train-samples")
    elif train.train_iters is not None and train.train_samples is not None:
        yield fault("train_samples", train.train_samples, "stands beside --train-iters", "Give only one of them")
    by_steps = train.train_iters is not None
    other = (
        {
            "lr_decay_samples": optimizer.lr_decay_samples,
            "lr_warmup_samples": optimizer.lr_warmup_samples or None,
            "lr_wsd_decay_samples": optimizer.lr_wsd_decay_samples,
        }
        if by_steps
        else {
            "lr_decay_iters": optimizer.lr_decay_iters,
            "lr_warmup_iters": optimizer.lr_warmup_iters or None,
            "lr_wsd_decay_iters": optimizer.lr_wsd_decay_iters,
        }
    )
    counted, wanted = ("steps", "iters") if by_steps else ("samples", "samples")
    for name, value in other.items():
        if value is not None:
            remedy = f"Use --{name.rsplit('_', 1)[0].replace('_', '-')}-{wanted}"
            yield fault(name, value, f"does not go with a training counted in {counted}", remedy)
    if by_steps and optimizer.rampup_batch_size is not None:
        yield fault(
            "rampup_batch_size", None, "needs a training counted in samples", "Use --train-samples for --train-iters"
        )
    warmup = "lr_warmup_iters" if by_steps else "lr_warmup_samples"
    if optimizer.lr_warmup_fraction is not None and getattr(optimizer, warmup):
        yield fault(warmup, getattr(optimizer, warmup), "stands beside --lr-warmup-fraction", "Give only one of them")


def _schedule(run: Run) -> Iterator[Fault]:
    optimizer, train = run.optimizer, run.train
    if optimizer.lr is not None and optimizer.min_lr > optimizer.lr >= 0:
        yield fault("min_lr", optimizer.min_lr, f"is above --lr = {optimizer.lr}", "Lower it")
    if optimizer.lr is not None and optimizer.lr_warmup_init > optimizer.lr >= 0:
        yield fault("lr_warmup_init", optimizer.lr_warmup_init, f"is above --lr = {optimizer.lr}", "Lower it")
    if optimizer.lr_warmup_fraction is not None and not 0 <= optimizer.lr_warmup_fraction < 1:
        rule = "must be at least 0 and below 1"
        yield fault("lr_warmup_fraction", optimizer.lr_warmup_fraction, rule, "Give such a number")
    if train.train_iters is not None:
        decay, warmup, name = (
            optimizer.lr_decay_iters or train.train_iters,
            optimizer.lr_warmup_iters,
            "lr_warmup_iters",
        )
    else:
        decay = optimizer.lr_decay_samples or train.train_samples or math.inf  # type: ignore[assignment]
        warmup, name = optimizer.lr_warmup_samples, "lr_warmup_samples"
    if warmup >= decay > 0:
        yield fault(name, warmup, f"is not shorter than the decay, {decay}", "Shorten it")
    elif optimizer.lr_decay_style == "WSD":
        ends = "lr_wsd_decay_samples" if train.train_iters is None else "lr_wsd_decay_iters"
        end: int | None = getattr(optimizer, ends)
        room = decay - max(warmup, (optimizer.lr_warmup_fraction or 0) * decay)
        if end is None:
            yield fault(ends, None, "is required by --lr-decay-style WSD and was not given", f"Add {flag_of(ends)}")
        elif not 0 < end <= room:
            rule = f"must be above 0 and at most the {room:g} that the warm-up leaves of the decay length"
            yield fault(ends, end, rule, "Give such a number")
    if optimizer.override_lr_scheduler and optimizer.use_checkpoint_lr_scheduler:
        yield fault("override_lr_scheduler", None, "contradicts --use-checkpoint-lr-scheduler", "Give only one of them")


def _precision(run: Run) -> Iterator[Fault]:
    optimizer, model = run.optimizer, run.model
    if optimizer.optimizer == "sgd" and optimizer.optimizer_state_dtype != "fp32":
        yield fault(
            "optimizer_state_dtype",
            optimizer.optimizer_state_dtype,
            "is the type of Adam's moments, and --optimizer is sgd",
            "Leave it out, or give --optimizer adam",
        )
    if optimizer.fp16 and optimizer.bf16:
        yield fault("fp16", None, "contradicts --bf16", "Give only one of them")
    if model.fp16_lm_cross_entropy and not optimizer.fp16:
        yield fault("fp16_lm_cross_entropy", None, "needs --fp16", "Add that, or leave this out")
    if model.fp32_residual_connection and compute_dtype(run) == "float32":
        yield fault("fp32_residual_connection", None, "needs --fp16 or --bf16", "Add one, or leave this out")
    if optimizer.min_loss_scale > optimizer.initial_loss_scale:
        yield fault(
            "min_loss_scale",
            optimizer.min_loss_scale,
            f"is above --initial-loss-scale = {optimizer.initial_loss_scale}",
            "Lower it",
        )


def _numbers(run: Run) -> Iterator[Fault]:
    optimizer, checkpoint = run.optimizer, run.checkpoint
    if optimizer.on_nan == "rewind":
        if checkpoint.save is None:
            yield fault("on_nan", "rewind", "needs checkpoints to go back to", "Add --save DIR")
        if checkpoint.no_save_optim:
            yield fault("on_nan", "rewind", "needs the optimizer in checkpoints", "Leave --no-save-optim out")
    if optimizer.spike_window == 1:
        yield fault("spike_window", 1, "is too short to tell a spike", "Give 2 or more; 128 is usual")
    if optimizer.on_spike != "warn" and not optimizer.spike_threshold:
        yield fault("on_spike", optimizer.on_spike, "needs to know what a spike is", "Add --spike-threshold 10")
    for name, usual in (("slow_rank_ratio", 1.5), ("slow_save_ratio", 3)):
        ratio = getattr(run.monitor, name)
        if ratio and not ratio > 1:
            yield fault(name, ratio, "must be above 1, or 0", f"{usual} is usual")


def _checkpoint(run: Run) -> Iterator[Fault]:
    checkpoint = run.checkpoint
    if checkpoint.save is not None and checkpoint.save_interval is None:
        yield fault("save_interval", None, "is required with --save", "Add --save-interval STEPS")
    load = checkpoint.load
    if load is not None and not checkpoint.loads_own and not os.path.isdir(load):
        yield fault("load", load, "is not a directory", "Correct the path")
    if load is not None and os.path.isfile(os.path.join(load, TRACKER)):
        remedy = f"Make a run directory of them: megalith convert --from megatron {load} --to RUN_DIR"
        yield fault("load", load, "holds checkpoints of Megatron-LM", remedy)
    if checkpoint.finetune and checkpoint.load is None:
        yield fault("finetune", None, "needs --load, the checkpoint to start from", "Add --load DIR")
    if checkpoint.keep_every is not None and checkpoint.keep_last is None:
        yield fault("keep_every", checkpoint.keep_every, "needs --keep-last", "Add --keep-last N")
    if run.parallel.max_restarts and checkpoint.save and not (checkpoint.auto_resume or checkpoint.loads_own):
        rule = "starts lost ranks again to go on from the newest checkpoint, which --no-auto-resume forbids"
        yield fault("max_restarts", run.parallel.max_restarts, rule, "Give only one of them")


def _profile(run: Run) -> Iterator[Fault]:
    monitor, steps = run.monitor, run.train.train_iters
    if not monitor.profile:
        return
    if monitor.profile_dir is None and run.checkpoint.save is None:
        yield fault("profile", None, "needs a place to write to", "Add --profile-dir DIR, or --save DIR")
    if monitor.profile_step_end < monitor.profile_step_start:
        rule = f"is before --profile-step-start = {monitor.profile_step_start}"
        yield fault("profile_step_end", monitor.profile_step_end, rule, "Raise it")
    if steps is not None and monitor.profile_step_start > steps:
        rule = f"is after the last step, {steps}"
        yield fault("profile_step_start", monitor.profile_step_start, rule, "Lower it")
