"""Which layers stand on which pipeline stage.

A rank holds one chunk of consecutive layers, or several with an interleaved schedule: part number c x stages + r is
chunk c of rank r. Layers that divide evenly are divided evenly, as in Megatron-LM; otherwise the slowest part is as
fast as can be, with the embedding and the output layer counted.
"""

from itertools import accumulate, pairwise


def assign_layers(
    num_layers: int, stages: int, chunks: int = 1, *, first_cost: float = 0.0, last_cost: float = 0.0
) -> list[list[range]]:
    """The layers (from 0) of every chunk of every rank: `assigned[rank][chunk]`.

    first_cost and last_cost: what the first and the last part do besides, in units of one layer.
    Raises ValueError if there are fewer layers than parts.
    """
    parts = stages * chunks
    if num_layers < parts:
        raise ValueError(
            f"--num-layers = {num_layers}: is fewer than the {parts} parts of {stages} pipeline stages x {chunks} "
            f"chunks. Use at most {num_layers} parts."
        )
    if num_layers % parts == 0:
        bounds = list(range(0, num_layers + 1, num_layers // parts))
    else:
        bounds = balanced_bounds(num_layers, parts, first_cost=first_cost, last_cost=last_cost)
    ranges = [range(a, b) for a, b in pairwise(bounds)]
    return [[ranges[chunk * stages + rank] for chunk in range(chunks)] for rank in range(stages)]


def balanced_bounds(num_layers: int, parts: int, *, first_cost: float, last_cost: float) -> list[int]:
    """Where each part begins, and the end, such that the largest cost of a part is the least possible.

    Every part has at least one layer. Among equals the earlier parts are the fuller ones.
    """
    if parts == 1:
        return [0, num_layers]
    # The best largest cost is one of these few sums: k layers, with or without what the first and last part add.
    candidates = sorted({k + extra for k in range(1, num_layers + 1) for extra in (0.0, first_cost, last_cost)})
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        if _fill(num_layers, parts, candidates[middle], first_cost, last_cost) is None:
            low = middle + 1
        else:
            high = middle
    counts = _fill(num_layers, parts, candidates[low], first_cost, last_cost)
    assert counts is not None, "one part may hold all layers"
    return [0, *accumulate(counts)]


def _fill(num_layers: int, parts: int, limit: float, first_cost: float, last_cost: float) -> list[int] | None:
    """Layers of each part if no part may cost more than limit (at least one layer each); None if they do not fit."""
    if limit < 1 + first_cost or limit < 1 + last_cost:
        return None
    # The limit is k + cost in floating point, from which taking the cost away may leave a little less than k.
    room = [int(limit - cost + 1e-9) for cost in (first_cost, *[0.0] * (parts - 2), last_cost)]
    if sum(room) < num_layers:
        return None
    counts, left = [], num_layers
    for index, most in enumerate(room):
        after = parts - index - 1
        counts.append(min(most, left - after))
        left -= counts[-1]
    return counts
