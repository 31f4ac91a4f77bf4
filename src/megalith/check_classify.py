"""What is checked for classification alone: the files of pairs and the encoder that is fine-tuned."""

from collections.abc import Iterator
from pathlib import Path

from megalith.check_bert import encoder_faults
from megalith.config import Fault, Run, fault, flag_of
from megalith.data.pair_files import LAYOUTS, SPECIAL_TOKENS

SHORTEST = SPECIAL_TOKENS + 2  # tokens of a sample: each sentence has one


def classify_faults(run: Run) -> Iterator[Fault]:
    """Every fault of a classification's settings."""
    yield from encoder_faults(run)
    data = run.data
    if data.pairs_format not in LAYOUTS:
        yield fault("pairs_format", None, "is required and was not given", f"Give {' or '.join(LAYOUTS)}")
    for name, files in {"train_data": data.train_data, "valid_data": data.valid_data}.items():
        if not files and (name == "train_data" or run.evaluate.eval_iters > 0):
            remedy = f"Add {flag_of(name)} FILE" + ("" if name == "train_data" else ", or --eval-iters 0")
            yield fault(name, None, "is required and was not given", remedy)
        for file in files or ():
            if not Path(file).is_file():
                yield fault(name, file, "is not a file", "Correct the path")
    length = data.seq_length if data.seq_length is not None else data.encoder_seq_length
    if length is not None and 0 < length < SHORTEST:
        rule = f"is too short for classify, whose samples need {SHORTEST}"
        yield fault("seq_length", length, rule, "Lengthen it")
