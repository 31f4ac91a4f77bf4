"""Flags of Megatron-LM's later versions (2022 on) that are no flags here: what to do with each, so that a script moves
over in one round. Those that mean the same are simply understood (`also` and `values` of a setting)."""

from collections.abc import Iterator

RULE = "is a flag of Megatron-LM's later versions"

# What to do, and the flags; one that ends in a star stands for all that begin so.
_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        "leave it out: there is one implementation, and fused kernels are taken wherever they serve",
        "--transformer-impl --use-mcore-models --use-legacy-models --use-flash-attn --attention-backend "
        "--no-persist-layer-norm --no-bias-swiglu-fusion --no-rope-fusion --apply-rope-fusion "
        "--cross-entropy-loss-fusion --cross-entropy-fusion-impl --no-gradient-accumulation-fusion",
    ),
    (
        "leave it out: gradients travel during the backward pass wherever the layout allows it",
        "--overlap-grad-reduce --delay-grad-reduce --no-delay-grad-reduce --align-grad-reduce --no-align-grad-reduce "
        "--ddp-bucket-size --ddp-num-buckets --ddp-average-in-collective",
    ),
    (
        "leave it out: checkpoints are written in the background, in one format that every layout reads",
        "--async-save --ckpt-format --use-dist-ckpt --use-dist-checkpointing --auto-detect-ckpt-format --dist-ckpt-* "
        "--ckpt-fully-parallel-save --no-ckpt-fully-parallel-save --ckpt-fully-parallel-load --ckpt-convert-format "
        "--ckpt-assume-constant-structure --use-persistent-ckpt-worker --async-strategy --non-persistent-*",
    ),
    ("begin with the run file that lies in its run directory: megalith pretrain DIR/run.toml", "--use-checkpoint-args"),
    (
        "name the checkpoint itself and another place to save to: --load DIR/checkpoints/step-0001000 --save OTHER",
        "--ckpt-step",
    ),
    ("use --load with --finetune", "--pretrained-checkpoint"),
    ("use --keep-last and --keep-every", "--save-retain-interval"),
    ("leave it out: a signal to stop always saves first", "--exit-signal-handler"),
    (
        "leave it out: layers are recomputed in chunks of --checkpoint-num-layers, which is the method uniform",
        "--recompute-method",
    ),
    ("use --checkpoint-num-layers, which is that of the method uniform", "--recompute-num-layers"),
    ("use --recompute-granularity selective", "--recompute-modules"),
    ("use --data-parallel-sharding", "--use-custom-fsdp --use-megatron-fsdp --data-parallel-sharding-strategy"),
    (
        "use --data-parallel-sharding gradients with --data-parallel-shard-size, which counts the ranks of a group",
        "--num-distributed-optimizer-instances",
    ),
    ("use --context-exchange", "--cp-comm-type --hierarchical-context-parallel-sizes"),
    (
        "use --num-layers-per-virtual-pipeline-stage, which counts the layers of a part and not the parts",
        "--num-virtual-stages-per-pipeline-rank",
    ),
    ("use --num-layers: both stacks are as deep", "--encoder-num-layers --decoder-num-layers"),
    ("leave it out, or use megalith evaluate", "--skip-train"),
    (
        "leave it out: stages are cut so that their work is even",
        "--decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers --pipeline-model-parallel-layout "
        "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split --standalone-embedding-stage "
        "--pipeline-model-parallel-split-rank",
    ),
    (
        "leave it out: ranks are laid out by the tensor, context, pipeline and data-parallel sizes, and launched by "
        "torchrun or --nproc",
        "--use-tp-pp-dp-mapping --use-ring-exchange-p2p --nccl-communicator-config-path "
        "--use-sharp --high-priority-stream-groups",
    ),
    ("use --hang-timeout and --join-timeout, in seconds", "--distributed-timeout-minutes"),
    ("use --deterministic", "--deterministic-mode"),
    ("use --check-replicas N", "--check-weight-hash-across-dp-replicas-interval"),
    (
        "leave it out: --on-nan and --on-spike say what such a step does",
        "--check-for-nan-in-loss-and-grad --no-check-for-nan-in-loss-and-grad --check-for-spiky-loss "
        "--check-for-large-grads",
    ),
    ("use --check-compute N", "--rerun-mode"),
    ("leave it out: tests put faults in", "--error-injection-rate --error-injection-type"),
    (
        "leave it out: scales of 8-bit numbers are those of each tensor as it is",
        "--fp8-recipe --fp8-margin --fp8-interval --fp8-amax-history-len --fp8-amax-compute-algo "
        "--fp8-param-gather --no-fp8-wgrad",
    ),
    ("use --optimizer-state-dtype", "--exp-avg-dtype --exp-avg-sq-dtype --use-precision-aware-optimizer"),
    ("leave it out: weights and gradients are fp32", "--main-grads-dtype --main-params-dtype --grad-reduce-in-bf16"),
    (
        "use --data-path, --valid-data-path and --test-data-path",
        "--per-split-data-args-path --data-args-path",
    ),
    (
        "leave it out: rank 0 makes the index maps, all map them, and no mask is sent",
        "--no-mmap-bin-files --num-dataset-builder-threads --no-create-attention-mask-in-dataloader --s3-cache-path",
    ),
    ("leave it out: --position-embedding-type rope has no table", "--no-position-embedding --add-position-embedding"),
    (
        "leave it out: tokens/s, TFLOP/s and memory of each interval stand in DIR/log.jsonl and in TensorBoard",
        "--log-throughput --log-progress --timing-log-level --timing-log-option --log-straggler "
        "--no-barrier-with-level-1-timing --barrier-with-L1-time --log-world-size-to-tensorboard "
        "--log-learning-rate-to-tensorboard --log-loss-scale-to-tensorboard --log-energy",
    ),
    ("use --tensorboard-dir, or read DIR/log.jsonl", "--wandb-*"),
    (
        "leave it out: --profile writes a Chrome trace and a memory snapshot",
        "--use-pytorch-profiler --profile-ranks --record-memory-history --memory-snapshot-path",
    ),
    (
        "leave it out: there is nothing to set by hand",
        "--manual-gc --manual-gc-interval --no-manual-gc-eval --empty-unused-memory-level --enable-cuda-graph "
        "--external-cuda-graph --cuda-graph-* --microbatch-group-size-per-virtual-pipeline-stage "
        "--logging-level --data-parallel-random-init --te-rng-tracker --inprocess-restart --config-logger-dir "
        "--load-main-params-from-ckpt --test-mode --enable-one-logger --no-one-logger --one-logger-* "
        "--disable-gloo-process-groups --enable-gloo-process-groups --init-model-with-meta-device "
        "--torch-fsdp2-no-reshard-after-forward --mid-level-dataset-surplus "
        "--disable-bf16-reduced-precision-matmul --clone-scatter-output-in-embedding "
        "--no-clone-scatter-output-in-embedding "
        "--no-initialization --perform-initialization --disable-straggler-on-startup --enable-ft-package "
        "--overlap-param-gather --overlap-param-gather-with-optimizer-step --align-param-gather "
        "--no-align-param-gather --no-overlap-p2p-communication --overlap-p2p-communication-warmup-flush --nccl-ub "
        "--no-async-tensor-model-parallel-allreduce --deallocate-pipeline-outputs --defer-embedding-wgrad-compute",
    ),
    (
        "leave it out: the loss of a step is always the mean over all of its tokens",
        "--calculate-per-token-loss",
    ),
    (
        "Megalith has nothing of the kind; the model without it is another one",
        "--num-experts --moe-* --multi-latent-attention --mtp-* --hybrid-* --mamba-* --spec --retro-* --swin-* "
        "--dino-* --squared-relu --apply-layernorm-1p --window-size --rotary-interleaved "
        "--rotary-seq-len-interpolation-factor --tiktoken-*",
    ),
    (
        "Megalith has nothing of the kind; the training without it is another one",
        "--decoupled-lr --decoupled-min-lr --start-weight-decay --end-weight-decay --weight-decay-incr-style "
        "--first-last-layers-bf16 --num-layers-at-start-in-bf16 --num-layers-at-end-in-bf16",
    ),
    (
        "leave it out: Megalith has nothing of the kind, and what is computed is the same without it",
        "--tp-comm-* --expert-* --encoder-tensor-model-parallel-size --encoder-pipeline-model-parallel-size "
        "--optimizer-cpu-offload --optimizer-offload-fraction --cpu-offloading-num-layers --inference-* "
        "--iter-per-epoch",
    ),
    ("give its settings as flags, or in a run file", "--yaml-cfg"),
)


def later_flags() -> Iterator[tuple[str, str]]:
    """Each flag, or the beginning of several and a star, with what to do instead."""
    for remedy, flags in _REMEDIES:
        for flag in flags.split():
            yield flag, remedy


def remedy_of(flag: str) -> str | None:
    """What a user of such a flag is to do; None: it is no flag of Megatron-LM's later versions that is known here."""
    for known, remedy in later_flags():
        if flag == known or (known.endswith("*") and flag.startswith(known[:-1])):
            return remedy
    return None
