"""What is checked for classification alone: the files of pairs and the encoder that is fine-tuned."""

from collections.abc import Iterator

from megalith.check_bert import encoder_faults
from megalith.check_files import named_file_faults
from megalith.config import Fault, Run, fault
from megalith.data.pair_files import LAYOUTS, SPECIAL_TOKENS
from megalith.derived import given_length

SHORTEST = SPECIAL_TOKENS + 2  # tokens of a sample: each sentence has one


def classify_faults(run: Run) -> Iterator[Fault]:
    """Every fault of a classification's settings."""
    yield from encoder_faults(run)
    data = run.data
    if data.pairs_format not in LAYOUTS:
        yield fault("pairs_format", None, "is required and was not given", f"Give {' or '.join(LAYOUTS)}")
    yield from named_file_faults(run)
    name, length = given_length(run)
    if length is not None and 0 < length < SHORTEST:
        rule = f"is too short for classify, whose samples need {SHORTEST}"
        yield fault(name, length, rule, "Lengthen it")
