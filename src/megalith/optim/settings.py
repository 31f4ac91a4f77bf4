"""Settings: how weights change from step to step."""

from dataclasses import dataclass

from megalith.fields import setting

LR_DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
WSD_DECAY_STYLES = ("exponential", "linear", "cosine", "minus_sqrt")


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights change from step to step."""

    optimizer: str = setting("adam", "adam or sgd", section="training", choices=("adam", "sgd"))
    optimizer_state_dtype: str = setting(
        "fp32", "type of Adam's moments: fp32, bf16 or int8", section="training", choices=("fp32", "bf16", "int8")
    )
    lr: float | None = setting(None, "peak learning rate", section="learning rate")
    lr_decay_style: str = setting(
        "linear",
        "constant, linear, cosine, inverse-square-root, or WSD, which is constant but for its end",
        section="learning rate",
        choices=LR_DECAY_STYLES,
    )
    lr_decay_iters: int | None = setting(
        None, "decay length in iterations", section="learning rate", usual="the whole training", unit="steps"
    )
    lr_decay_samples: int | None = setting(
        None, "decay length in samples", section="learning rate", usual="the whole training", unit="sequences"
    )
    lr_wsd_decay_style: str = setting(
        "exponential",
        "how WSD falls at its end: exponential, linear, cosine or minus_sqrt",
        section="learning rate",
        choices=WSD_DECAY_STYLES,
    )
    lr_wsd_decay_iters: int | None = setting(
        None, "length of the end in which WSD falls, in iterations", section="learning rate", unit="steps"
    )
    lr_wsd_decay_samples: int | None = setting(
        None, "length of the end in which WSD falls, in samples", section="learning rate", unit="sequences"
    )
    lr_warmup_fraction: float | None = setting(
        None, "warm-up as a fraction of the decay length", section="learning rate", unit="of the decay length"
    )
    lr_warmup_iters: int = setting(0, "warm-up iterations", section="learning rate", unit="steps")
    lr_warmup_samples: int = setting(0, "warm-up samples", section="learning rate", unit="sequences")
    lr_warmup_init: float = setting(0.0, "rate at which the warm-up begins", section="learning rate")
    min_lr: float = setting(0.0, "LR floor", section="learning rate")
    override_lr_scheduler: bool = setting(
        False,
        "command-line LR settings win over the checkpoint",
        section="learning rate",
        switch="on",
        also=("--override-opt_param-scheduler",),
    )
    use_checkpoint_lr_scheduler: bool = setting(
        False,
        "checkpoint LR settings win",
        section="learning rate",
        switch="on",
        also=("--use-checkpoint-opt_param-scheduler",),
    )
    weight_decay: float = setting(0.01, "decoupled weight decay", section="regularization")
    clip_grad: float = setting(1.0, "global L2 clip threshold, 0 = off", section="regularization")
    adam_beta1: float = setting(0.9, "Adam first-moment decay", section="regularization")
    adam_beta2: float = setting(0.999, "Adam second-moment decay", section="regularization")
    adam_eps: float = setting(1e-08, "Adam denominator constant", section="regularization")
    sgd_momentum: float = setting(0.9, "SGD momentum", section="regularization")
    fp16: bool = setting(False, "fp16 training", section="mixed precision", switch="on")
    bf16: bool = setting(False, "bfloat16 training", section="mixed precision", switch="on")
    loss_scale: float | None = setting(None, "constant loss scale", section="mixed precision", usual="dynamic")
    initial_loss_scale: float = setting(4294967296, "first dynamic loss scale", section="mixed precision")
    min_loss_scale: float = setting(1.0, "floor of the dynamic scale", section="mixed precision")
    loss_scale_window: float = setting(
        1000, "clean iterations before the scale doubles", section="mixed precision", unit="clean steps"
    )
    hysteresis: int = setting(
        2, "overflows tolerated before the loss scale drops", section="mixed precision", unit="overflows"
    )
    accumulate_allreduce_grads_in_fp32: bool = setting(
        False,
        "keep and all-reduce gradients in fp32 (accepted; they always are)",
        section="mixed precision",
        switch="on",
    )
    micro_batch_size: int | None = setting(
        None, "samples per forward pass per replica", section="training", unit="sequences"
    )
    global_batch_size: int | None = setting(
        None, "samples per update", section="training", usual="micro batch size x replicas", unit="sequences"
    )
    rampup_batch_size: tuple[str, ...] | None = setting(
        None, "start, increment, ramp samples", section="training", repeat="*"
    )
    on_nan: str = setting(
        "skip",
        "for a step whose loss or gradient is not finite; see --max-bad-steps",
        section="numbers",
        choices=("skip", "stop", "rewind"),
    )
    max_bad_steps: int = setting(
        10,
        "bad steps in a row that are skipped; one more stops the run, or rewinds it",
        section="numbers",
        unit="steps",
    )
    spike_threshold: float = setting(
        0.0,
        "a loss or gradient norm so far above the last ones is a spike, 0 = off",
        section="numbers",
        unit="standard deviations",
    )
    spike_window: int = setting(128, "steps that a spike is judged by", section="numbers", unit="steps")
    on_spike: str = setting("warn", "what to do at a spike", section="numbers", choices=("warn", "skip", "stop"))
