"""`megalith preprocess`: the command line of data/prepare.py, with a flag for each field of its settings."""

import argparse
import dataclasses
import sys
import typing
from collections.abc import Sequence
from typing import Any

from megalith.command_line import CommandParser, as_wide_as_the_terminal
from megalith.data.prepare import PrepareConfig, prepare
from megalith.fields import describe
from megalith.terminal import printable


def main(words: Sequence[str]) -> int:
    """Run `megalith preprocess WORDS`; return the exit status. ValueError for what a user can correct."""
    values = vars(_parser().parse_args(words))
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    try:
        report = prepare(PrepareConfig(**given))
    except ChildProcessError as error:
        print(f"megalith: {printable(str(error))}", file=sys.stderr)
        return 1
    for line in report.lines():
        print(printable(line))
    return 0


def _parser() -> argparse.ArgumentParser:
    """The parser of the flags that PrepareConfig declares."""
    parser = CommandParser(
        prog="megalith preprocess",
        usage="%(prog)s --input FILE ... --output-prefix PREFIX --tokenizer-type TYPE [--flags ...]",
        description="Turn text into token files for training: PREFIX_KEY_document.bin and .idx for each key.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=as_wide_as_the_terminal(36),
    )
    groups: dict[str, Any] = {}
    for declared in dataclasses.fields(PrepareConfig):
        described = describe(declared)
        section = described["section"]
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        group, flag = groups[section], "--" + declared.name.replace("_", "-")
        if described["switch"]:
            group.add_argument(flag, dest=declared.name, action="store_true", help=described["help"])
            continue
        default = " ".join(declared.default) if isinstance(declared.default, tuple) else declared.default
        shown = [described["unit"], f"default {default}" if default else ""]
        note = "; ".join(part for part in shown if part)
        whole = typing.get_type_hints(PrepareConfig)[declared.name] in (int, int | None)
        group.add_argument(
            flag,
            dest=declared.name,
            type=int if whole else str,
            choices=described["choices"] or None,
            nargs=described["repeat"] or None,
            metavar="|".join(described["choices"]) or ("N" if whole else "TEXT"),
            help=described["help"] + (f" [{note}]" if note else ""),
        )
    return parser
