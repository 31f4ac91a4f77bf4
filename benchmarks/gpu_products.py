"""Rates of matrix products and of attention at the shapes of GPT-2 XL; a table, then one JSON object. See gpu.sh."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalith.layers.attend import attend
from megalith.layers.attend_blocks import AttentionDropout
from megalith.layers.float8 import in_8_bits
from megalith.layers.mask import make_mask
from megalith.layers.random import dropout_rows, mix, number_words

TERA = 1e12


def median_seconds(work: Callable[[], Any], device: torch.device, *, repeat: int = 20) -> float:
    """Of one call, device included, after two that warm up."""
    seconds: list[float] = []
    for number in range(repeat + 2):
        if device.type == "cuda":
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            work()
            ended.record()
            ended.synchronize()
            taken = began.elapsed_time(ended) / 1000
        else:
            started = time.perf_counter()
            work()
            taken = time.perf_counter() - started
        if number >= 2:
            seconds.append(taken)
    return statistics.median(seconds)


def product_rates(device: torch.device, dtype: torch.dtype, rows: int, width: int, vocab_size: int) -> dict[str, float]:
    """TFLOP/s of each product of a layer: forward, by input, by weight; and 8-bit ones where the device has them."""
    rates = {}
    shapes = {"qkv": (3 * width, width), "out": (width, width), "up": (4 * width, width), "down": (width, 4 * width)}
    for name, (outputs, inputs) in {**shapes, "logits": (vocab_size, width)}.items():
        count = min(rows, 4096) if name == "logits" else rows
        x = torch.randn(count, inputs, device=device, dtype=dtype)
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
        slopes = torch.randn(count, outputs, device=device, dtype=dtype)
        flops = 2 * count * inputs * outputs
        works: dict[str, Callable[[], Any]] = {
            "forward": lambda x=x, weight=weight: F.linear(x, weight),  # type: ignore[misc]
            "by input": lambda slopes=slopes, weight=weight: slopes @ weight,  # type: ignore[misc]
            "by weight": lambda slopes=slopes, x=x: slopes.t() @ x,  # type: ignore[misc]
        }
        if device.type == "cuda" and name != "logits":
            (x8, x_scale), (w8, w_scale) = in_8_bits(x, torch.float8_e4m3fn), in_8_bits(weight, torch.float8_e4m3fn)
            works["forward in 8 bits"] = lambda x8=x8, w8=w8, xs=x_scale, ws=w_scale: torch._scaled_mm(  # type: ignore[misc]
                x8, w8.t(), xs, ws, out_dtype=dtype, use_fast_accum=True
            )
        for kind, work in works.items():
            rates[f"{name} {kind}, {count} rows"] = flops / median_seconds(work, device) / TERA
    return rates


def graphed_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Of one call on the device alone: it is recorded as a CUDA graph, so that no launch is waited for."""
    if device.type != "cuda":
        return median_seconds(work, device, repeat=5)
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return median_seconds(graph.replay, device)


def attention_inputs(
    device: torch.device, dtype: torch.dtype, batch: int, heads: int, tokens: int
) -> tuple[list[Tensor], Tensor, AttentionDropout]:
    """Queries, keys and values as the projection leaves them, the gradient of the output, and dropout."""
    qkv = torch.randn(batch, tokens, heads, 3, 64, device=device, dtype=dtype)
    inputs = [part.transpose(1, 2).requires_grad_() for part in qkv.unbind(3)]
    slopes = torch.randn(batch, tokens, heads, 64, device=device, dtype=dtype).transpose(1, 2)
    rows = dropout_rows(1, torch.arange(batch), tokens)[:, None] ^ number_words(heads)[:, None]
    return inputs, slopes, AttentionDropout(0.1, mix(rows).to(device))


def attention_rates(device: torch.device, dtype: torch.dtype, batch: int, heads: int, tokens: int) -> dict[str, float]:
    """TFLOP/s of causal attention, forward alone and both passes together, by each way to compute it."""
    (q, k, v), slopes, dropout = attention_inputs(device, dtype, batch, heads, tokens)
    mask = make_mask(tokens, causal=True)
    ways: dict[str, tuple[AbstractContextManager[Any], AttentionDropout | None]] = {
        "as PyTorch chooses": (nullcontext(), None),
        "with dropout": (nullcontext(), dropout),
    }
    if device.type == "cuda":
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            ways[backend.name.lower()] = (sdpa_kernel(backend), None)
    rates = {}
    for name, (chosen, dropped) in ways.items():

        def forward(dropped: AttentionDropout | None = dropped) -> Tensor:
            return attend(q, k, v, mask, scale=0.125, dropout=dropped)

        def both(forward: Callable[[], Tensor] = forward) -> Any:
            return torch.autograd.grad(forward(), (q, k, v), slopes)

        with chosen:
            # Half of the scores; forward two products, backward five.
            for passes, work, products in (("forward", forward, 2), ("both passes", both, 7)):
                flops = products * 2 * batch * heads * tokens * tokens * 64 / 2
                rate = flops / graphed_seconds(work, device) / TERA
                rates[f"attention {name}, {passes}, {batch} x {heads} x {tokens}"] = rate
    return rates


# Sizes of the kernels with dropout that were thought of, the first what is taken: which is fastest only a GPU tells.
VARIANTS = {
    "forward_blocks": [
        (64, 64, 4, 2, 128), (128, 64, 8, 3, 128), (64, 64, 4, 2, None), (64, 64, 4, 1, 128), (64, 128, 4, 2, 128),
        (64, 32, 4, 2, 128),
    ],
    "backward_blocks": [
        (64, 64, 4, 2, None), (64, 64, 4, 3, None), (64, 64, 4, 2, 168), (128, 64, 8, 2, None), (64, 32, 4, 2, None),
        (128, 32, 4, 2, None),
    ],
    "queries_blocks": [
        (64, 64, 4, 2, 168), (64, 64, 4, 2, None), (64, 64, 4, 3, 168), (128, 64, 8, 2, None), (128, 32, 4, 2, None),
    ],
}  # fmt: skip


def kernel_times(device: torch.device, dtype: torch.dtype, batch: int, heads: int, tokens: int) -> dict[str, float]:
    """Milliseconds of attention with dropout, the forward pass for its sizes, both passes for the others."""
    from megalith.layers import attend_fused

    (q, k, v), slopes, dropout = attention_inputs(device, dtype, batch, heads, tokens)
    mask = make_mask(tokens, causal=True)
    times = {}
    for function, variants in VARIANTS.items():
        taken = getattr(attend_fused, function)
        for sizes in variants:
            setattr(attend_fused, function, lambda width, sizes=sizes: attend_fused.Blocks(*sizes))

            def work(function: str = function) -> Any:
                output = attend(q, k, v, mask, scale=0.125, dropout=dropout)
                # The backward pass goes where the forward pass went, which is what is recorded.
                return output if function == "forward_blocks" else torch.autograd.grad(output, (q, k, v), slopes)

            try:
                times[f"{function} {sizes}"] = 1000 * graphed_seconds(work, device)
            except Exception as error:  # a size that does not fit is told, and the next one tried
                print(f"  {function} {sizes}: {type(error).__name__}: {str(error)[:200]}")
        setattr(attend_fused, function, taken)
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--kernels", action="store_true", help="sizes of attention's kernels alone")
    options = parser.parse_args()
    toy = options.toy
    device = torch.device("cpu" if toy else "cuda")
    dtype = torch.float32 if toy else torch.bfloat16
    if options.kernels:
        times = kernel_times(device, dtype, 16, 25, 1024)
        for name, taken in times.items():
            print(f"  {name:<52}{taken:10.3f} ms")
        print(json.dumps(times))
        return
    rates: dict[str, float] = {}
    for micro in (1,) if toy else (8, 16):
        rates |= product_rates(device, dtype, micro * (64 if toy else 1024), 64 if toy else 1600, 320 if toy else 50304)
        rates |= attention_rates(device, dtype, micro, 2 if toy else 25, 64 if toy else 1024)
    for name, rate in rates.items():
        print(f"  {name:<52}{rate:10.3f} TFLOP/s")
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
