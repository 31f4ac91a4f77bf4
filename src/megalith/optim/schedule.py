"""The learning rate, counted in samples.

The rate is a pure function of the number of samples that successful steps have consumed, so that one integer in the
checkpoint restores it. The rules are Megatron-LM's, among them that a warm-up makes the very first step run at rate 0;
those of the styles inverse-square-root and WSD, and of another rate to begin with, are of its later versions.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megalith.optim.settings import LR_DECAY_STYLES, OptimizerConfig

LATER_STYLES = ("inverse-square-root", "WSD")  # which Megatron-LM of 2021 does not have
# How a rate falls: the share of the peak that is left above the minimum, by the share of the fall that is over. WSD
# falls in each of these ways, the styles of the same names in theirs.
FALLS: dict[str, Callable[[float], float]] = {
    "exponential": lambda ratio: 2.0 * 0.5**ratio - 1.0,
    "linear": lambda ratio: 1.0 - ratio,
    "cosine": lambda ratio: 0.5 * (math.cos(math.pi * ratio) + 1.0),
    "minus_sqrt": lambda ratio: 1.0 - math.sqrt(ratio),
}
# The settings that a checkpoint fixes, with the names that Megatron-LM prints for them, in its order; then those of its
# later versions.
SPOKEN_NAMES = {
    "max_lr": "learning rate",
    "min_lr": "minimum learning rate",
    "warmup": "warmup iterations",
    "decay": "total number of iterations",
    "style": "decay style",
    "wsd_decay": "iterations of the WSD decay",
    "wsd_style": "WSD decay style",
    "init_lr": "initial learning rate of the warmup",
}
OF_WSD = ("wsd_decay", "wsd_style")
# The flags that set them, to say where a difference can be removed.
FLAGS = {
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "warmup": "--lr-warmup-fraction, --lr-warmup-iters or --lr-warmup-samples",
    "decay": "--lr-decay-iters or --lr-decay-samples; without them the length of the run",
    "style": "--lr-decay-style",
    "wsd_decay": "--lr-wsd-decay-iters or --lr-wsd-decay-samples",
    "wsd_style": "--lr-wsd-decay-style",
    "init_lr": "--lr-warmup-init",
}


@dataclass(frozen=True)
class Schedule:
    """The settings of a learning-rate schedule: five, two of the style WSD, and the rate that a warm-up begins with.

    Raises ValueError if a style is unknown, the lengths are not 0 <= warmup < decay and, with WSD, 0 < wsd_decay <=
    decay - warmup, or the rates not 0 <= min_lr <= max_lr and 0 <= init_lr <= max_lr.
    """

    max_lr: float
    min_lr: float
    warmup: float  # samples; a fraction of the decay length need not be a whole number
    decay: int  # samples, counted from the start of the training
    style: str
    wsd_decay: int = 0  # samples, the last of the decay length, in which WSD falls
    wsd_style: str = "exponential"
    init_lr: float = 0.0

    def __post_init__(self) -> None:
        if self.style not in LR_DECAY_STYLES:
            raise ValueError(
                f"style={self.style!r} must be one of {', '.join(LR_DECAY_STYLES)}: change {FLAGS['style']}"
            )
        if not 0 <= self.min_lr <= self.max_lr < math.inf:
            raise ValueError(
                f"min_lr={self.min_lr} must be at least 0 and at most max_lr={self.max_lr}: "
                "lower --min-lr or raise --lr"
            )
        if not 0 <= self.init_lr <= self.max_lr:
            raise ValueError(
                f"init_lr={self.init_lr} must be at least 0 and at most max_lr={self.max_lr}: "
                f"lower {FLAGS['init_lr']} or raise --lr"
            )
        if not self.decay > 0:
            raise ValueError(f"decay={self.decay} samples must be greater than 0: change {FLAGS['decay']}")
        if not 0 <= self.warmup < self.decay:
            raise ValueError(
                f"warmup={self.warmup} samples must be at least 0 and below decay={self.decay}: "
                f"change {FLAGS['warmup']}"
            )
        if self.style == "WSD":
            if self.wsd_style not in FALLS:
                raise ValueError(
                    f"wsd_style={self.wsd_style!r} must be one of {', '.join(FALLS)}: change {FLAGS['wsd_style']}"
                )
            if not 0 < self.wsd_decay <= self.decay - self.warmup:
                raise ValueError(
                    f"wsd_decay={self.wsd_decay} samples must be greater than 0 and fit between warmup={self.warmup} "
                    f"and decay={self.decay}: change {FLAGS['wsd_decay']}"
                )


def make_schedule(
    config: OptimizerConfig, *, global_batch_size: int, train_iters: int | None, train_samples: int | None
) -> Schedule:
    """The schedule of a run of train_iters steps or train_samples samples (one of them given).

    global_batch_size: sequences per step, over all ranks and after any ramp. Raises ValueError as `Schedule` does.
    """
    if train_iters:
        decay = (config.lr_decay_iters or train_iters) * global_batch_size
        warmup: float = config.lr_warmup_iters * global_batch_size
        wsd_decay = (config.lr_wsd_decay_iters or 0) * global_batch_size
    elif train_samples:
        decay = config.lr_decay_samples or train_samples
        warmup = config.lr_warmup_samples
        wsd_decay = config.lr_wsd_decay_samples or 0
    else:
        raise ValueError(
            f"train_iters={train_iters} and train_samples={train_samples}: one must be given and above 0. "
            "Use --train-iters or --train-samples"
        )
    if config.lr_warmup_fraction is not None:
        warmup = config.lr_warmup_fraction * decay
    if config.lr is None:
        raise ValueError("lr=None: the peak learning rate must be given. Use --lr")
    style, init_lr = config.lr_decay_style, config.lr_warmup_init
    if style != "WSD":
        return Schedule(config.lr, config.min_lr, warmup, decay, style, init_lr=init_lr)
    return Schedule(config.lr, config.min_lr, warmup, decay, style, wsd_decay, config.lr_wsd_decay_style, init_lr)


def learning_rate(num_samples: int, schedule: Schedule) -> float:
    """The rate of the step that follows num_samples samples of successful steps (skipped ones do not count).

    inverse-square-root: the peak times the root of warmup over num_samples, at least the minimum (Vaswani et al. 2017,
    section 5.3). WSD: warm-up, a stable rate, a decay at the end (Hu et al. 2024, arXiv:2404.06395).
    """
    if schedule.warmup > 0 and num_samples <= schedule.warmup:
        return schedule.init_lr + (schedule.max_lr - schedule.init_lr) * num_samples / schedule.warmup
    if schedule.style == "constant":
        return schedule.max_lr
    if num_samples > schedule.decay:
        return schedule.min_lr
    if schedule.style == "inverse-square-root":
        rate = schedule.max_lr * math.sqrt(max(schedule.warmup, 1.0) / max(num_samples, 1))
        return max(schedule.min_lr, rate)
    if schedule.style == "WSD":
        begun = num_samples - (schedule.decay - schedule.wsd_decay)
        if begun <= 0:
            return schedule.max_lr
        share = FALLS[schedule.wsd_style](begun / schedule.wsd_decay)
    else:
        share = FALLS[schedule.style]((num_samples - schedule.warmup) / (schedule.decay - schedule.warmup))
    return schedule.min_lr + share * (schedule.max_lr - schedule.min_lr)


def schedule_to_json(schedule: Schedule) -> dict[str, Any]:
    """The settings as a checkpoint keeps them, those of WSD only with it, and no rate of 0 to begin with."""
    return {name: getattr(schedule, name) for name in _names_of(schedule.style, begins_at_0=schedule.init_lr == 0)}


def _names_of(style: object, *, begins_at_0: bool) -> list[str]:
    """The settings of a schedule of this style."""
    left_out = (() if style == "WSD" else OF_WSD) + (("init_lr",) if begins_at_0 else ())
    return [name for name in SPOKEN_NAMES if name not in left_out]


def resumed_schedule(
    wanted: Schedule,
    saved: Mapping[str, Any],
    *,
    override_lr_scheduler: bool = False,
    use_checkpoint_lr_scheduler: bool = False,
    length_flag: str = FLAGS["decay"],
    step_samples: int | None = None,
) -> tuple[Schedule, list[str]]:
    """The schedule to go on with, and a line to print for each of its settings.

    wanted: of the command line. saved: `schedule_to_json` of the checkpoint. Without a switch all must be equal;
    with override_lr_scheduler the command line wins, with use_checkpoint_lr_scheduler the checkpoint. length_flag: by
    which the length was given; step_samples: samples of a step where it was given in steps, to tell both in these.

    Raises ValueError, naming every difference, if they are not equal; if both switches are on; or if a saved setting is
    missing or of a wrong type.
    """
    if override_lr_scheduler and use_checkpoint_lr_scheduler:
        raise ValueError("--override-lr-scheduler contradicts --use-checkpoint-lr-scheduler: give only one of them")
    given = schedule_to_json(wanted)
    if override_lr_scheduler:
        return wanted, [f" > overriding {SPOKEN_NAMES[name]} value to {value}" for name, value in given.items()]
    kept = _schedule_from_json(saved)
    kept_values = schedule_to_json(kept)
    flags = {**FLAGS, "decay": length_flag}
    compared = [name for name in SPOKEN_NAMES if name not in OF_WSD or (name in given and name in kept_values)]
    differences = [
        f"{SPOKEN_NAMES[name]} is {_told(name, getattr(wanted, name), step_samples)} on the command line "
        f"({flags[name]}) and {_told(name, getattr(kept, name), step_samples)} in the checkpoint"
        for name in compared
        if getattr(wanted, name) != getattr(kept, name)
    ]
    if differences and not use_checkpoint_lr_scheduler:
        raise ValueError(
            "; ".join(differences)
            + ". Make them equal, or choose a side with --override-lr-scheduler or --use-checkpoint-lr-scheduler"
        )
    return kept, [f" > using checkpoint value {value} for {SPOKEN_NAMES[name]}" for name, value in kept_values.items()]


def _told(name: str, value: object, step_samples: int | None) -> str:
    """A setting for people: lengths, which are kept in samples, in steps too where they are whole ones."""
    if name not in ("warmup", "decay", "wsd_decay") or not isinstance(value, int | float):
        return str(value)
    if step_samples and value % step_samples == 0:
        return f"{value // step_samples:g} steps ({value:g} samples)"
    return f"{value:g} samples"


def length_flag(config: OptimizerConfig, *, train_iters: int | None) -> str:
    """The flag that says how long a schedule is."""
    if train_iters:
        return "--train-iters" if config.lr_decay_iters is None else "--lr-decay-iters"
    return "--train-samples" if config.lr_decay_samples is None else "--lr-decay-samples"


def _schedule_from_json(saved: Mapping[str, Any]) -> Schedule:
    names = _names_of(saved.get("style"), begins_at_0="init_lr" not in saved)
    for name in names:
        kinds: tuple[type, ...] = (int, float)
        if name in ("style", "wsd_style"):
            kinds = (str,)
        elif name in ("decay", "wsd_decay"):
            kinds = (int,)
        value = saved.get(name)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(
                f"the checkpoint's learning-rate setting {name}={value!r} must be "
                f"{' or '.join(k.__name__ for k in kinds)}: use --override-lr-scheduler to take the command line's"
            )
    return Schedule(**{name: saved[name] for name in names})
