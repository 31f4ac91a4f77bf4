"""Which data sets each part of a run's data is made of: those of --data-path, split, or data sets of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megalith.config import Run, flag_of, known_settings
from megalith.data.split import PARTS

# The settings that give a part data sets of its own, all of whose documents are the part's.
OWN = {"valid": "valid_data_path", "test": "test_data_path"}


@dataclass(frozen=True)
class DataSets:
    """Data sets, and how their documents are parted among some of the run's parts.

    data_path: one prefix, or weights and prefixes in turns. split: shares of train, valid and test. said: what gives
    the documents, as a message names it. own: of which part they all are, if they are one part's. parts: those that are
    made of them.
    """

    setting: str
    data_path: tuple[str, ...]
    split: str
    said: str
    parts: tuple[str, ...]
    own: str | None = None


def data_sets(run: Run) -> Iterator[DataSets]:
    """Those of --data-path first, for training and for all parts that have none of their own."""
    own = own_data_paths(run)
    others = tuple(part for part in PARTS if part not in own)
    yield DataSets("data_path", run.data.data_path or (), split_of(run), f"--split = {run.data.split}", others)
    for part, data_path in own.items():
        shares = ",".join("1" if name == part else "0" for name in PARTS)
        yield DataSets(OWN[part], data_path, shares, flag_of(OWN[part]), (part,), own=part)


def is_blend(data_path: Sequence[str]) -> bool:
    """Whether it is one prefix, or as many weights as prefixes."""
    return len(data_path) == 1 or (len(data_path) > 0 and len(data_path) % 2 == 0)


def own_data_paths(run: Run) -> dict[str, tuple[str, ...]]:
    """By part, the data path that it alone has."""
    given = {part: getattr(run.data, name) for part, name in OWN.items() if known_settings()[name].concerns(run.task)}
    return {part: data_path for part, data_path in given.items() if data_path}


def split_of(run: Run) -> str:
    """How the documents of --data-path are split: a part with data sets of its own takes none of them."""
    split, own = run.data.split, own_data_paths(run)
    if not own:
        return split
    shares = [*split.split("," if "," in split else "/"), "0", "0"][: len(PARTS)]
    return ",".join("0" if part in own else share for part, share in zip(PARTS, shares, strict=True))
