"""The table that programs here print of what they measured. Imported by its plain name: they are run as scripts."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    figure: str
    value: float
    unit: str
    conditions: str
    goal: str = ""
    ratio: float | None = None  # above 1: better than the goal, or than what is compared with


def show(rows: Sequence[Row], *, as_json: bool) -> None:
    """Print rows for a person, or as JSON."""
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    print(f"{'figure':34} {'value':>9} {'unit':10} {'ratio':>6}  {'goal':24} conditions")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        print(f"{row.figure:34} {row.value:>9.3f} {row.unit:10} {ratio:>6}  {row.goal:24} {row.conditions}")
