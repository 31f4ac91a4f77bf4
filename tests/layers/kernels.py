"""Where Triton's kernels run: on a GPU, and in Triton's interpreter on the CPU."""

from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = "inductor" if torch.cuda.is_available() else "aot_eager"  # which compiles nothing, but traces the same

# What GPUs compute in by default; Triton's interpreter computes bf16 wrongly.
SIXTEEN = torch.bfloat16 if DEVICE == "cuda" else torch.float16


def numbers_of(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")[:2])


runs_kernels = pytest.mark.skipif(
    find_spec("triton") is None
    or (DEVICE == "cpu" and numbers_of(version("triton")) < (3, 7) and numbers_of(np.__version__) >= (2, 4)),
    reason="needs triton; the interpreter of Triton before 3.7 cannot do loops beside numpy 2.4",
)
