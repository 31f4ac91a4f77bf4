"""What other programs (nanoGPT, Hugging Face's Trainer, Lightning, torchtitan) call what is a setting or a command
here, so that who comes from them is told its name.

None of these is understood: a batch there is not always what is one here.
"""

import difflib
from collections.abc import Collection, Mapping
from functools import cache

# What a command is called elsewhere, or has no command here, and what does it.
COMMANDS_ELSEWHERE = {
    "version": "--version",
    "help": "--help",
    "sample": "generate",
    "chat": "generate",
    "eval": "evaluate",
    "test": "evaluate",
    "prepare": "preprocess",
    "tokenize": "preprocess",
    "resume": "pretrain, which goes on where it stopped",
    "--preset": "megalith pretrain --preset NAME",
    # torch.distributed.launch puts it in front of all words.
    "--local-rank": "torchrun, or the module megalith.pretrain_gpt, whose words are flags alone",
}

# The setting, and its names elsewhere.
_NAMES: dict[str, str] = {
    "lr": "learning_rate learn_rate max_lr peak_lr base_lr lr_max",
    "min_lr": "min_learning_rate lr_min final_lr",
    "lr_decay_style": "lr_scheduler lr_scheduler_type lr_schedule scheduler decay_lr decay_type",
    "lr_decay_iters": "decay_steps lr_decay_steps",
    "lr_wsd_decay_iters": "decay_ratio wsd_decay_steps num_decay_steps cooldown_steps cooldown_iters warmdown_iters",
    "lr_warmup_iters": "warmup_steps warmup_iters num_warmup_steps lr_warmup_steps",
    "lr_warmup_init": "warmup_init_lr warmup_start_lr init_lr start_lr",
    "lr_warmup_fraction": "warmup_ratio warmup_fraction",
    "optimizer": "optim adamw",
    "adam_eps": "adam_epsilon",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "weight_decay": "wd",
    "clip_grad": "grad_clip gradient_clip gradient_clip_val max_grad_norm max_norm clip_norm clip",
    "micro_batch_size": "batch_size device_batch_size local_batch_size train_batch_size per_device_train_batch_size",
    "global_batch_size": "total_batch_size",
    "seq_length": "block_size seq_len sequence_length context_length context_size max_seq_len max_seq_length",
    "max_position_embeddings": "n_positions n_ctx max_positions",
    "num_layers": "n_layer n_layers layers depth num_hidden_layers num_blocks",
    "num_attention_heads": "n_head n_heads heads num_heads",
    "num_query_groups": "n_kv_heads n_kv_head num_kv_heads num_key_value_heads",
    "hidden_size": "n_embd d_model hidden_dim embed_dim embedding_dim embedding_size model_dim dim width",
    "ffn_hidden_size": "intermediate_size ffn_dim mlp_dim d_ff ffn_size",
    "hidden_dropout": "resid_dropout resid_pdrop embd_pdrop",
    "attention_dropout": "attn_dropout attn_pdrop",
    "add_bias_linear": "bias",
    "add_qkv_bias": "qkv_bias",
    "qk_layernorm": "qk_norm use_qk_norm",
    "init_method_std": "init_std initializer_range",
    "layernorm_epsilon": "layer_norm_eps rms_norm_eps norm_eps layer_norm_epsilon",
    "rotary_base": "rope_theta rope_base",
    "tokenizer_type": "tokenizer",
    "tokenizer_model": "tokenizer_name tokenizer_path tokenizer_file",
    "num_workers": "dataloader_num_workers workers",
    "train_iters": "max_iters max_steps num_steps num_iterations iterations iters steps total_steps train_steps",
    "seed": "random_seed manual_seed",
    "save": "out_dir output_dir save_dir checkpoint_dir ckpt_dir run_dir default_root_dir dump_folder",
    "save_interval": "save_steps save_every save_freq checkpoint_interval ckpt_interval always_save_checkpoint",
    "keep_last": "save_total_limit save_top_k keep_latest_k",
    "log_interval": "logging_steps log_freq log_every log_every_n_steps",
    "tensorboard_dir": "logging_dir log_dir logdir",
    "eval_interval": "eval_steps eval_every eval_freq val_interval val_check_interval",
    "eval_iters": "eval_batches limit_val_batches val_steps",
    "valid_data_path": "val_data_path validation_data_path val_data eval_data val_file validation_file eval_dataset",
    "device": "accelerator cuda gpu no_cuda use_cpu cpu",
    "tensor_model_parallel_size": "tp tp_size tensor_parallel tensor_parallel_size tensor_parallel_degree",
    "pipeline_model_parallel_size": "pp pp_size pipeline_parallel pipeline_parallel_size pipeline_parallel_degree",
    "context_parallel_size": "cp cp_size context_parallel context_parallel_degree",
    "data_parallel_sharding": "fsdp zero zero_stage deepspeed",
    "data_parallel_shard_size": "data_parallel_shard_degree",
    "checkpoint_activations": "gradient_checkpointing grad_checkpointing activation_checkpointing",
    "distributed_backend": "backend",
    "compile": "torch_compile use_compile",
    "sample_prompt": "prompt",
}

# What to do, where it is not one setting, and the names.
_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        "use --global-batch-size, sequences of a step: --micro-batch-size times replicas times the passes to add up",
        "gradient_accumulation_steps gradient_accumulation grad_accum grad_accum_steps accumulate_grad_batches",
    ),
    (
        "use --train-iters or --train-samples, which count steps or sequences",
        "epochs num_epochs num_train_epochs epoch",
    ),
    (
        "use --bf16 or --fp16; without either it is fp32",
        "dtype precision torch_dtype mixed_precision amp autocast tf32 float16 bfloat16",
    ),
    (
        "leave it out: the same command goes on from the newest checkpoint in --save; --load DIR takes another run's",
        "resume resume_from resume_from_checkpoint ckpt_path checkpoint checkpoint_path ckpt init_from restore",
    ),
    (
        "use --data-path with the token files that megalith preprocess makes of a text",
        "data data_dir data_root data_file dataset dataset_dir dataset_name dataset_path train_file text input",
    ),
    (
        "leave it out: --tokenizer-type with --vocab-file or --tokenizer-model says it",
        "vocab n_vocab vocabulary vocabulary_size",
    ),
    ("use --hidden-dropout and --attention-dropout", "dropout dropout_rate"),
    ("use --tensorboard-dir, or read DIR/log.jsonl", "wandb wandb_log wandb_project wandb_run_name"),
    ("leave it out: --save DIR names the run", "name run_name experiment_name"),
    ("leave it out: what no other axis takes is data parallel", "dp dp_size data_parallel data_parallel_size ddp"),
    ("leave it out: fused kernels are taken wherever they serve", "flash flash_attention attn_implementation"),
    ("name the run file without a flag: megalith pretrain RUN.toml", "config config_file job_config"),
    ("name a task before the flags, or use --preset", "model model_name model_type"),
    ("use --log-format", "verbose quiet"),
    (
        "use --nproc for this machine, torchrun for several; megalith plan has --ranks",
        "gpus num_gpus n_gpus ngpu devices num_devices nproc_per_node num_processes world_size",
    ),
    ("use megalith --version", "version"),
)

# Flags of commands other than pretrain, and their names elsewhere.
_FLAGS_OF_COMMANDS: dict[str, str] = {
    "--prompt": "start text input_text question message input",
    "--max-new-tokens": "max_tokens num_tokens n_tokens new_tokens max_length max_len length out_seq_length",
    "--temperature": "temp",
    "--greedy": "no_sample",
    "--step": "checkpoint ckpt iteration iter",
    "--device": "cuda gpu cpu accelerator",
    "--file": "data data_path input_file test_file",
    "--input": "data data_path input_file files dataset train_file",
    "--output-prefix": "output out output_file output_dir out_dir save",
    "--tokenizer-type": "tokenizer tokenizer_name",
    "--workers": "num_workers num_proc processes nproc threads jobs",
}
# What others have a flag for and commands here take by its place: the directory of a run.
RUN_ELSEWHERE = frozenset(("load", "save", "out_dir", "output_dir", "run_dir", "model", "model_path", "checkpoint_dir"))


def plain(name: str) -> str:
    """The name without what programs spell otherwise: hyphens, capitals and torchtitan's section before a dot."""
    return name.lstrip("-").rpartition(".")[2].replace("-", "_").lower()


def meant(word: str, names: Mapping[str, str], remedies: Mapping[str, str]) -> str | None:
    """A remedy for an unknown word, by the nearest name: what that is called here, or its remedy; None if none is."""
    close = difflib.get_close_matches(plain(word), [*names, *remedies], n=1)
    if not close:
        return None
    return remedies.get(close[0]) or f"did you mean {names[close[0]]}?"


@cache
def names_elsewhere() -> dict[str, str]:
    """Each name that is one setting here, and that setting."""
    return {name: setting for setting, names in _NAMES.items() for name in names.split()}


@cache
def remedies() -> dict[str, str]:
    """Each name that is not one setting here, and what to do."""
    return {name: remedy for remedy, names in _REMEDIES for name in names.split()}


def flags_of_commands(flags: Collection[str]) -> dict[str, str]:
    """Each name that is one of a command's flags here, and that flag."""
    return {name: flag for flag, names in _FLAGS_OF_COMMANDS.items() if flag in flags for name in names.split()}
