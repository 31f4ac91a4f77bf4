"""What the config.json of a model of Hugging Face says, an entry at a time; a fault names the file and the entry."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LONGEST_AT_FIRST = 4096  # tokens of a sequence, unless the command line says otherwise
LARGEST_COUNT = 1 << 28  # of layers, features or places; the sizes of tensors of such shapes can be reckoned with


def count(config: Mapping[str, Any], name: str, where: Path, *, default: int | None = None) -> int:
    """A number from 1 to LARGEST_COUNT in config.json; ValueError, naming it, for anything else.

    default: where it is missing.
    """
    value = config.get(name)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= LARGEST_COUNT:
        raise ValueError(f"{where}: {name} is {value!r:.60}; it must be a number of 1 or more, at most {LARGEST_COUNT}")
    return value


def number(config: Mapping[str, Any], name: str, where: Path, *, default: float) -> float:
    """A number of 0 or more in config.json; ValueError, naming it, for anything else. default: where it is missing."""
    value = config.get(name)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"{where}: {name} is {value!r:.60}; it must be a number of 0 or more")
    return float(value)


def refuse_others(config: Mapping[str, Any], where: Path, fits: Mapping[str, tuple[object, ...]]) -> None:
    """Raise ValueError unless every entry is missing or one of those that fit."""
    for name, values in fits.items():
        if name in config and config[name] not in values:
            known = " and ".join(map(str, values))
            raise ValueError(f"{where}: {name} is {config[name]!r:.60}; {known} can be converted")
