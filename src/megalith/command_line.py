"""A parser of command lines whose faults are said like all others."""

import argparse
from typing import NoReturn


class CommandParser(argparse.ArgumentParser):
    """Raises ValueError, with the command that tells more, where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")
