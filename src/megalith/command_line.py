"""A parser of command lines whose faults are said like all others."""

import argparse
import difflib
from collections.abc import Collection, Sequence
from typing import Any, NoReturn


class CommandParser(argparse.ArgumentParser):
    """Raises ValueError, with the command that tells more, where argparse would print its usage and exit."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's, but a flag that is not known is told with the one that is nearest, if any is near."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
            near = difflib.get_close_matches(word, self._option_string_actions, n=1)
            meant = f". Did you mean {near[0]}?" if near else f"; see {self.prog} --help"
            raise ValueError(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return options

    def given(self, options: argparse.Namespace, names: Collection[str]) -> list[str]:
        """The flags of these settings that were given, in their order; one that says what holds anyway is not."""
        actions = (action for action in self._actions if action.dest in names)
        return [action.option_strings[0] for action in actions if getattr(options, action.dest) != action.default]

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")
