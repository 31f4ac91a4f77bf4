"""What PyTorch imports at first use, imported once in the process that ranks are forked from: it takes seconds."""

import importlib

import torch

for name in (
    "torch._dynamo",
    "torch._refs",
    "torch._decomp",
    "torch._prims_common",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining.schedules",
    "torch.distributed.tensor",
    "torch.utils.checkpoint",
    "torch.utils.tensorboard",
    "megalith.parallel.pipeline",
    "megalith.parallel.shard",
):
    importlib.import_module(name)
# The first allocation of a module's tensors imports what decomposes operations.
torch.nn.Linear(1, 1, device="meta").to_empty(device="cpu")
