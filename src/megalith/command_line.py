"""A parser of command lines whose faults are said like all others."""

import argparse
import shutil
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NoReturn

from megalith import elsewhere


def as_wide_as_the_terminal(indent: int) -> "partial[argparse.HelpFormatter]":
    """The formatter of a list of flags of 120 characters, or as many as there are; texts begin at indent at most."""
    columns = min(120, shutil.get_terminal_size((120, 0)).columns)
    return partial(argparse.HelpFormatter, max_help_position=min(indent, columns // 3), width=columns)


class CommandParser(argparse.ArgumentParser):
    """Raises ValueError, with the command that tells more, where argparse would print its usage and exit."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's, but a flag that is not known is told with the one that is nearest, if any is near."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
            raise ValueError(f"unrecognized arguments: {' '.join(unknown)}{self._meant(word)}")
        return options

    def _meant(self, word: str) -> str:
        """A remedy for an unknown flag: what other programs call by that name, or the nearest one."""
        own = list(self._option_string_actions)
        names = elsewhere.flags_of_commands(own) | {elsewhere.plain(flag): flag for flag in own}
        takes_run = any(action.dest == "run" and not action.option_strings for action in self._actions)
        runs = elsewhere.RUN_ELSEWHERE - names.keys() if takes_run else set[str]()
        found = elsewhere.meant(word, names, dict.fromkeys(runs, "Name the run's directory without a flag."))
        return f"; see {self.prog} --help" if found is None else f". {found[0].upper()}{found[1:]}"

    def given(self, options: argparse.Namespace, names: Collection[str]) -> list[str]:
        """The flags of these settings that were given, in their order; one that says what holds anyway is not."""
        actions = (action for action in self._actions if action.dest in names)
        return [action.option_strings[0] for action in actions if getattr(options, action.dest) != action.default]

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")
