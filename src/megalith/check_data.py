"""What is checked of the data that a run reads and of its tokenizer; no file is opened."""

import os
from collections.abc import Iterator

from megalith.config import Fault, Run, fault, flag_of
from megalith.data.split import parse_split
from megalith.data.tokenizer import KINDS
from megalith.data_sets import OWN, is_blend, own_data_paths, split_of
from megalith.derived import tokenizer_type


def data_faults(run: Run) -> Iterator[Fault]:
    """Every fault of what a run reads, how it is split, and of its tokenizer."""
    data = run.data
    if data.vocab_size is not None and not data.mock_data:
        remedy = "Leave it out: the tokenizer says how many ids there are"
        yield fault("vocab_size", data.vocab_size, "is for --mock-data alone", remedy)
    if data.mock_data:
        for name in ("data_path", "corpus", *OWN.values()):
            if getattr(data, name):
                yield fault(name, getattr(data, name), "contradicts --mock-data", "Leave one out")
        return
    if data.corpus is not None:
        for name in ("data_path", *OWN.values(), "vocab_file", "merge_file", "tokenizer_model", "tokenizer_type"):
            if getattr(data, name):
                yield fault(name, getattr(data, name), "contradicts --corpus, which brings its own", "Leave one out")
        if run.checkpoint.save is None:
            yield fault("corpus", data.corpus, "needs --save, where its text and tokenizer are kept", "Add --save DIR")
        return
    if run.task in ("classify", "retriever"):
        pass  # its files are checked with their format
    elif not data.data_path:
        given = "FOLDER, or --corpus shapes" if run.task == "vit" else "PREFIX, or --corpus python"
        yield fault("data_path", None, "is required and was not given", f"Add --data-path {given}")
    if run.task != "vit":
        for name in ("data_path", *OWN.values()):
            if (words := getattr(data, name)) and not is_blend(words):
                remedy = "Give one prefix, or WEIGHT PREFIX WEIGHT PREFIX ..."
                yield fault(name, " ".join(words), f"has {len(words)} words", remedy)
        try:
            parse_split(data.split)
        except ValueError as error:
            yield fault("split", data.split, str(error), "Give shares such as 969,30,1")
        else:
            yield from _split_beside_own(run)
        yield from _tokenizer(run)


def _split_beside_own(run: Run) -> Iterator[Fault]:
    try:
        parse_split(split_of(run))
    except ValueError:
        others = " and ".join(flag_of(OWN[part]) for part in own_data_paths(run))
        rule = f"leaves nothing of --data-path for training beside {others}"
        yield fault("split", run.data.split, rule, "Give the first share more")


def _tokenizer(run: Run) -> Iterator[Fault]:
    data, kind = run.data, tokenizer_type(run)
    if kind not in KINDS:
        yield fault("tokenizer_type", kind, f"must be one of {', '.join(KINDS)}", "Change it")
    for name in KINDS.get(kind, {}).values():
        path = getattr(data, name)
        if path is None:
            yield fault(name, None, f"is required by {kind} and was not given", f"Add {flag_of(name)} FILE")
        elif not os.path.isfile(path):
            yield fault(name, path, "is not a file", "Correct the path")
