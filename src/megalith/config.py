"""The whole configuration of a run: every part's settings in one flat namespace.

Where they come from is `sources.py`; whether they fit together, `check.py`. Values are never written back: what follows
from other values (`derived.py`) is computed where it is needed, so a run file always holds just what was asked for.
"""

import dataclasses
import difflib
import itertools
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field
from functools import cache
from typing import Any

from megalith import elsewhere
from megalith.checkpoint.settings import CheckpointConfig
from megalith.data.settings import DataConfig
from megalith.evaluate.settings import EvaluateConfig
from megalith.fields import describe, setting
from megalith.models.settings import ModelConfig
from megalith.monitor.settings import MonitorConfig
from megalith.optim.settings import OptimizerConfig
from megalith.parallel.settings import ParallelConfig
from megalith.terminal import why_no_text

TASKS = ("gpt", "bert", "t5", "ict", "vit", "classify", "retriever")
BIENCODERS = ("ict", "retriever")  # tasks of which a model embeds texts

# Flags that Megatron-LM itself removed, with what took their place.
REMOVED = {
    "--batch-size": "--micro-batch-size",
    "--warmup": "--lr-warmup-fraction",
    "--model-parallel-size": "--tensor-model-parallel-size",
}


@dataclass(frozen=True)
class TrainConfig:
    """How long the run is and what its randomness starts from."""

    train_iters: int | None = setting(None, "length of the training", section="training", unit="steps")
    train_samples: int | None = setting(
        None, "length of the training, in samples", section="training", unit="sequences"
    )
    exit_interval: int | None = setting(
        None, "stop, after saving, at the first multiple of this many steps", section="training", unit="steps"
    )
    exit_duration_in_mins: int | None = setting(
        None, "stop, after saving, once this much wall time has passed", section="training", unit="minutes"
    )
    exit_before_training: bool = setting(
        False,
        "build and check everything but take no step; weights stay on the meta device",
        section="training",
        switch="on",
    )
    seed: int = setting(1234, "seed of everything random", section="initialization")


@dataclass(frozen=True)
class Run:
    """One run, whole: the task and every part's settings."""

    task: str = "gpt"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Fault:
    """One thing that a user has to change before the run can start."""

    setting: str  # a flag, or a key of a run file
    value: object
    rule: str
    remedy: str

    def __str__(self) -> str:
        value = " ".join(map(str, self.value)) if isinstance(self.value, tuple) else self.value
        shown = "" if value is None else f" = {value}"
        remedy = self.remedy if self.remedy.endswith("?") else f"{self.remedy}."
        return f"{self.setting}{shown}: {self.rule}. {remedy[0].upper()}{remedy[1:]}"


class ConfigError(ValueError):
    """All faults of a configuration at once."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(str(fault) for fault in faults))


@dataclass(frozen=True)
class Known:
    """A setting that exists: its part (an attribute of Run), its field and the type of its values."""

    part: str
    field: Field[Any]
    type: Any

    @property
    def flag(self) -> str:
        return str(describe(self.field)["flag"]) or "--" + self.field.name.replace("_", "-")

    @property
    def flags(self) -> list[str]:
        """All that speak of it."""
        described = describe(self.field)
        return [self.flag, *described["also"], *described["values"]]

    def concerns(self, task: str) -> bool:
        """Whether a task uses the setting."""
        tasks = describe(self.field)["task"]
        return not tasks or task in tasks.split(", ")


@cache
def known_settings() -> Mapping[str, Known]:
    """Every setting by its name, read-only. The names of all parts together are unique."""
    known: dict[str, Known] = {}
    for part in dataclasses.fields(Run):
        if part.name == "task":
            continue
        config = typing.get_type_hints(Run)[part.name]
        hints = typing.get_type_hints(config)
        for declared in dataclasses.fields(config):
            assert declared.name not in known, f"two parts declare {declared.name}"
            known[declared.name] = Known(part.name, declared, hints[declared.name])
    return types.MappingProxyType(known)


def flag_of(name: str) -> str:
    """The command line's spelling of a setting."""
    return known_settings()[name].flag


def fault(name: str, value: object, rule: str, remedy: str) -> Fault:
    """A fault of a setting, named by its flag."""
    return Fault(flag_of(name), value, rule, remedy)


def nearest(name: str, among: Iterable[str]) -> str:
    """A remedy for a name that is none of those that were listed: the nearest one, if any is near."""
    known = {word.lower(): word for word in among}
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return f"did you mean {known[close[0]]}?" if close else "give one of them"


def meant(name: str, spellings: Iterable[str]) -> str:
    """A remedy for an unknown setting: what it is called here, by other programs' name for it or by the nearest one.

    spellings: all that settings are called where the name was met, flags or keys of a run file.
    """
    is_flag = name.startswith("-")
    names = {
        other: flag_of(setting) if is_flag else setting for other, setting in elsewhere.names_elsewhere().items()
    } | {elsewhere.plain(spelling): spelling for spelling in spellings}
    return elsewhere.meant(name, names, elsewhere.remedies()) or "see megalith pretrain --help for all of them"


def convert(name: str, known: Known, value: object, *, is_typed: bool = False) -> tuple[Any, Fault | None]:
    """A value of the setting's type from what a command line (text) or a run file (TOML) holds.

    is_typed: the value has its type already, as in TOML, so that text is neither a number nor true or false.
    """
    described = describe(known.field)
    optional = isinstance(known.type, types.UnionType)
    kind = next(t for t in typing.get_args(known.type) if t is not type(None)) if optional else known.type
    if value is None:
        return None, None if optional else Fault(known.flag, None, "needs a value", "Give one, or leave it out")
    try:
        converted = _converted(kind, value, is_typed)
    except (TypeError, ValueError, OverflowError):
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        lists = {int: "whole numbers", str: "a list of texts or numbers"}
        wanted = lists[typing.get_args(kind)[0]] if typing.get_origin(kind) is tuple else words[kind]
        remedies = {int: "write its digits alone, as in 64000", float: "write it as in 0.0001 or 1e-4"}
        return None, Fault(known.flag, value, f"must be {wanted}", remedies.get(kind, "change the value"))
    texts = converted if isinstance(converted, tuple) else (converted,)
    if unfit := next((why for text in texts if isinstance(text, str) and (why := why_no_text(text))), None):
        return None, Fault(known.flag, converted, *unfit)
    choices = described["choices"]
    if choices and converted not in choices:
        return None, Fault(known.flag, value, f"must be one of {', '.join(choices)}", nearest(str(value), choices))
    return converted, None


def _converted(kind: Any, value: object, is_typed: bool) -> Any:
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return tuple(
            _converted(item, part, is_typed) for part in (value if isinstance(value, list | tuple) else [value])
        )
    if kind is bool:
        if isinstance(value, bool):
            return value
        # Megatron-LM reads such an argument as true whatever stands there.
        if isinstance(value, str) and not is_typed:
            return True
        raise TypeError(value)
    if is_typed and isinstance(value, str) and kind is not str:
        raise TypeError(value)
    if kind is int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise TypeError(value)
        return int(value)  # type: ignore[call-overload]
    if kind is float:
        if isinstance(value, bool):
            raise TypeError(value)
        return float(value)  # type: ignore[arg-type]
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise TypeError(value)
    return str(value)


# As in Megatron-LM, which asks of them only whether they are true.
OFF_AT_ZERO = ("loss_scale", "exit_interval", "exit_duration_in_mins")


# One of each says what the other would say otherwise: check.py refuses both at once.
RIVALS = (
    ("train_iters", "train_samples"),
    ("lr_decay_iters", "lr_decay_samples"),
    ("lr_wsd_decay_iters", "lr_wsd_decay_samples"),
    ("lr_warmup_fraction", "lr_warmup_iters", "lr_warmup_samples"),
    ("override_lr_scheduler", "use_checkpoint_lr_scheduler"),
    ("seq_length", "encoder_seq_length"),
    ("fp16", "bf16"),
    ("data_path", "corpus", "mock_data"),
    ("load", "bert_load"),
    ("norm_after_residual", "apply_residual_connection_post_layernorm"),
    ("swiglu", "activation_function"),
)

# What else has no place beside a setting, or beside a value of it: a corpus brings its own, only made-up tokens have a
# number of ids, and to recompute all is more than to recompute the attention core.
DISPLACED: dict[str | tuple[str, object], tuple[str, ...]] = {
    "data_path": ("vocab_size",),
    "corpus": (
        *("vocab_size", "vocab_file", "merge_file", "tokenizer_model", "tokenizer_type"),
        *("titles_data_path", "valid_data_path", "test_data_path"),
    ),
    "mock_data": ("titles_data_path", "valid_data_path", "test_data_path"),
    "checkpoint_activations": ("recompute_granularity",),
    ("recompute_granularity", "selective"): ("checkpoint_activations",),
}


def overlay(sources: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The values of several sources, of which later ones win: over the same setting and over its rivals before them.

    Rivals within one source both stay, to be refused. One that is turned off displaces nothing.
    """
    merged: dict[str, Any] = {}
    for values in sources:
        for name, value in values.items():
            if value is None or value is False:
                continue
            groups = [*(group for group in RIVALS if name in group), DISPLACED.get(name, ())]
            for rival in itertools.chain(*groups, DISPLACED.get((name, value), ())):
                merged.pop(rival, None)
        merged |= values
    return merged


def compose(task: str, values: Mapping[str, Any]) -> Run:
    """A run from converted values by setting name; what is not named keeps its default."""
    known = known_settings()
    by_part: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        is_off = name in OFF_AT_ZERO and not isinstance(value, bool) and value == 0
        by_part.setdefault(known[name].part, {})[name] = None if is_off else value
    parts = {part.name: part for part in dataclasses.fields(Run)}
    hints = typing.get_type_hints(Run)
    return Run(task=task, **{name: hints[name](**by_part.get(name, {})) for name in parts if name != "task"})
