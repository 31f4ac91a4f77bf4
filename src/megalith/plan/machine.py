"""What forecasts of time know of a machine: what its makers say, and the share of it that programs reach."""

import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megalith.monitor.flops import TERA
from megalith.plan.ceiling import measure_layer, measure_libraries
from megalith.plan.products import operations_with_waste
from megalith.terminal import counted

if TYPE_CHECKING:
    import torch

GIGA, GIB, MICROSECOND = 1e9, 2**30, 1e-6
TIMES, MEASURED = 3, 0.3  # so often and for so many seconds this CPU's best product is looked for


@dataclass(frozen=True)
class Machine:
    """A device, the node it stands in and the network between nodes. Bandwidths count one direction, of one device."""

    name: str
    memory_bytes: float
    flops: float  # of 16-bit products a second; of fp32 on a CPU
    flops_8_bit: float
    bandwidth: float  # bytes a second, of its memory
    link: float  # bytes a second, to the others of its node
    network: float  # bytes a second, to other nodes
    ranks_per_node: int
    multiprocessors: int | None = None  # None: products are bound by their operations alone
    # Shares that are reached, and what a tile of a product costs besides: in steps of its inner dimension.
    product_share: float = 0.75
    product_share_8_bit: float = 0.55
    depth: float = 200.0
    memory_share: float = 0.9
    # Of `flops`, over what a causal order leaves of the scores; forward, and backward (5 products in place of 2).
    attention_share: float = 0.25
    attention_backward_share: float = 0.22
    # Seconds that a collective takes however little it moves: in a node, and over the network.
    link_share: float = 0.78
    network_share: float = 0.9
    link_latency: float = 15 * MICROSECOND
    network_latency: float = 25 * MICROSECOND

    @property
    def device(self) -> str:
        return "cpu" if self.multiprocessors is None else "cuda"

    def product(
        self, rows: float, inner: float, columns: float, *, size: int, batch: float = 1, fp8: bool = False
    ) -> float:
        """Seconds of a matrix product (rows x inner by inner x columns), batch times; size: bytes of an element."""
        if self.multiprocessors is None:
            operations = 2.0 * batch * rows * inner * columns
        else:
            operations = operations_with_waste(
                rows, inner, columns, batch=batch, multiprocessors=self.multiprocessors, depth=self.depth
            )
        rate = self.flops_8_bit * self.product_share_8_bit if fp8 else self.flops * self.product_share
        moved = batch * (rows * inner + inner * columns + rows * columns) * size
        return max(operations / rate, self.passes(moved))

    @property
    def reached_link(self) -> float:
        return self.link * self.link_share

    @property
    def reached_network(self) -> float:
        return self.network * self.network_share

    def passes(self, moved: float) -> float:
        """Seconds to move that many bytes through the device's memory."""
        return moved / (self.bandwidth * self.memory_share)

    def collective(self, wire: float, ranks: int, stride: int) -> float:
        """Seconds of a collective in which each of so many ranks, `stride` apart, sends `wire` bytes.

        The ranks of a group that stand in one node use the network together.
        """
        if ranks == 1:
            return 0.0
        in_node = max(1, min(ranks, self.ranks_per_node // stride))
        if in_node == ranks:
            return wire / self.reached_link + self.link_latency
        hops = 1 + (-(-ranks // in_node) - 1).bit_length()
        return wire / min(self.reached_link, self.reached_network * in_node) + self.network_latency * hops

    def send(self, moved: float, stride: int) -> float:
        """Seconds until a rank so many ranks further has what is sent to it."""
        if stride < self.ranks_per_node:
            return moved / self.reached_link + self.link_latency
        return moved / self.reached_network + self.network_latency


# Makers' data sheets (SXM); nodes of eight, with NVLink inside and a network card for each GPU (200 Gbit/s by an A100,
# 400 by the others). The H200's shares are from steps of GPT-2 XL on one, the H100's are taken to be the same, the
# A100's are fitted to published step times: `python -m benchmarks.planner`.
H200 = Machine(
    name="NVIDIA H200",
    memory_bytes=140 * GIB,
    flops=989.4 * TERA,
    flops_8_bit=1979 * TERA,
    bandwidth=4800 * GIGA,
    link=450 * GIGA,
    network=50 * GIGA,
    ranks_per_node=8,
    multiprocessors=132,
)
H100 = replace(H200, name="NVIDIA H100", memory_bytes=79 * GIB, bandwidth=3350 * GIGA)
A100 = Machine(
    name="NVIDIA A100 80 GB",
    memory_bytes=79 * GIB,
    flops=312 * TERA,
    flops_8_bit=312 * TERA,
    bandwidth=2039 * GIGA,
    link=300 * GIGA,
    network=25 * GIGA,
    ranks_per_node=8,
    multiprocessors=108,
    product_share=0.89,
    depth=125.0,
    memory_share=0.69,
)
MACHINES = {"a100": A100, "h100": H100, "h200": H200}


def this_cpu(ranks: int, dtype: "torch.dtype") -> Machine:
    """This machine's processor as each of so many ranks on it has it, by three seconds of measuring.

    All ranks are taken to stand on this machine, since nothing is known of others.
    """
    import torch

    cpu = torch.device("cpu")
    # Now and then all threads stand on one core until they have slept.
    rested = [_rested_flops(cpu, dtype) for _ in range(TIMES)]
    *of_libraries, of_layer = (max(rates) for rates in zip(*rested, strict=True))
    flops = max(of_libraries) / ranks
    product_share = min(1.0, of_layer / max(of_libraries))
    attention_rates = [_attention_rates(dtype) for _ in range(TIMES)]
    attention_share, attention_backward_share = (
        max(rates) / max(of_libraries) for rates in zip(*attention_rates, strict=True)
    )
    numbers = torch.ones(1 << 24)
    target = torch.empty_like(numbers)
    fastest = min(_seconds_of_copy(numbers, target) for _ in range(5))
    return Machine(
        name=f"this machine's CPU, {counted(torch.get_num_threads(), 'thread')}",
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks,
        flops=flops,
        flops_8_bit=flops,
        bandwidth=2 * numbers.nbytes / fastest / ranks,
        link=1.0 * GIGA,
        network=1.0 * GIGA,
        ranks_per_node=ranks,
        product_share=product_share,
        product_share_8_bit=product_share,
        memory_share=1.0,
        attention_share=attention_share,
        attention_backward_share=attention_backward_share,
        link_share=1.0,
        link_latency=200 * MICROSECOND,
    )


def _rested_flops(device: "torch.device", dtype: "torch.dtype") -> list[float]:
    """The best product of each library, then the products of a layer."""
    time.sleep(0.05)
    return [*measure_libraries(device, dtype, seconds=MEASURED), measure_layer(dtype, seconds=MEASURED / 2)]


def _attention_rates(dtype: "torch.dtype") -> tuple[float, float]:
    """FLOP/s of causal attention, forward and backward, as `megalith.plan.time.attention_passes` counts them."""
    import torch

    from megalith.layers.attend import attend
    from megalith.layers.mask import Mask

    heads, tokens, head_width = 16, 512, 64
    q, k, v = (torch.ones(1, heads, tokens, head_width, dtype=dtype, requires_grad=True) for _ in range(3))
    operations = 2 * tokens * tokens * heads * head_width
    started = time.perf_counter()
    o_BHTK = attend(q, k, v, Mask(causal=True), scale=head_width**-0.5)
    computed = time.perf_counter()
    o_BHTK.backward(torch.ones_like(o_BHTK))
    return operations / (computed - started), 2.5 * operations / (time.perf_counter() - computed)


def _seconds_of_copy(numbers: "torch.Tensor", target: "torch.Tensor") -> float:
    started = time.perf_counter()
    target.copy_(numbers)
    return time.perf_counter() - started
