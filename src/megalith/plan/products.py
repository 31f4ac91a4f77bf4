"""How long a matrix product takes on a GPU, from its shape: in tiles, each by one multiprocessor, in waves.

Two effects make small or odd products slow: the last wave leaves multiprocessors without a tile, and a tile costs
something before and after it runs along the inner dimension. With two constants of a device (`reached`, `depth`) the
model is within 4 % (mean) of 27 products of GPT-2 XL's shapes on an H200 (`python -m benchmarks.planner`).
"""

import math
from functools import lru_cache

# Rows and columns of a tile, and how much of the device's rate it can reach beside the largest.
TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.92), (128, 64, 0.75), (64, 128, 0.75), (64, 64, 0.6))
# The inner dimension may be shared out where there are few tiles, in parts of at least so much.
SPLITS, LEAST_DEPTH = (1, 2, 4, 8), 256


@lru_cache(maxsize=1 << 16)
def operations_with_waste(
    rows: float, inner: float, columns: float, *, batch: float, multiprocessors: int, depth: float
) -> float:
    """Operations that could have been done in the time of the fastest tiles; at least 2 x rows x inner x columns."""
    best = math.inf
    for height, width, share in TILES:
        tiles = batch * math.ceil(rows / height) * math.ceil(columns / width)
        for split in SPLITS:
            if split > 1 and inner / split < LEAST_DEPTH:
                break
            waves = math.ceil(tiles * split / multiprocessors)
            best = min(best, waves * multiprocessors * height * width * 2 * (inner / split + depth) / share)
    return best
