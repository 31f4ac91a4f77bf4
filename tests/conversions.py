"""The command that makes a run directory of a model of Hugging Face, as tests give it."""

from pathlib import Path

from megalith.cli import main


def from_hugging_face(folder: Path) -> int:
    """Make folder/run of folder/theirs; the exit status."""
    return main(["convert", "--from", "huggingface", str(folder / "theirs"), "--to", str(folder / "run")])
