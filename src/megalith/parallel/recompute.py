"""Recomputation: the backward pass computes activations again instead of keeping them (Chen et al. 2016, 1604.06174).

Dropout masks are functions of counters, so computing twice needs no generator's state.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalith.layers.attend import attend, is_fused
from megalith.layers.attention import CrossAttention, SelfAttention
from megalith.layers.block import Block
from megalith.layers.relative import RelativePositions
from megalith.models.transformer import run_whole
from megalith.parallel import sequence
from megalith.parallel.again import compute_again
from megalith.parallel.collectives import Group, size_of


def recomputed(function: Callable[..., Tensor], *, compiled: bool) -> Callable[..., Tensor]:
    """The function, keeping only what it is given for the backward pass. compiled: whether the compiler takes part."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Tensor:
        if not compiled:
            return compute_again(function, args, kwargs)
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


def keep_cut_input(
    blocks: Sequence[nn.Module], x: Tensor, *args: Any, group: Group, compiled: bool, **kwargs: Any
) -> Tensor:
    """Run blocks, keeping only this tensor rank's share of their input; the backward pass gathers it again."""

    def gathered(x_part: Tensor, *args: Any) -> Tensor:
        return run_whole(blocks, sequence.join(x_part, group), *args, **kwargs)

    return recomputed(gathered, compiled=compiled)(sequence.cut(x, group), *args)


def recompute_blocks(
    model: nn.Module, granularity: str | None, *, every: int = 1, group: Group = None, compiled: bool = False
) -> None:
    """Let the model's blocks (full) or the cores of their attentions (selective) be computed again; in place.

    every: with full, consecutive blocks that share one kept input. group: with full, tensor ranks that share out the
    kept inputs, of which each would hold a copy (Megatron-LM's distributed checkpointed activations). compiled: whether
    blocks are. A model, or each tower of it, has the seam run_blocks, its attentions the seam attend. Without gradients
    nothing is kept anyway.
    """
    if granularity == "full":
        keep = (
            recomputed(run_whole, compiled=compiled)
            if size_of(group) == 1
            else partial(keep_cut_input, group=group, compiled=compiled)
        )
        for module in model.modules():
            if hasattr(module, "run_blocks"):
                module.run_blocks = partial(run_in_chunks, every=every, keep_input=keep)  # type: ignore[assignment]
    elif granularity == "selective":
        for module in model.modules():
            if isinstance(module, SelfAttention | CrossAttention):
                module.attend = recomputed(module.attend, compiled=compiled)


def recomputes_inside(model: nn.Module, granularity: str | None, *, device: torch.device) -> bool:
    """Whether compiled blocks can be computed again as a part of their compiled backward passes.

    There only what is needed is computed again, so not the last product of a block. Not where something in a block is
    left alone by the compiler.
    """
    return granularity == "full" and not any(_left_alone(model, device=device))


def compile_blocks(
    model: nn.Module,
    *,
    memory_budget: float | None,
    device: torch.device,
    recompute_inside: bool = False,
    keep_order: bool = False,
) -> None:
    """Compile every block of the model by itself, in place; the first pass through each kind of block pays for it.

    memory_budget: the share of activations, 0 to 1, that the compiler may keep for the backward pass; what is cheapest
    to compute again it computes again (torch's activation_memory_budget). None keeps what it likes. device: where the
    model is to run. recompute_inside: only a block's input is kept, see `recomputes_inside`. keep_order: what was
    started between products stays there, where the compiler else goes by memory alone.
    """
    # Beside the user's other caches, so that a restart finds what was compiled; PyTorch's own place is the machine's
    # temporary folder. Read when the first block is compiled.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder(os.environ) / "compiled"))
    import torch._functorch.config as partitioning

    # A budget of nothing is what recomputation is. checkpoint() inside of a block would not reach what our own autograd
    # functions save.
    budget = 0.0 if recompute_inside else memory_budget
    partitioning.activation_memory_budget = 1.0 if budget is None else budget  # 1 is torch's own
    import torch._inductor.config as inductor

    inductor.reorder_for_peak_memory = not keep_order
    if device.type == "cuda":
        # Dropout's hash is more operations than Inductor lets stand together: its words would go through memory.
        inductor.realize_opcount_threshold = 400
        from megalith.parallel.kernel_choices import KernelChoices

        inductor.inductor_choices_class = KernelChoices
    for attention in _left_alone(model, device=device):
        # Said here and not where they are defined, for that alone would import the compiler, a second of start-up.
        # It takes minutes over the loop, and Inductor (torch 2.13, CPU) gets the words of a fused arange wrong.
        attention.attend = torch.compiler.disable(attention.attend)
        attention.rows_of_heads = torch.compiler.disable(attention.rows_of_heads)
    for module in model.modules():
        if isinstance(module, Block):
            module.put_words_on(device)
            module.compile()


def _left_alone(model: nn.Module, *, device: torch.device) -> Iterator[SelfAttention | CrossAttention]:
    """The attentions that the compiler cannot take in: those with dropout, but for what is one operator on a GPU."""
    is_biased = any(isinstance(module, RelativePositions) for module in model.modules())
    for module in model.modules():
        if isinstance(module, SelfAttention | CrossAttention) and module.dropout > 0:
            is_plain = inspect.unwrap(module.attend) is attend
            if not (is_plain and is_fused(module.head_width, device, biased=is_biased)):
                yield module


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where Megalith keeps what can be made again: XDG_CACHE_HOME or ~/.cache."""
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megalith"
