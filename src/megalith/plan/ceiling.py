"""What products of matrices this machine reaches: the yardstick of MFU."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def measure_matmul_flops(
    device: "torch.device", dtype: "torch.dtype", *, seconds: float = 0.3, any_library: bool = True
) -> float:
    """Operations per second of the best of many large square matrix products: what this machine reaches in practice.

    Takes about twice the given seconds, at least two products. The product is of 8192 rows on a GPU, 1024 on the CPU,
    where in fp32 both of torch's libraries have their turns, or, unless any_library, the one that it uses by itself.
    """
    import torch

    from megalith.layers.products import suits_onednn, times_transposed

    size = 8192 if device.type == "cuda" else 1024
    # Random, since a GPU multiplies constants faster, by what it saves in power.
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    result = torch.empty((size, size), device=device, dtype=dtype)

    ways: list[Callable[[], torch.Tensor]] = [lambda: torch.mm(left, right, out=result)]
    if any_library and suits_onednn(left, right):
        ways.append(lambda: times_transposed(left, right))

    def product() -> float:
        """Seconds of the fastest way."""
        seconds_of_ways = []
        for way in ways:
            started = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds_of_ways.append(time.perf_counter() - started)
        return min(seconds_of_ways)

    warm_until = time.perf_counter() + seconds
    product()
    while time.perf_counter() < warm_until:
        product()
    measure_until = time.perf_counter() + seconds
    fastest = product()
    while time.perf_counter() < measure_until:
        fastest = min(fastest, product())
    return 2.0 * size**3 / fastest
