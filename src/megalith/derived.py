"""What follows from a configuration: pure functions, never written back into it.

`reference_arguments` gives the 139 values that Megatron-LM prints for the same command line.
"""

from typing import Any

from megalith.config import Run, known_settings
from megalith.models.shape import inner_width
from megalith.parallel.mesh import Layout

# Reading data sets, making their index and compiling the first step take their time.
START_SECONDS = 1800.0
ENDLESS = 7 * 24 * 3600.0

# What Megatron-LM's program for a task fills in where the command line says nothing.
TASK_DEFAULTS: dict[str, dict[str, str]] = {
    "gpt": {"tokenizer_type": "GPT2BPETokenizer"},
    "bert": {"tokenizer_type": "BertWordPieceLowerCase"},
    "t5": {"tokenizer_type": "BertWordPieceLowerCase"},
    "ict": {"tokenizer_type": "BertWordPieceLowerCase"},
    "vit": {"dataloader_type": "cyclic"},
    "classify": {"tokenizer_type": "BertWordPieceLowerCase", "dataloader_type": "cyclic"},
    "retriever": {"tokenizer_type": "BertWordPieceLowerCase", "dataloader_type": "cyclic"},
}

# Stacks of --num-layers layers each, where a task's model has more than one: an encoder and a decoder.
STACKS = {"t5": 2}


def tokenizer_type(run: Run) -> str:
    """The kind of tokenizer: what was asked for, or the task's usual one."""
    return run.data.tokenizer_type or TASK_DEFAULTS[run.task].get("tokenizer_type", "GPT2BPETokenizer")


def dataloader_type(run: Run) -> str:
    """single (one pass in order) or cyclic (a new order every epoch)."""
    return run.data.dataloader_type or TASK_DEFAULTS[run.task].get("dataloader_type", "single")


def given_length(run: Run) -> tuple[str, int | None]:
    """Tokens in a sample's input as far as given: which of two settings says it, and what."""
    name = "encoder_seq_length" if run.data.seq_length is None else "seq_length"
    return name, getattr(run.data, name)


def sequence_length(run: Run) -> int:
    """Tokens in a sample's input."""
    _, length = given_length(run)
    assert length is not None, "check.py saw to it"
    return length


def retriever_length(run: Run) -> int:
    """Tokens of a question or passage: --retriever-seq-length; where it says nothing, no more than there are places."""
    length, places = run.data.retriever_seq_length, run.model.max_position_embeddings
    is_usual = length == known_settings()["retriever_seq_length"].field.default
    return min(length, places) if is_usual and places is not None else length


def num_layers(run: Run) -> int:
    """Layers of all stacks, which pipeline stages share out."""
    return (run.model.num_layers or 0) * STACKS.get(run.task, 1)


def global_batch_size(run: Run, data_parallel: int) -> int:
    """Sequences per step over all replicas, once any ramp is over."""
    if run.optimizer.global_batch_size is not None:
        return run.optimizer.global_batch_size
    assert run.optimizer.micro_batch_size is not None
    return run.optimizer.micro_batch_size * data_parallel


def start_limit(run: Run) -> float:
    """Seconds that one phase of the start, or the first step, may take; 0: any."""
    return max(START_SECONDS, run.parallel.hang_timeout) if run.parallel.hang_timeout else 0.0


def collective_timeout(run: Run) -> float:
    """Seconds after which torch gives a collective up: later than the watch, which says who is missing and why."""
    return (start_limit(run) or ENDLESS) + 60.0


def compute_dtype(run: Run) -> str:
    """The type of activations, by torch's name."""
    return "float16" if run.optimizer.fp16 else "bfloat16" if run.optimizer.bf16 else "float32"


def recompute_granularity(run: Run) -> str | None:
    """full, selective or None; Megatron-LM's --checkpoint-activations means full."""
    if run.parallel.recompute_granularity is not None:
        return run.parallel.recompute_granularity
    return "full" if run.parallel.checkpoint_activations else None


def reference_arguments(run: Run, layout: Layout) -> dict[str, Any]:
    """The arguments as Megatron-LM prints them for the same command line, by name: what was given and what it derives.

    Settings that Megatron-LM does not know are left out.
    """
    values: dict[str, Any] = {}
    for name, known in known_settings().items():
        value = getattr(getattr(run, known.part), name)
        values[name] = list(value) if isinstance(value, tuple) else value
    for name in OURS:
        del values[name]
    model, optimizer, parallel = run.model, run.optimizer, run.parallel
    derived: dict[str, Any] = {
        "rank": 0,  # who prints them there
        "world_size": layout.world_size,
        "data_parallel_size": layout.data,
        "params_dtype": f"torch.{compute_dtype(run)}",
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "virtual_pipeline_model_parallel_size": None,
        "global_batch_size": global_batch_size(run, layout.data),
        "dataloader_type": dataloader_type(run),
        "encoder_seq_length": sequence_length(run),
        "seq_length": sequence_length(run),
        "ffn_hidden_size": inner_width(model),
        "kv_channels": model.kv_channels or (model.hidden_size or 0) // (model.num_attention_heads or 1),
        "accumulate_allreduce_grads_in_fp32": optimizer.accumulate_allreduce_grads_in_fp32 or optimizer.bf16,
    }
    if run.task != "vit":
        derived["tokenizer_type"] = tokenizer_type(run)
    if derived["accumulate_allreduce_grads_in_fp32"]:
        derived["use_contiguous_buffers_in_ddp"] = True
    if parallel.num_layers_per_virtual_pipeline_stage:
        per_stage = num_layers(run) // parallel.pipeline_model_parallel_size
        derived["virtual_pipeline_model_parallel_size"] = per_stage // parallel.num_layers_per_virtual_pipeline_stage
    return {**values, **derived}


# Settings of Megalith that Megatron-LM does not have.
OURS = (
    "untie_embeddings_and_output_weights",
    "norm_after_residual",
    "normalization",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "activation_function",
    "swiglu",
    "softmax_scale",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "use_rope_scaling",
    "rope_scaling_factor",
    "group_query_attention",
    "num_query_groups",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "output_bias",
    "scale_decoder_outputs",
    "pairs_format",
    "train_data",
    "train_with_neg",
    "train_hard_neg",
    "val_av_rank_hard_neg",
    "val_av_rank_other_neg",
    "valid_data",
    "optimizer_state_dtype",
    "tokenizer_model",
    "data_cache_path",
    "corpus",
    "mock_data",
    "vocab_size",
    "corpus_vocab_size",
    "image_augmentation",
    "verify_data",
    "max_epochs",
    "allow_changed_data",
    "exit_on_missing_checkpoint",
    "recompute_granularity",
    "device",
    "nproc",
    "max_restarts",
    "stop_grace",
    "join_timeout",
    "hang_timeout",
    "auto_resume",
    "on_save_failure",
    "keep_last",
    "keep_every",
    "log_format",
    "profile",
    "profile_step_start",
    "profile_step_end",
    "profile_dir",
    "exit_before_training",
    "eval_first",
    "unigram_baseline",
    "sample_prompt",
    "sequence_parallel",
    "context_parallel_size",
    "context_exchange",
    "pipeline_schedule",
    "data_parallel_sharding",
    "data_parallel_shard_size",
    "deterministic",
    "fp8_format",
    "compile",
    "activation_memory_budget",
    "valid_data_path",
    "test_data_path",
    "lr_wsd_decay_style",
    "lr_wsd_decay_iters",
    "lr_wsd_decay_samples",
    "lr_warmup_init",
    "on_nan",
    "max_bad_steps",
    "spike_threshold",
    "spike_window",
    "on_spike",
    "check_replicas",
    "on_replica_fault",
    "check_compute",
    "slow_rank_ratio",
    "slow_save_ratio",
)
