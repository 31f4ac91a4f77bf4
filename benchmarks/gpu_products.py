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

from megalith.layers.attend import AttentionDropout, attend
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


def attention_rates(device: torch.device, dtype: torch.dtype, batch: int, heads: int, tokens: int) -> dict[str, float]:
    """TFLOP/s of causal attention, forward and backward together, by each way to compute it."""
    qkv = torch.randn(batch, tokens, heads, 3, 64, device=device, dtype=dtype, requires_grad=True)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(3))
    slopes = torch.randn(batch, heads, tokens, 64, device=device, dtype=dtype)
    mask = make_mask(tokens, causal=True)
    rows = dropout_rows(1, torch.arange(batch), tokens)[:, None] ^ number_words(heads)[:, None]
    dropout = AttentionDropout(0.1, mix(rows).to(device))
    ways: dict[str, tuple[AbstractContextManager[Any], Callable[[], Tensor]]] = {
        "as PyTorch chooses": (nullcontext(), lambda: attend(q, k, v, mask, scale=0.125)),
        "with dropout": (nullcontext(), lambda: attend(q, k, v, mask, scale=0.125, dropout=dropout)),
    }
    if device.type == "cuda":
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            ways[backend.name.lower()] = (sdpa_kernel(backend), lambda: attend(q, k, v, mask, scale=0.125))
    # Half of the scores; forward two products, backward five.
    flops = (2 + 5) * 2 * batch * heads * tokens * tokens * 64 / 2
    rates = {}
    for name, (chosen, forward) in ways.items():
        with chosen:
            taken = median_seconds(lambda forward=forward: torch.autograd.grad(forward(), qkv, slopes), device)  # type: ignore[misc]
        rates[f"attention {name}, {batch} x {heads} heads x {tokens}"] = flops / taken / TERA
    return rates


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--toy", action="store_true")
    toy = parser.parse_args().toy
    device = torch.device("cpu" if toy else "cuda")
    dtype = torch.float32 if toy else torch.bfloat16
    rates: dict[str, float] = {}
    for micro in (1,) if toy else (8, 16):
        rates |= product_rates(device, dtype, micro * (64 if toy else 1024), 64 if toy else 1600, 320 if toy else 50304)
        rates |= attention_rates(device, dtype, micro, 2 if toy else 25, 64 if toy else 1024)
    for name, rate in rates.items():
        print(f"  {name:<52}{rate:10.3f} TFLOP/s")
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
