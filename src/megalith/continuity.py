"""Whether a run that goes on from a checkpoint is still the same run: its data, and how samples are made of it.

A checkpoint keeps what tells its data from other data, and the settings on which the samples and their order depend. If
they differ, the run would go on without a word as another one; so it is refused, or on demand goes on and says so.
Settings that may change (learning rate, batch size, length) are told.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megalith.config import Run, compose, known_settings
from megalith.data.blend import parse_data_path
from megalith.data.indexed import find_prefix
from megalith.data.inspect import inspect
from megalith.data.record import same_file
from megalith.data.tokenizer import Tokenizer
from megalith.data_sets import data_sets, split_of
from megalith.derived import dataloader_type
from megalith.fields import describe
from megalith.monitor.events import Warned
from megalith.monitor.log import RunLog
from megalith.ranks import Ranks, RanksError
from megalith.sources import settings_of_toml
from megalith.task import Task

# Settings on which it depends which samples a run sees, in which order, and what is in them.
DECIDE_SAMPLES = (
    "seed split seq_length encoder_seq_length decoder_seq_length retriever_seq_length reset_position_ids "
    "reset_attention_mask eod_mask_loss mask_prob short_seq_prob sample_rate use_one_sent_docs query_in_block_prob "
    "vocab_extra_ids mock_data vocab_size image_augmentation"
).split()
# Settings of which no step depends (the length is told by other lines), those that `identify_data` tells better, and
# those that only say whose schedule holds.
CHANGE_NOTHING = (
    "data_path vocab_file merge_file tokenizer_model tokenizer_type data_cache_path data_impl corpus mmap_warmup "
    "num_workers verify_data max_epochs train_iters train_samples exit_interval exit_duration_in_mins "
    "exit_before_training override_lr_scheduler use_checkpoint_lr_scheduler"
).split()
PARTS = ("model", "data", "optimizer", "train", "evaluate")  # whose settings change what a run computes or says
CONTRASTED = "contrasted"  # among what decides samples: how many pairs a loss compares


def data_of(run: Run, task: Task, tokenizer: Tokenizer | None, vocab_size: int, log: RunLog) -> list[dict[str, Any]]:
    """What tells the run's data from other data. Raises ValueError for data that is not there or not as recorded."""
    if run.data.mock_data:
        return []
    if run.data.verify_data and run.data.data_path and task.has_tokenizer:
        verify_data(run, vocab_size, log)
    return task.identify_data(run, tokenizer, vocab_size=vocab_size, report=log.report)


def verify_data(run: Run, vocab_size: int, log: RunLog) -> None:
    """Read all token files once, shared out among the ranks; ValueError with everything that is wrong with them."""
    ranks = Ranks()

    def share() -> list[Any]:
        prefixes = [prefix for sets in data_sets(run) for prefix in parse_data_path(sets.data_path)[0]]
        own = [inspect(find_prefix(prefix), vocab_size=vocab_size) for prefix in prefixes[ranks.rank :: ranks.size]]
        faults = [fault for found in own for fault in found.faults]
        if faults:
            raise ValueError("\n".join(faults))
        return [[str(found.prefix), found.num_bytes, found.has_record, found.seconds] for found in own]

    try:
        told = [entry for entries in ranks.together(share) for entry in entries]
    except RanksError as failed:
        raise ValueError("\n".join(failure.message for failure in failed.failures)) from failed
    for prefix, num_bytes, has_record, seconds in told:
        compared = "as recorded" if has_record else "sound (no digest was recorded)"
        log.line(f"--verify-data: {prefix}: {num_bytes:,} bytes are {compared}, {seconds:.1f} s")


def decisive(run: Run, *, contrasted: int | None) -> dict[str, Any]:
    """What decides which samples the run sees and what they are compared with: the settings by name.

    contrasted: pairs among which a loss tells the right ones, on all replicas together; None for a task without such.
    """
    known = known_settings()
    concerned = (name for name in DECIDE_SAMPLES if known[name].concerns(run.task))
    values = {name: getattr(getattr(run, known[name].part), name) for name in concerned}
    if "split" in values:
        values["split"] = split_of(run)
    compared = {} if contrasted is None else {CONTRASTED: contrasted}
    return {**values, "dataloader_type": dataloader_type(run), **compared}


def check_same_samples(
    run: Run, data: list[dict[str, Any]], samples: Mapping[str, Any], state: Mapping[str, Any]
) -> None:
    """Raise ValueError if a run would go on from a checkpoint on other samples.

    samples: what is `decisive` now. state: of the checkpoint. Not if --allow-changed-data says that this is meant. What
    a checkpoint does not record (of an older version, or converted) is not compared.
    """
    if (others := _other_samples(data, samples, state)) and not run.checkpoint.allow_changed_data:
        raise ValueError(
            f"the checkpoint of step {state['step']} is of a run on other samples: {'; '.join(others)}. Restore them, "
            "start a new run with --finetune --load, or go on nevertheless with --allow-changed-data"
        )


def tell_differences(
    run: Run, data: list[dict[str, Any]], samples: Mapping[str, Any], state: Mapping[str, Any], notes: Any, log: RunLog
) -> None:
    """Say what differs between a run and the checkpoint that it goes on from.

    samples: what is `decisive` now. state, notes: of the checkpoint.
    """
    for text in _other_samples(data, samples, state):
        log.report(Warned(f"--allow-changed-data: the run goes on although {text}"))
    if changed := _setting_differences(run, notes.get("run")):
        log.line(f"settings that differ from the checkpoint's: {'; '.join(changed)}")


def _other_samples(data: list[dict[str, Any]], samples: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    return [*_data_differences(data, state.get("data")), *_sample_differences(samples, state.get("samples"))]


def _data_differences(data: list[dict[str, Any]], saved: object) -> list[str]:
    if not isinstance(saved, list) or not all(isinstance(entry, dict) for entry in saved):
        return []
    # What a part has of its own is not trained on; another one is told as a setting that differs.
    saved, data = ([entry for entry in entries if "part" not in entry] for entries in (saved, data))
    if len(saved) != len(data):
        return [f"it was trained on {len(saved)} data sets and this run has {len(data)}"]
    differences = []
    for old, new in zip(saved, data, strict=True):
        if not same_file(old, new) or old.get("classes_sha256") != new.get("classes_sha256"):
            said = " ".join(
                f"{name} {str(old.get(name))[:12]}, now {str(new.get(name))[:12]};" for name in _unlike(old, new)
            )
            differences.append(f"the data {old.get('name')} was another than {new['name']} is now ({said[:-1]})")
        elif old.get("weight") != new.get("weight"):
            differences.append(f"the weight of {new['name']} was {old.get('weight')} and is {new.get('weight')}")
    return differences


def _unlike(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [name for name in new if name not in ("name", "weight") and old.get(name) != new[name]]


def _sample_differences(samples: Mapping[str, Any], saved: object) -> list[str]:
    if not isinstance(saved, dict):
        return []
    known = known_settings()
    changed = {name: (saved[name], now) for name, now in samples.items() if name in saved and saved[name] != now}
    pairs = changed.pop(CONTRASTED, None)
    differences = [f"{known[name].flag} was {before} and is {now}" for name, (before, now) in changed.items()]
    if pairs is not None:
        differences.append(
            f"a loss compared {pairs[0]} pairs and would compare {pairs[1]} (--micro-batch-size on all replicas)"
        )
    return differences


def _setting_differences(run: Run, text: object) -> list[str]:
    """Settings that may differ, and do: flag, value now and value in the checkpoint."""
    if not isinstance(text, str):
        return []
    values, faults = settings_of_toml(text, "the checkpoint's settings")
    unread = [f"what cannot be compared ({fault})" for fault in faults]
    if unread and not values:
        return unread
    saved = compose(values.pop("task", run.task), values)
    differences = []
    for part in PARTS:
        ours, theirs = getattr(run, part), getattr(saved, part)
        for name in (declared.name for declared in dataclasses.fields(ours)):
            now, then = getattr(ours, name), getattr(theirs, name)
            if now != then and name not in CHANGE_NOTHING and name not in DECIDE_SAMPLES:
                known = known_settings()[name]
                if describe(known.field)["switch"] == "off":  # the flag says the contrary of the setting
                    now, then = not now, not then
                differences.append(f"{known.flag} is {now} and was {then}")
    return differences + unread
