"""Which documents are for training, validation and test, by Megatron-LM's rule."""

import math
from collections.abc import Iterable

PARTS = ("train", "valid", "test")


def parse_split(split: str) -> tuple[float, float, float]:
    """The three shares, adding up to 1, that a text like "969, 30, 1" or "90/5/5" or "100" gives.

    Numbers are separated by commas or, if there are none, by slashes; missing ones are 0, those after the third are
    ignored. Raises ValueError if one is no number or below 0, or all are 0.
    """
    separator = "," if "," in split else "/"
    try:
        numbers = [float(text) for text in split.split(separator)][:3]
    except ValueError as error:
        raise ValueError(f"must be up to three numbers with commas between them ({error})") from error
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise ValueError("has a share that is no number of 0 or more")
    total = sum_in_order(numbers)
    if not 0 < total < math.inf:
        raise ValueError("has shares that do not add up to more than 0")
    train, valid, test = [number / total for number in [*numbers, 0.0, 0.0][:3]]
    return train, valid, test


def sum_in_order(numbers: Iterable[float]) -> float:
    """The sum that every Python gives: from 3.12 on sum() rounds less, which would move bounds and change orders."""
    total = 0.0
    for number in numbers:
        total += number
    return total


def split_documents(split: str, num_documents: int) -> dict[str, range]:
    """The documents of each of PARTS, consecutive, in this order; a part may be empty.

    Each share is rounded (half to even), and the rounding error of all three lands in the training part. Where that
    would take more than the training part has (shares 0, 1, 1 of 3 documents), the rest is taken from the next part,
    not from before the first document as in Megatron-LM.
    """
    bounds = [0]
    for share in parse_split(split):
        bounds.append(bounds[-1] + round(share * float(num_documents)))
    excess = bounds[-1] - num_documents
    train, valid, test = (max(0, bound - excess) for bound in bounds[1:])
    return {"train": range(0, train), "valid": range(train, valid), "test": range(valid, test)}
