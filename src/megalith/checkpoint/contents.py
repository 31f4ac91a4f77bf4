"""What the checkpoint of every run says of it beside its tensors.

A digest shows that an index is as it was written, not who wrote it: what made it may have been another program.
"""

from collections.abc import Callable, Mapping
from typing import Any

from megalith.checkpoint.index import Index, is_count
from megalith.checkpoint.shards import DamagedError


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_number_or_none(value: object) -> bool:
    return value is None or _is_number(value)


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_object_or_none(value: object) -> bool:
    return value is None or isinstance(value, dict)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _holds_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


# What checkpoints of earlier versions do not all have is looked at where it is taken over.
_KINDS: Mapping[str, Callable[[object], bool]] = {
    "state.step": is_count,
    "state.consumed_train_samples": is_count,
    "state.consumed_valid_samples": is_count,
    "state.schedule_samples": is_count,
    "state.skipped_steps": is_count,
    "state.num_updates": is_count,
    "state.loss_scale": _is_object_or_none,
    "state.schedule": _is_object,
    "state.model": _is_object,
    "state.model.padded_vocab_size": is_count,
    "notes.megalith": _is_text,
    "notes.ledger": _is_object,
    "notes.ledger.spent": _holds_numbers,
    "notes.ledger.saved": is_count,
    "notes.ledger.booted": is_count,
    "notes.interval": _is_object,
    "notes.interval.sums": _holds_numbers,
    "notes.interval.taken": is_count,
    "notes.interval.skipped": is_count,
    "notes.interval.nan": is_count,
    "notes.interval.num_tokens": is_count,
    "notes.interval.seconds": _is_number,
    "notes.interval.step_seconds": _is_number,
    "notes.interval.model_flops": _is_number_or_none,
}


def check_contents(index: Index) -> None:
    """Raise DamagedError where state or notes lack what a run goes on from, or have another kind of value there."""
    whole = {"state": index.state, "notes": index.notes}
    if wrong := [name for name, is_right in _KINDS.items() if not is_right(_entry(whole, name))]:
        raise DamagedError(f"it is no checkpoint of a run: {', '.join(wrong)} are missing or of the wrong kind")


def _entry(whole: Any, name: str) -> object:
    """The value at a dotted name; Ellipsis, which is no value of JSON, if there is none."""
    for part in name.split("."):
        whole = whole.get(part, ...) if isinstance(whole, dict) else ...
    return whole
