"""What Inductor makes of blocks for a GPU, seen with a CUDA build and no device: one graph each way for all layers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_code import calls_of

ROOT = Path(__file__).parent.parent
GRAPH = """
def call(self, args):
    assert_size_stride(primals_1, (4, 8), (8, 1))
    buf0 = empty_strided_cuda((4, 8), (8, 1), torch.bfloat16)
    triton_poi_fused_0.run(primals_1, buf0, 32, stream=stream0)
    buf1 = buf0; del buf0  # reuse
    triton_poi_fused_1.run(buf1, reinterpret_tensor(primals_1, (2, 8), (8, 1), 0), 32, stream=stream0)
    extern_kernels.mm(buf1, primals_1, out=buf2)
    assert_size_stride(buf2, (4, 8), (8, 1), 'torch.ops.aten.mm.default')
"""
CODE = """
triton_poi_fused_0 = async_compile.triton('a', ''' 'signature': {'in_ptr0': '*fp32', 'out_ptr0': '*bf16', 'n': 'i32'},
triton_poi_fused_1 = async_compile.triton('b', ''' 'signature': {'in_out_ptr0': '*bf16', 'in_ptr0': '*fp32'},
"""


def test_bytes_are_those_of_the_arguments() -> None:
    assert [tuple(call) for call in calls_of(GRAPH, CODE)] == [
        ("triton_poi_fused_0", 32 * 4 + 32 * 2),
        ("triton_poi_fused_1", 2 * 32 * 2 + 16 * 4),
        ("extern_kernels.mm", 0),
    ]


needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None or torch.cuda.is_available() or shutil.which("cc") is None,
    reason="needs a CUDA build of torch, no device, and a C compiler",
)


def told_of(words: str) -> dict[str, Any]:
    """What the program tells of a block with these flags."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_code", "--json", *words.split()]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    told: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return told


@pytest.mark.slow
@needs_cuda_build
@pytest.mark.parametrize(
    ("words", "products"),
    [
        ("", 8),
        ("--dropout 0.1", 8),
        ("--dropout 0.1 --hidden --dtype float16", 8),
        ("--dropout 0.1 --recompute", 11),  # the last of the four forward is not needed
        ("--dropout 0.1 --fp8 e4m3", 8),
        ("--dropout 0.1 --budget 0.9", 8),
    ],
)
def test_a_block_is_one_graph_each_way(words: str, products: int) -> None:
    told = told_of(words)
    assert told["graph_breaks"] == 0
    forward, backward = told["graphs"]
    # The operator adds a weight's gradient to what is there; 8-bit products leave that to autograd.
    by_weight = [name for name, _ in backward if "gradient_by_weight" in name and not name.startswith("triton")]
    assert len(by_weight) == (0 if "fp8" in words else 4)
    of_products = [[name for name, _ in calls if name.startswith("extern_kernels.")] for calls in (forward, backward)]
    assert [len(names) for names in of_products] == [4, products - len(by_weight)]
    assert any("attend" in name or "attention" in name for name, _ in forward)
    # Norms hold their rows, and each has one pass backward.
    assert not any(name.startswith("triton_red") and "norm" in name and size > 1e6 for name, size in forward)
    assert sum(name.startswith("torch.ops.megalith.norm_backward") for name, _ in backward) == 2
    # x, what enters and leaves the branches and GELU, and the weights: a hash that went through memory would show.
    assert sum(size for _, size in forward) < 1.15e9 or "fp8" in words


@pytest.mark.slow
@needs_cuda_build
@pytest.mark.parametrize(
    "words", ["", "--gated", "--whole-sequence", "--dropout 0.1", "--fp8 e4m3", "--gated --fp8 hybrid"]
)
def test_tensor_ranks_exchange_beside_products(words: str) -> None:
    told = told_of(f"--tensor 2 {words}")
    assert told["graph_breaks"] == 0
    _, backward = told["graphs"]
    order = [short for name, _ in backward if (short := short_of(name)) is not None]
    # Of attention and of the feed-forward, each with as many products as enter together.
    again = [] if "whole" in words else ["gather again"]
    for products in (1, 2 if "gated" in words else 1):
        waits = [*again, *products * ["product"], "sum", *(["wait"] if again else []), *products * ["product"], "wait"]
        assert " ".join(waits) in " ".join(order), order
    # Nothing is moved within memory to cut tokens or to join them.
    assert not any("clone_permute" in name and "mm" not in name and size > 1e6 for name, size in backward)


def short_of(name: str) -> str | None:
    """What counts of a graph's calls."""
    kinds = {"extern_kernels": "product", "gradient_by_weight": "product", "start_gather": "gather again"}
    kinds |= {"reduce_scatter_tensor": "sum", "all_reduce_": "sum", "wait_tensor": "wait"}
    called = name.removeprefix("torch.ops.").split(".")
    return next((short for kind, short in kinds.items() if kind in called), None)
