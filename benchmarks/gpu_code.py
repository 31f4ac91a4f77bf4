"""What the compiler makes of a block for a GPU, where there is none: its kernels, and the bytes that each moves.

python -m benchmarks.gpu_code [--dropout P] [--recompute] [--fp8 FORMAT] [--dtype TYPE] [--microbatch N] [--budget B]
                              [--tensor N] [--whole-sequence] [--gated]

Needs a C compiler and a CUDA build of torch, whose Inductor compiles for an H100 on tensors without memory; nothing is
run. Bytes are those of a kernel's arguments, read and written once; products, attention and what ranks exchange are
named without bytes.
Two blocks are traced: more than one graph of either pass tells that layers do not share what is compiled.
"""

import argparse
import ast
import json
import math
import re
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.no_gpu.library import enter

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2, "i32": 4, "i1": 1, "i64": 8, "u8": 1, "fp8e4nv": 1, "fp8e5": 1}


class Call(NamedTuple):
    """A kernel that a graph starts, and the bytes of its arguments; 0 for libraries' own."""

    name: str
    bytes_moved: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--recompute", action="store_true", help="as --checkpoint-activations")
    parser.add_argument("--fp8", choices=["e4m3", "hybrid"])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--microbatch", type=int, default=16)
    parser.add_argument("--budget", type=float, help="as --activation-memory-budget")
    parser.add_argument("--hidden", action="store_true", help="with a dense mask, as padding needs")
    parser.add_argument("--tensor", type=int, default=1, help="tensor ranks, over which the sequence is cut")
    parser.add_argument("--whole-sequence", action="store_true", help="which is not cut")
    parser.add_argument("--gated", action="store_true", help="SwiGLU, RMSNorm and no biases, as Llama has them")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    enter()
    code, breaks = compiled_code(options)
    graphs = [list(calls_of(graph, code)) for graph in re.findall(r"def call\(self, args\):.*?return \(", code, re.S)]
    if options.json:
        told = [[list(call) for call in graph] for graph in graphs]
        print(json.dumps({"graphs": told, "graph_breaks": breaks}))
        return
    for number, graph in enumerate(graphs):
        print(f"graph {number}: {sum(call.bytes_moved for call in graph) / 1e6:,.1f} MB")
        for call in graph:
            print(f"{call.bytes_moved / 1e6:10,.1f} MB  {call.name}" if call.bytes_moved else f"{'':14} {call.name}")
    print(f"{breaks} graph breaks")


def compiled_code(options: argparse.Namespace) -> tuple[str, int]:
    """The source of the graphs of a block of GPT-2 XL, and the number of places where its trace breaks."""
    import torch

    _take_the_devices_place()
    import torch._subclasses.fake_tensor as fake
    import torch.distributed as dist
    import torch.testing._internal.distributed.fake_pg as ranks_that_answer
    from torch import nn
    from torch._dynamo.utils import counters
    from torch._inductor.graph import GraphLowering

    from megalith.layers.block import Block
    from megalith.layers.float8 import use_float8, weight_in_8_bits
    from megalith.layers.mask import Mask
    from megalith.models.settings import ModelConfig
    from megalith.models.shape import block_shape
    from megalith.parallel.narrow import linears_of
    from megalith.parallel.recompute import compile_blocks
    from megalith.parallel.tensor import split_tensors

    graphs: list[str] = []
    setattr(GraphLowering, "save_output_code", graphs.append)  # noqa: B010
    setattr(fake, "init_gpu_context", lambda device=None: None)  # noqa: B010
    device, dtype = torch.device("cuda"), getattr(torch, options.dtype)
    config = ModelConfig(
        num_layers=48,
        hidden_size=1600,
        num_attention_heads=25 if options.tensor == 1 else 20,
        max_position_embeddings=1024,
        hidden_dropout=options.dropout,
        attention_dropout=options.dropout,
        swiglu=options.gated,
        normalization="RMSNorm" if options.gated else "LayerNorm",
        add_bias_linear=not options.gated,
    )
    dist.init_process_group("fake", rank=0, world_size=options.tensor, store=ranks_that_answer.FakeStore())
    tokens = 1024 if options.whole_sequence else 1024 // options.tensor
    with fake.FakeTensorMode():
        shape = block_shape(config, dtype=dtype)
        blocks = nn.ModuleList([Block(shape, number=number, stack="decoder", device=device) for number in (3, 4)])
        split_tensors(blocks, dist.group.WORLD, sequence=not options.whole_sequence)
        if options.fp8:
            use_float8(blocks, options.fp8)
        compile_blocks(
            blocks,
            memory_budget=options.budget,
            device=device,
            recompute_inside=options.recompute,
            keep_order=options.tensor > 1,
        )
        if not options.recompute and options.budget is None and options.dtype != "float32":
            for linear in linears_of(blocks):  # as the step's engine has them
                weight = linear.weight.detach()
                linear.narrow = weight_in_8_bits(weight) if options.fp8 else weight.to(dtype)
        x = torch.empty(options.microbatch, tokens, 1600, device=device, dtype=dtype, requires_grad=True)
        rows = torch.empty(options.microbatch, 1024, dtype=torch.int32, device=device) if options.dropout else None
        seen = torch.empty(options.microbatch, 1, 1024, 1024, dtype=torch.bool, device=device)
        mask = Mask(causal=not options.hidden, visible=seen if options.hidden else None)
        for block in blocks:
            try:
                block(x, mask, rows)
            except torch.AcceleratorError as error:  # compiled, and there is nothing to run it on
                if "CUDA driver version is insufficient" not in str(error):
                    raise
    return "\n".join(graphs), sum(counters["graph_break"].values())


def _take_the_devices_place() -> None:
    """What of torch asks a device in earnest, answered; before anything is traced."""
    import torch

    def answer(module: Any, **answers: Any) -> None:
        for name, value in answers.items():
            setattr(module, name, value)

    properties = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32,
        max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, max_threads_per_block=1024,
        shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10,
        shared_memory_per_multiprocessor=228 << 10, L2_cache_size=50 << 20, gcnArchName="", is_integrated=0,
        is_multi_gpu_board=0,
    )  # fmt: skip
    answer(
        torch.cuda,
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        get_device_properties=lambda device=None: properties,
        get_device_capability=lambda device=None: (9, 0),
        get_device_name=lambda device=None: properties.name,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: None,
        set_device=lambda device: None,
        synchronize=lambda device=None: None,
        _lazy_init=lambda: None,
    )
    answer(torch.cuda.random, get_rng_state=torch.cuda.get_rng_state)
    answer(torch.accelerator, is_available=lambda: False)
    # Only now, for the compiler takes some of these functions as it is imported.
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    import torch._inductor.fx_passes.fuse_attention as attention_patterns
    import torch._inductor.fx_passes.misc_patterns as other_patterns
    import torch._inductor.fx_passes.pad_mm as padding_patterns
    import torch._inductor.runtime.benchmarking as benchmarking

    import megalith.layers.block as block

    # Patterns that are made by computing with constants on the device; none of them is of a block here.
    answer(attention_patterns, _sfdp_init=lambda device=None: None)
    answer(padding_patterns, _pad_mm_init=lambda device=None: None)
    answer(other_patterns, _misc_patterns_init=lambda device=None: None)
    # Both passes are compiled at once, here, and no size of a kernel is faster than another.
    answer(inductor, compile_threads=1, joint_graph_constant_folding=False, force_disable_caches=True)
    answer(functorch, force_non_lazy_backward_lowering=True)
    for found in vars(benchmarking).values():
        if isinstance(found, type) and hasattr(found, "benchmark_gpu"):
            answer(found, benchmark_gpu=lambda self, *args, **kwargs: 1.0)
    # Numbers that would have to be copied to the device.
    answer(
        block,
        on_device=lambda where, device: torch.empty((), dtype=torch.int32, device=device),
        number_words=lambda count, device: torch.empty(count, dtype=torch.int32, device=device),
    )


def calls_of(graph: str, code: str) -> Iterator[Call]:
    """The kernels that a graph starts, in their order. code: where their source is."""
    sizes = {name: _product(shape) for name, shape in re.findall(r"assert_size_stride\((\w+), \(([\d, ]*)\),", graph)}
    signatures = {
        name: ast.literal_eval(signature)
        for name, signature in re.findall(r"(triton_\w+) = async_compile.triton.*?'signature': (\{.*?\})", code, re.S)
    }
    for line in map(str.strip, graph.splitlines()):
        if made := re.match(r"(\w+) = empty_strided_cuda\(\(([\d, ]*)\)", line):
            sizes[made[1]] = _product(made[2])
        elif viewed := re.match(r"(\w+) = reinterpret_tensor\(\w+, \(([\d, ]*)\)", line):
            sizes[viewed[1]] = _product(viewed[2])
        elif renamed := re.match(r"(\w+) = (\w+)(?:; del|$)", line):
            sizes[renamed[1]] = sizes.get(renamed[2], 0)
        if started := re.match(r"(triton_\w+)\.run\((.*), stream=", line):
            yield Call(started[1], _bytes_of(started[2], signatures[started[1]], sizes))
        elif library := re.match(r"(?:\w+ = )?((?:extern_kernels|torch\.ops)\.[\w.]+)\(", line):
            yield Call(library[1], 0)


def _bytes_of(arguments: str, signature: dict[str, str], sizes: dict[str, int]) -> int:
    given = re.findall(r"reinterpret_tensor\(\w+, \([\d, ]*\), \([\d, ]*\), \d+\)|[^,\s]+", arguments)
    total = 0
    kinds = [(name, kind) for name, kind in signature.items() if kind != "constexpr"]
    for (name, kind), argument in zip(kinds, given, strict=False):
        if kind.startswith("*"):
            viewed = re.match(r"reinterpret_tensor\(\w+, \(([\d, ]*)\)", argument)
            count = _product(viewed[1]) if viewed else sizes.get(argument, 0)
            total += count * WIDTHS[kind[1:]] * (2 if name.startswith("in_out") else 1)
    return total


def _product(shape: str) -> int:
    return math.prod(int(size) for size in shape.split(",") if size.strip())


if __name__ == "__main__":
    main()
