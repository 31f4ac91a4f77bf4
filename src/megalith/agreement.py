"""What all ranks must have alike, compared before anything is built of it: versions, settings, data.

Each node has a command line and files of its own. Ranks that differ in them would train side by side, each a model of
its own, or wait for each other without end. So they compare a digest in one small reduction; only if that differs do
they say what they have.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch

from megalith import __version__
from megalith.config import ConfigError, Run, known_settings
from megalith.data.tokenizer import Tokenizer
from megalith.fields import describe
from megalith.monitor.peers import this_host
from megalith.ranks import Ranks
from megalith.terminal import say

# Settings of a node alone, of which no step depends; and files that may lie elsewhere on each, whose contents are
# compared: `require_same_data` and `try_save_directory`.
MAY_DIFFER = (
    "local_rank nproc max_restarts stop_grace join_timeout num_workers data_impl mmap_warmup data_cache_path "
    "tensorboard_dir profile_dir log_format "
    "save data_path valid_data_path test_data_path titles_data_path vocab_file merge_file tokenizer_model train_data"
).split()
ABSENT = "not given"
MOST_DIFFERENCES = 5  # that are named
MOST_NAMED = 4  # runs of ranks, and hosts
LONGEST_VALUE = 200  # characters


def require_same_settings(run: Run) -> None:
    """Find out whether all ranks have the same Megalith, torch and settings; every rank calls it.

    If not, rank 0 names each difference with ranks and hosts, and ConfigError is raised on all, which says no more.
    """
    versions = {"the version of megalith": __version__, "the version of torch": str(torch.__version__)}
    require_same(versions, "all ranks must have the same version. Install it on every node.")
    require_same(_settings(run), "all ranks must be given the same settings. Give every node the same command.")


def require_same_data(data: Iterable[Mapping[str, Any]], tokenizer: Tokenizer | None) -> None:
    """As `require_same_settings`, for what tells the data from other data, wherever it lies, and the tokenizer."""
    values = {} if tokenizer is None else {"the tokenizer": f"one with digest {tokenizer.digest[:12]}"}
    for number, entry in enumerate(data, 1):
        told = [f"{name} {_short(value)}" for name, value in entry.items() if name != "name"]
        values[f"data set {number}"] = ", ".join(told)
    require_same(values, "all ranks must read the same data. Copy it to every node anew, or share it.")


def require_same(values: Mapping[str, str], rule: str) -> None:
    """Raise ConfigError on all ranks unless all have the same values by name; rank 0 says what differs, and the rule.

    Every rank calls it.
    """
    ranks = Ranks()
    if ranks.is_same(json.dumps(values, sort_keys=True)):
        return
    first: dict[str, str] = ranks.from_first(values)
    names = [*first, *(name for name in values if name not in first)]
    own = {name: values.get(name, ABSENT) for name in names if values.get(name) != first.get(name)}
    said: list[tuple[str, dict[str, str]]] = ranks.gather([host_name(), own])
    refuse(ranks, f"{_differences(first, said)}: {rule}")


def refuse(ranks: Ranks, text: str) -> NoReturn:
    """End the start on all ranks with ConfigError, once rank 0 has said why: a launcher kills it when another ends."""
    if ranks.rank == 0:
        say(text)
    ranks.from_first(None)
    raise ConfigError(())


def named_ranks(numbers: Sequence[int], hosts: Sequence[str]) -> str:
    """Rank 1 (host b); ranks 8 to 15, 24 to 31 (hosts b, d). hosts: of all ranks, in order."""
    spans = [str(first) if first == last else f"{first} to {last}" for first, last in stretches(numbers)]
    own = list(dict.fromkeys(hosts[number] for number in numbers))
    ranks, places = ("s" if len(found) > 1 else "" for found in (numbers, own))
    return f"rank{ranks} {_listed(spans)} (host{places} {_listed(own)})"


def stretches(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each stretch of sorted numbers in which one follows the other."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def host_name() -> str:
    """The name of this machine."""
    return this_host().split()[0]


def _settings(run: Run) -> dict[str, str]:
    """What ranks must be given alike: a text for each flag."""
    values = {"the task": run.task}
    for name, known in known_settings().items():
        if name in MAY_DIFFER:
            continue
        value, switch = getattr(getattr(run, known.part), name), describe(known.field)["switch"]
        if switch:
            values[known.flag] = "given" if value is (switch == "on") else ABSENT
        elif value is None or value == ():
            values[known.flag] = ABSENT
        else:
            values[known.flag] = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    values["--save"] = ABSENT if run.checkpoint.save is None else "a directory"
    if run.checkpoint.loads_own:
        values["--load"] = "that of --save"
    return values


def _differences(first: Mapping[str, str], said: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """Each name with its values, and the ranks that have them. first: of rank 0; said: hosts and what differs there."""
    hosts = [host for host, _ in said]
    names = list(dict.fromkeys(name for _, own in said for name in own))
    told = []
    for name in names[:MOST_DIFFERENCES]:
        having: dict[str, list[int]] = {}
        for rank, (_, own) in enumerate(said):
            having.setdefault(own.get(name, first.get(name, ABSENT)), []).append(rank)
        kinds = [
            f"{_short(value, LONGEST_VALUE)} on {named_ranks(numbers, hosts)}" for value, numbers in having.items()
        ]
        told.append(f"{name} = {' and '.join(kinds[:MOST_NAMED])}" + _more(kinds))
    return "; ".join(told) + _more(names, MOST_DIFFERENCES)


def _short(value: object, longest: int = 12) -> str:
    text = str(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def _listed(found: Sequence[str]) -> str:
    return ", ".join(found[:MOST_NAMED]) + _more(found)


def _more(found: Sequence[object], shown: int = MOST_NAMED) -> str:
    return f" and {len(found) - shown} more" if len(found) > shown else ""
