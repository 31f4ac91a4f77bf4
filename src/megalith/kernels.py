"""Whether kernels of our own can be had: they are written for Triton, which comes with PyTorch's CUDA builds."""

from importlib.util import find_spec

HAS_TRITON = find_spec("triton") is not None  # a constant, for the compiler
