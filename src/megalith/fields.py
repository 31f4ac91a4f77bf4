"""One setting of a run: a dataclass field that also says how it is typed on the command line.

Each part of Megalith declares its settings as a frozen dataclass beside its code; config.py composes them into one flat
namespace. The names are those of the Megatron-LM argument wherever it has the same setting.
"""

from collections.abc import Mapping, Sequence
from dataclasses import Field, field
from typing import Any

METADATA_KEY = "megalith"


def setting(
    default: Any,
    help: str,
    *,
    section: str,
    unit: str = "",
    flag: str = "",
    also: Sequence[str] = (),
    values: Mapping[str, str] | None = None,
    choices: Sequence[str] = (),
    switch: str = "",
    repeat: str = "",
    task: str = "",
    usual: str = "",
) -> Any:
    """A dataclass field with what the command line needs to know about it.

    section: the heading under which --help shows it. unit: what a number counts. flag: its spelling if that is not the
    name with hyphens; also: further spellings; values: flags without a value that say one each. choices: the only
    values allowed. switch: "on" or "off", for a flag without a value that turns the field on or off. repeat: "*" or
    "+", for a list of values. task: the only task that uses it, or several with commas between. usual: in words, what
    is taken where the default, None, stays.
    """
    metadata = {
        "help": help,
        "section": section,
        "unit": unit,
        "flag": flag,
        "also": tuple(also),
        "values": dict(values or {}),
        "choices": tuple(choices),
        "switch": switch,
        "repeat": repeat,
        "task": task,
        "usual": usual,
    }
    return field(default=default, metadata={METADATA_KEY: metadata})


def describe(declared: Field[Any]) -> dict[str, Any]:
    """What `setting` recorded about a dataclass field."""
    described: dict[str, Any] = declared.metadata[METADATA_KEY]
    return described
