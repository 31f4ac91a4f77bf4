"""Data files that a run names and that are not there, so that they are told with the faults of its settings."""

from collections.abc import Iterator
from pathlib import Path

from megalith.config import Fault, Run, fault, flag_of
from megalith.data.blend import parse_data_path
from megalith.data.indexed import find_prefix
from megalith.data_sets import data_sets, is_blend

# Tasks whose data path names token files.
READ_TOKENS = ("gpt", "bert", "t5", "ict")


def file_faults(run: Run) -> Iterator[Fault]:
    """A fault for each prefix of a data path without its .bin and .idx, and one for a path that is no blend."""
    if run.task not in READ_TOKENS or run.data.mock_data or run.data.corpus is not None:
        return
    for sets in data_sets(run):
        if not is_blend(sets.data_path):
            continue  # a fault of check.py, or not given
        try:
            prefixes, _ = parse_data_path(sets.data_path)
        except ValueError as error:
            yield fault(sets.setting, " ".join(sets.data_path), str(error), "Give WEIGHT PREFIX WEIGHT PREFIX ...")
            continue
        for prefix in prefixes:
            try:
                find_prefix(prefix)
            except ValueError as error:
                yield fault(sets.setting, None, str(error), "Name what megalith preprocess wrote")


def named_file_faults(run: Run) -> Iterator[Fault]:
    """A fault for each file of --train-data and --valid-data that is not there, or if none is named."""
    for name, files in {"train_data": run.data.train_data, "valid_data": run.data.valid_data}.items():
        if not files and (name == "train_data" or run.evaluate.eval_iters > 0):
            remedy = f"Add {flag_of(name)} FILE" + ("" if name == "train_data" else ", or --eval-iters 0")
            yield fault(name, None, "is required and was not given", remedy)
        for file in files or ():
            if not Path(file).is_file():
                yield fault(name, file, "is not a file", "Correct the path")
