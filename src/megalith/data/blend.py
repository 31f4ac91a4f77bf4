"""Several data sets drawn from in proportion to weights, in Megatron-LM's order, bit for bit.

The rule is greedy: the next sample comes from the data set that is furthest behind its share. Every choice depends on
all before it, which would be a loop over samples. But the rule forgets: begun anywhere with counts near the shares, it
soon runs as if begun at the start. So the order is computed in many segments side by side, each from a guess some
samples earlier; where a segment does not begin with the counts with which the one before it ends, it is walked again.
The result is that of the loop, whatever the guesses were worth.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.data.causal import SampleRows
from megalith.data.split import sum_in_order

MARGIN = 1.005  # each data set is asked for so much more than its share
MOST_DATASETS = 65535
# Segments computed side by side: many, as each step has a fixed cost, but few enough for the processor's cache.
CACHED_NUMBERS, FEWEST_SEGMENTS, MOST_SEGMENTS = 65536, 64, 8192
SHORTEST_WARM_UP = 1024  # samples before a segment
BLOCK = 1 << 20  # samples counted at once


@dataclass(frozen=True)
class Blend:
    """For each position of a blend, the data set to draw from and which of its samples."""

    datasets: NDArray[Any]  # uint8, or uint16 for more than 254 data sets
    samples: NDArray[np.int64]
    taken: NDArray[np.int64]  # samples of each data set in all

    def __len__(self) -> int:
        return len(self.datasets)


def parse_data_path(data_path: Sequence[str]) -> tuple[list[str], list[float]]:
    """Prefixes and their weights, adding up to 1, from one prefix or from weight prefix weight prefix ...

    Raises ValueError if they do not come in pairs, a weight is no number of 0 or more, or all are 0.
    """
    if len(data_path) == 1:
        return [data_path[0].strip()], [1.0]
    if not data_path or len(data_path) % 2:
        raise ValueError(f"data_path={list(data_path)} must be one prefix, or weight prefix weight prefix ...")
    prefixes = [text.strip() for text in data_path[1::2]]
    weights = []
    for text in data_path[0::2]:
        try:
            weights.append(float(text))
        except ValueError as error:
            raise ValueError(f"{text!r} stands where a weight must be: weight prefix ...") from error
    return prefixes, normalize(weights)


def normalize(weights: Sequence[float]) -> list[float]:
    """The weights, divided by their sum."""
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights) > 0:
        raise ValueError(f"weights={list(weights)} must be numbers of 0 or more, not all 0")
    total = sum_in_order(weights)
    return [weight / total for weight in weights]


def samples_of_each(weights: Sequence[float], num_samples: int) -> list[int]:
    """How many samples to ask each data set for, so that num_samples can be drawn by these weights."""
    return [math.ceil(num_samples * weight * MARGIN) for weight in weights]


def blend_order(weights: Sequence[float], size: int) -> Blend:
    """The first size positions of a blend with these weights (adding up to 1).

    At position k the data set with the largest weight * max(k, 1) - (samples taken from it) is drawn from, the first
    one on a tie; its next sample is the one after those taken.
    """
    if not 0 < len(weights) <= MOST_DATASETS:
        raise ValueError(f"a blend of {len(weights)} data sets: there must be 1 to {MOST_DATASETS}")
    datasets = _choose(np.asarray(weights, np.float64), size)
    return Blend(datasets, *_count_earlier(datasets, len(weights)))


def _choose(weights_D: NDArray[np.float64], size: int) -> NDArray[Any]:
    """The data set of each position. Shape letters: D data sets, G segments, P positions of a segment."""
    num_datasets = len(weights_D)
    num_segments = min(max(CACHED_NUMBERS // num_datasets, FEWEST_SEGMENTS), MOST_SEGMENTS)
    length = max(SHORTEST_WARM_UP, -(-size // num_segments))
    warm_up = max(SHORTEST_WARM_UP, length // 8)
    starts_G = np.arange(0, max(size, 1), length)
    counts_GD = _guess(weights_D, np.maximum(starts_G - warm_up, 0))
    _advance(weights_D, counts_GD, starts_G - warm_up, warm_up)
    counts_GD[0] = 0
    begins_GD = counts_GD.copy()
    chosen_PG = np.empty((length, len(starts_G)), np.uint8 if num_datasets <= 254 else np.uint16)
    _advance(weights_D, counts_GD, starts_G, length, chosen_PG)
    datasets = chosen_PG.T.reshape(-1)[:size]
    for number in range(1, len(starts_G)):
        ends_D = counts_GD[number - 1]
        if not np.array_equal(ends_D, begins_GD[number]):
            part = datasets[number * length : (number + 1) * length]
            counts_GD[number] = _walk_again(weights_D, ends_D, begins_GD[number], number * length, part)
    return datasets


def _guess(weights_D: NDArray[np.float64], positions_G: NDArray[np.int64]) -> NDArray[np.float64]:
    """Counts near the true ones: each share rounded down, the rest to the largest data sets, which recover soonest."""
    counts_GD = np.floor(positions_G[:, None] * weights_D)
    rest_G = positions_G - counts_GD.sum(axis=1)
    for rank, dataset in enumerate(np.argsort(-weights_D, kind="stable")):
        counts_GD[:, dataset] += rank < rest_G
    return counts_GD


def _advance(
    weights_D: NDArray[np.float64],
    counts_GD: NDArray[np.float64],
    starts_G: NDArray[np.int64],
    steps: int,
    chosen_PG: NDArray[Any] | None = None,
) -> None:
    """Apply the rule steps times to all segments; changes counts_GD and fills chosen_PG in place."""
    num_segments, num_datasets = counts_GD.shape
    flat_counts = counts_GD.reshape(-1)  # a view: counts_GD is contiguous
    first_G = np.arange(num_segments) * num_datasets
    positions_G1 = starts_G.astype(np.float64)[:, None]
    behind_GD = np.empty(counts_GD.shape)
    choice_G = np.empty(num_segments, np.int64)
    for step in range(steps):
        np.multiply(np.maximum(positions_G1, 1.0), weights_D, out=behind_GD)
        np.subtract(behind_GD, counts_GD, out=behind_GD)
        behind_GD.argmax(axis=1, out=choice_G)
        if chosen_PG is not None:
            chosen_PG[step] = choice_G
        choice_G += first_G
        flat_counts[choice_G] += 1
        positions_G1 += 1


def _walk_again(
    weights_D: NDArray[np.float64],
    counts_D: NDArray[np.float64],
    wrong_D: NDArray[np.float64],
    start: int,
    chosen: NDArray[Any],
) -> NDArray[np.float64]:
    """Correct in place a segment that began with wrong counts, until they are right; give those at its end."""
    counts_D, ahead_D = counts_D.copy(), counts_D - wrong_D
    for step in range(len(chosen)):
        right = int(np.argmax(weights_D * max(start + step, 1) - counts_D))
        wrong = int(chosen[step])
        counts_D[right] += 1
        if right != wrong:
            chosen[step] = right
            ahead_D[right] += 1
            ahead_D[wrong] -= 1
            if not ahead_D.any():
                return counts_D + np.bincount(chosen[step + 1 :], minlength=len(weights_D))
    return counts_D


def _count_earlier(datasets: NDArray[Any], num_datasets: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each position, how many before it draw from the same data set; and how many draw from each data set."""
    earlier = np.empty(len(datasets), np.int64)
    taken = np.zeros(num_datasets, np.int64)
    for begin in range(0, len(datasets), BLOCK):
        block = datasets[begin : begin + BLOCK]
        counts = np.bincount(block, minlength=num_datasets)
        grouped = np.arange(len(block)) + np.repeat(taken - (np.cumsum(counts) - counts), counts)
        earlier[begin : begin + BLOCK][np.argsort(block, kind="stable")] = grouped
        taken += counts
    return earlier, taken


class BlendedDataset:
    """Samples of several data sets, mixed by weights that add up to 1; as many as all of them have together.

    The shares need not use the data sets up evenly: one that runs out before the blend's end begins anew (Megatron-LM
    fails there). repeated is how many positions that concerns; they lie at the end, beyond what was asked for.
    order: gives what `blend_order` gives, perhaps from where it is kept.
    """

    def __init__(
        self,
        rows: Sequence[SampleRows],
        weights: Sequence[float],
        *,
        order: Callable[[Sequence[float], int], Blend] = blend_order,
    ) -> None:
        if empty := [number for number, part in enumerate(rows) if not len(part)]:
            raise ValueError(f"data set {empty[0]} of the blend has no sample; leave it out")
        self.rows = rows
        self.weights = normalize(weights)
        self._lengths = np.array([len(part) for part in rows])
        self.blend = order(self.weights, int(self._lengths.sum()))
        self.repeated = int(np.maximum(self.blend.taken - self._lengths, 0).sum())

    def __len__(self) -> int:
        return len(self.blend)

    def batch(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """The samples at these positions of the blend, [B, S1]; of int64 if the data sets' dtypes differ."""
        indices = np.asarray(indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise ValueError(f"samples {indices.min()} to {indices.max()} of a blend that has {len(self)}")
        sources = self.blend.datasets[indices]
        samples = self.blend.samples[indices] % self._lengths[sources]
        drawn = {int(source): self.rows[source].batch(samples[sources == source]) for source in np.unique(sources)}
        dtypes = {tokens.dtype for tokens in drawn.values()}
        width = next(iter(drawn.values())).shape[1] if drawn else 0
        batch: NDArray[Any] = np.empty((len(indices), width), dtypes.pop() if len(dtypes) == 1 else np.int64)
        for source, tokens in drawn.items():
            batch[sources == source] = tokens
        return batch
