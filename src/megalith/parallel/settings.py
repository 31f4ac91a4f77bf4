"""Settings: how the model is laid over ranks."""

from dataclasses import dataclass

from megalith.fields import setting

# The pipeline schedule whose backward passes come in two halves.
SPLIT_BACKWARD = "zero-bubble"


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is laid over ranks."""

    tensor_model_parallel_size: int = setting(1, "tensor-parallel ways", section="distributed")
    pipeline_model_parallel_size: int = setting(1, "pipeline stages", section="distributed")
    num_layers_per_virtual_pipeline_stage: int | None = setting(
        None, "layers per model chunk", section="distributed", unit="layers"
    )
    distributed_backend: str = setting(
        "nccl",
        "torch.distributed backend (accepted; it follows the device)",
        section="distributed",
        choices=("nccl", "gloo"),
    )
    DDP_impl: str = setting(
        "local",
        "own DDP or torch DDP (accepted; one reduction serves all)",
        section="distributed",
        choices=("local", "torch"),
    )
    use_contiguous_buffers_in_ddp: bool = setting(
        False, "one flat gradient buffer (accepted; gradients go in buckets)", section="distributed", switch="on"
    )
    scatter_gather_tensors_in_pipeline: bool = setting(
        True,
        "send whole activations between stages (accepted; torch's pipelining sends them)",
        section="distributed",
        flag="--no-scatter-gather-tensors-in-pipeline",
        switch="off",
    )
    local_rank: int | None = setting(
        None,
        "device index from the launcher (accepted; LOCAL_RANK tells it)",
        section="distributed",
        flag="--local_rank",
        also=("--local-rank",),
    )
    lazy_mpu_init: bool | None = setting(
        None, "return a continuation instead of initialising DDP (accepted; DDP starts at once)", section="distributed"
    )
    use_cpu_initialization: bool | None = setting(
        None, "initialise weights on the CPU (accepted; the same on every device)", section="distributed", switch="on"
    )
    checkpoint_activations: bool = setting(False, "recompute activations in backward", section="training", switch="on")
    distribute_checkpointed_activations: bool = setting(
        False,
        "shard saved activations over the tensor group",
        section="training",
        switch="on",
        also=("--distribute-saved-activations",),
    )
    checkpoint_num_layers: int = setting(1, "layers per recomputed chunk", section="training", unit="layers")
    recompute_granularity: str | None = setting(
        None,
        "recompute whole layers or only the attention core in the backward pass",
        section="training",
        choices=("full", "selective"),
        values={"--recompute-activations": "selective"},
    )
    device: str = setting(
        "auto",
        "where to compute; auto takes a GPU if there is one",
        section="distributed",
        choices=("auto", "cpu", "cuda"),
    )
    nproc: int | None = setting(
        None, "start this many processes on this machine", section="distributed", unit="processes"
    )
    max_restarts: int = setting(
        0, "with --nproc: start lost ranks again at most so often", section="distributed", unit="restarts"
    )
    stop_grace: float = setting(
        300.0,
        "with --nproc: time for the ranks to finish their step and save after a signal to stop",
        section="distributed",
        unit="seconds",
    )
    join_timeout: float = setting(
        300.0, "time for all ranks to come; then the missing are named", section="distributed", unit="seconds"
    )
    hang_timeout: float = setting(
        600.0,
        "time without progress of a rank, once training has begun, after which it is named and the job ends; 0: any",
        section="distributed",
        unit="seconds",
    )
    sequence_parallel: bool = setting(
        False, "cut the stream between blocks along the tokens over tensor ranks", section="distributed", switch="on"
    )
    context_parallel_size: int = setting(1, "ranks that share a sequence", section="distributed", unit="ranks")
    context_exchange: str = setting(
        "gather",
        "how attention sees a cut sequence: gather all keys, or trade tokens for heads",
        section="distributed",
        choices=("gather", "all-to-all"),
    )
    pipeline_schedule: str | None = setting(
        None,
        "order of forward and backward passes",
        section="distributed",
        choices=("gpipe", "1f1b", "interleaved", "zero-bubble"),
        usual="1f1b, or interleaved with several parts a rank",
    )
    data_parallel_sharding: str = setting(
        "none",
        "what replicas share out instead of each holding all (ZeRO stages 0 to 3)",
        section="distributed",
        choices=("none", "optimizer", "gradients", "parameters"),
        values={"--use-distributed-optimizer": "optimizer", "--use-torch-fsdp2": "parameters"},
    )
    data_parallel_shard_size: int | None = setting(
        None,
        "ranks that share out gradients or parameters, for instance those of a node; the others hold copies of theirs",
        usual="all replicas",
        section="distributed",
        unit="ranks",
    )
    deterministic: bool = setting(
        False,
        "add gradients in an order that does not depend on the number of replicas",
        section="distributed",
        switch="on",
    )
    fp8_format: str | None = setting(
        None,
        "multiply in 8-bit floating point inside blocks: e4m3 everywhere, or hybrid with e5m2 for gradients",
        section="mixed precision",
        choices=("e4m3", "hybrid"),
    )
    compile: str = setting(
        "off",
        "compile each transformer block (torch.compile); auto: where the run is long enough to gain, and says so",
        section="training",
        choices=("off", "auto", "on"),
    )
    activation_memory_budget: float | None = setting(
        None,
        "with --compile: keep this share of the activations, recompute the cheapest rest",
        section="training",
        unit="0 to 1",
    )
    check_replicas: int | None = setting(
        None, "compare the weights that ranks hold alike, every so many steps", section="numbers", unit="steps"
    )
    on_replica_fault: str = setting(
        "stop", "what to do if --check-replicas finds a difference", section="numbers", choices=("stop", "warn")
    )
    check_compute: int = setting(
        0,
        "take the passes of a step twice, every so many steps, and compare what comes of them; 0: never",
        section="numbers",
        unit="steps",
    )
