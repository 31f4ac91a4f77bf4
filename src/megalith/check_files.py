"""Data files that a run names and that are not there, so that they are told with the faults of its settings."""

from collections.abc import Iterator
from pathlib import Path

from megalith.config import Fault, Run, fault, flag_of
from megalith.data.blend import parse_data_path
from megalith.data.indexed import find_prefix

# Tasks whose data path names token files.
READ_TOKENS = ("gpt", "bert", "t5", "ict")


def file_faults(run: Run) -> Iterator[Fault]:
    """A fault for each prefix of the data path without its .bin and .idx, and one for a path that is no blend."""
    data = run.data
    if run.task not in READ_TOKENS or data.mock_data or data.corpus is not None or not data.data_path:
        return
    if len(data.data_path) > 1 and len(data.data_path) % 2:
        return  # a fault of check.py
    try:
        prefixes, _ = parse_data_path(data.data_path)
    except ValueError as error:
        yield fault("data_path", " ".join(data.data_path), str(error), "Give WEIGHT PREFIX WEIGHT PREFIX ...")
        return
    for prefix in prefixes:
        try:
            find_prefix(prefix)
        except ValueError as error:
            yield fault("data_path", None, str(error), "Name what megalith preprocess wrote")


def named_file_faults(run: Run) -> Iterator[Fault]:
    """A fault for each file of --train-data and --valid-data that is not there, or if none is named."""
    for name, files in {"train_data": run.data.train_data, "valid_data": run.data.valid_data}.items():
        if not files and (name == "train_data" or run.evaluate.eval_iters > 0):
            remedy = f"Add {flag_of(name)} FILE" + ("" if name == "train_data" else ", or --eval-iters 0")
            yield fault(name, None, "is required and was not given", remedy)
        for file in files or ():
            if not Path(file).is_file():
                yield fault(name, file, "is not a file", "Correct the path")
