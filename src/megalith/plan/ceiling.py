"""What products of matrices this machine reaches: the yardstick of MFU."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def measure_matmul_flops(device: "torch.device", dtype: "torch.dtype", *, seconds: float = 0.3) -> float:
    """Operations per second of the best of many large square matrix products: what this machine reaches in practice."""
    return max(measure_libraries(device, dtype, seconds=seconds))


def measure_libraries(device: "torch.device", dtype: "torch.dtype", *, seconds: float = 0.3) -> list[float]:
    """The same of each library that may multiply: the one that torch uses by itself, then oneDNN where it has a part.

    Takes about twice the given seconds, at least two products. The product is of 8192 rows on a GPU, 1024 on the CPU,
    see `_shrunk`.
    """
    import torch

    from megalith.layers.products import suits_onednn, times_transposed

    size = 8192 if device.type == "cuda" else _shrunk(1024, dtype)
    # Random, since a GPU multiplies constants faster, by what it saves in power.
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    result = torch.empty((size, size), device=device, dtype=dtype)
    ways: list[Callable[[], object]] = [lambda: torch.mm(left, right, out=result)]
    if suits_onednn(left, right):
        ways.append(lambda: times_transposed(left, right))
    return [2.0 * size**3 / fastest for fastest in _least_seconds(ways, device, seconds)]


def measure_layer(dtype: "torch.dtype", *, seconds: float = 0.3) -> float:
    """Operations per second of the CPU in the products of an MLP of 768 and 1024 rows, forward and backward.

    Less than the best product where a library is slower at transposed ones.
    """
    import torch

    from megalith.layers.products import linear

    rows, width, inner = (_shrunk(size, dtype) for size in (1024, 768, 3072))
    generator = torch.Generator().manual_seed(1)
    x, wide, narrow, slopes = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((rows, width), (inner, width), (width, inner), (rows, width))
    )
    inputs = [tensor.requires_grad_() for tensor in (x, wide, narrow)]

    def layer() -> object:
        return torch.autograd.grad(linear(linear(x, wide, None), narrow, None), inputs, slopes)

    (fastest,) = _least_seconds([layer], torch.device("cpu"), seconds)
    return 3 * 2 * 2.0 * rows * width * inner / fastest


def _shrunk(size: int, dtype: "torch.dtype") -> int:
    """A quarter of it in fp16 on a CPU without instructions for that, where a product of 1024 rows takes seconds."""
    import torch

    from megalith.layers.products import has_instructions_for

    return size // 4 if dtype == torch.float16 and not has_instructions_for(dtype) else size


def _least_seconds(ways: Sequence[Callable[[], object]], device: "torch.device", seconds: float) -> list[float]:
    """Of each way, in turns for twice so many seconds, of which the first half warms up."""
    import torch

    def seconds_of(way: Callable[[], object]) -> float:
        started = time.perf_counter()
        way()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    def turns(until: float) -> list[float]:
        fastest = [seconds_of(way) for way in ways]
        while time.perf_counter() < until:
            fastest = [min(least, seconds_of(way)) for least, way in zip(fastest, ways, strict=True)]
        return fastest

    turns(time.perf_counter() + seconds)
    return turns(time.perf_counter() + seconds)
