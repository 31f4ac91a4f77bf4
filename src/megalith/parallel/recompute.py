"""Recomputation: the backward pass computes activations again instead of keeping them (Chen et al. 2016, 1604.06174).

Dropout masks are functions of counters, so computing twice needs no generator's state.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalith.layers.attention import CrossAttention, SelfAttention
from megalith.layers.block import Block
from megalith.models.transformer import run_whole
from megalith.parallel.collectives import Group, gather_copies, scatter_copies, size_of
from megalith.parallel.tensor import TOKENS


def recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, keeping only what it is given for the backward pass."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return result

    return run


def run_in_chunks(
    blocks: Sequence[nn.Module], x: Tensor, *args: Any, every: int, keep_input: Callable[..., Tensor], **kwargs: Any
) -> Tensor:
    """Run blocks one after the other, `every` of them at a time through keep_input."""
    for start in range(0, len(blocks), every):
        x = keep_input(blocks[start : start + every], x, *args, **kwargs)
    return x


def keep_cut_input(blocks: Sequence[nn.Module], x: Tensor, *args: Any, group: Group, **kwargs: Any) -> Tensor:
    """Run blocks, keeping only this tensor rank's share of their input; the backward pass gathers it again."""

    def gathered(x_part: Tensor, *args: Any) -> Tensor:
        return run_whole(blocks, gather_copies(x_part, TOKENS, group), *args, **kwargs)

    result: Tensor = recomputed(gathered)(scatter_copies(x, TOKENS, group), *args)
    return result


def recompute_blocks(model: nn.Module, granularity: str | None, *, every: int = 1, group: Group = None) -> None:
    """Let the model's blocks (full) or the cores of their attentions (selective) be computed again; in place.

    every: with full, consecutive blocks that share one kept input. group: with full, tensor ranks that share out the
    kept inputs, of which each would hold a copy (Megatron-LM's distributed checkpointed activations). A model, or
    each tower of it, has the seam run_blocks, its attentions the seam attend. Without gradients nothing is kept anyway.
    """
    if granularity == "full":
        keep = recomputed(run_whole) if size_of(group) == 1 else partial(keep_cut_input, group=group)
        for module in model.modules():
            if hasattr(module, "run_blocks"):
                module.run_blocks = partial(run_in_chunks, every=every, keep_input=keep)  # type: ignore[assignment]
    elif granularity == "selective":
        for module in model.modules():
            if isinstance(module, SelfAttention | CrossAttention):
                module.attend = recomputed(module.attend)


def compile_blocks(model: nn.Module, *, memory_budget: float | None) -> None:
    """Compile every block of the model by itself, in place; the first pass through each kind of block pays for it.

    memory_budget: the share of activations, 0 to 1, that the compiler may keep for the backward pass; what is cheapest
    to compute again it computes again (torch's activation_memory_budget). None keeps what it likes.
    """
    # Beside the user's other caches, so that a restart finds what was compiled; PyTorch's own place is the machine's
    # temporary folder. Read when the first block is compiled.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder(os.environ) / "compiled"))
    if memory_budget is not None:
        import torch._functorch.config as partitioning

        partitioning.activation_memory_budget = memory_budget
    for module in model.modules():
        if isinstance(module, SelfAttention | CrossAttention) and module.dropout > 0:
            # Said here and not where they are defined, for that alone would import the compiler, a second of start-up.
            # It takes minutes over the loop, and Inductor (torch 2.13, CPU) gets the words of a fused arange wrong.
            module.attend = torch.compiler.disable(module.attend)
            module.rows_of_heads = torch.compiler.disable(module.rows_of_heads)
    for module in model.modules():
        if isinstance(module, Block):
            module.compile()


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where Megalith keeps what can be made again: XDG_CACHE_HOME or ~/.cache."""
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megalith"
