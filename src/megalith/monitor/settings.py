"""Settings: what a run says about itself."""

from dataclasses import dataclass

from megalith.fields import setting


@dataclass(frozen=True)
class MonitorConfig:
    """What a run says about itself."""

    log_interval: int = setting(100, "iterations per log line", section="training", unit="steps")
    tensorboard_dir: str | None = setting(None, "TensorBoard directory", section="training", usual="SAVE/tensorboard")
    log_params_norm: bool = setting(False, "log the L2 norm of the weights", section="logging", switch="on")
    log_num_zeros_in_grad: bool = setting(False, "count zero gradient entries", section="logging", switch="on")
    tensorboard_log_interval: int = setting(1, "iterations per TensorBoard write", section="logging", unit="steps")
    tensorboard_queue_size: int = setting(1000, "pending-event limit", section="logging", unit="events")
    log_timers_to_tensorboard: bool = setting(False, "write timers", section="logging", switch="on")
    log_batch_size_to_tensorboard: bool = setting(False, "write batch size scalars", section="logging", switch="on")
    log_learning_rate_to_tensorboard: bool = setting(
        True,
        "leave LR scalars out",
        section="logging",
        flag="--no-log-learnig-rate-to-tensorboard",
        also=("--no-log-learning-rate-to-tensorboard",),
        switch="off",
    )
    log_loss_scale_to_tensorboard: bool = setting(
        True, "leave loss-scale scalars out", section="logging", flag="--no-log-loss-scale-to-tensorboard", switch="off"
    )
    log_validation_ppl_to_tensorboard: bool = setting(
        False, "write validation perplexity", section="logging", switch="on"
    )
    log_memory_to_tensorboard: bool = setting(False, "write allocator scalars", section="logging", switch="on")
    profile: bool = setting(
        False,
        "trace a few steps: a Chrome trace, a memory snapshot, the costliest things",
        section="logging",
        switch="on",
    )
    profile_step_start: int = setting(10, "first step that --profile traces", section="logging", unit="step")
    profile_step_end: int = setting(12, "last step that --profile traces", section="logging", unit="step")
    profile_dir: str | None = setting(None, "where --profile writes", section="logging", usual="SAVE/profile")
    log_format: str = setting(
        "auto",
        "reference: Megatron-LM's lines; rich: a progress bar; json: an object a line; auto: rich on a terminal",
        section="logging",
        choices=("auto", "reference", "rich", "json"),
    )
    slow_save_ratio: float = setting(
        3.0,
        "name a checkpoint that took so many times as long as the ones before, 0 = off",
        section="logging",
        unit="times",
    )
    slow_rank_ratio: float = setting(
        1.5, "name a rank that takes so many times as long as the others, 0 = off", section="logging", unit="times"
    )
