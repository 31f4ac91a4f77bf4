"""Whether a model can lie in a rank's memory at all, seen before anything of it is built."""

import os

import torch

from megalith.config import Run
from megalith.parallel.mesh import Layout
from megalith.plan.machine import GIB
from megalith.plan.memory import predict
from megalith.planned import planned

SMALLEST_VOCABULARY = 1  # rows: what lies here of a table at least is not known before the tokenizer


def refuse_what_cannot_fit(run: Run, layout: Layout, device: torch.device) -> None:
    """Raise ValueError if weights, gradients and moments of a checked GPT alone are more than the memory there is."""
    if run.task != "gpt" or run.train.exit_before_training:
        return
    job = planned(run, layout.world_size, vocab_size=max(SMALLEST_VOCABULARY, layout.tensor), device=device.type)
    needed, there = predict(job).states, memory_of(device)
    if there is not None and needed > there:
        size = f"--num-layers = {run.model.num_layers}, --hidden-size = {run.model.hidden_size}"
        raise ValueError(
            f"{size}: weights, gradients and the optimizer of a rank take {needed / GIB:,.0f} GiB, and there are "
            f"{there / GIB:,.0f}. Make the model smaller, or share it out over more ranks (megalith plan)."
        )


def memory_of(device: torch.device) -> int | None:
    """Bytes that a device has, or this machine; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
