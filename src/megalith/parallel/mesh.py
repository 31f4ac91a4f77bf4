"""How many ranks there are, what each is for, and joining them.

Rank order is Megatron-LM's: tensor fastest, then data, then pipeline.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Layout:
    """How many ways the model is cut along each axis, and this rank's place."""

    world_size: int
    rank: int
    local_rank: int
    tensor: int
    pipeline: int

    @property
    def data(self) -> int:
        """Replicas of the model."""
        return self.world_size // (self.tensor * self.pipeline)

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor % self.data

    @property
    def pipeline_rank(self) -> int:
        return self.rank // (self.tensor * self.data)


def ranks_in(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, world size, local rank) that torchrun or SLURM announces in the environment; (0, 1, 0) without either."""
    for rank, world, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ):
        # A SLURM job step of one task is an interactive shell as likely as a job: it needs no process group.
        if rank in environment and world in environment:
            return int(environment[rank]), int(environment[world]), int(environment.get(local, "0"))
    return 0, 1, 0


def make_layout(environment: Mapping[str, str], *, tensor: int, pipeline: int) -> Layout:
    """This process's layout. The products were checked by check.py."""
    rank, world_size, local_rank = ranks_in(environment)
    return Layout(world_size, rank, local_rank, tensor, pipeline)


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device of this rank. wanted: auto, cpu or cuda.

    Raises ValueError if cuda is asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device = cuda: this machine has no usable CUDA device. Use --device cpu or auto.")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def join(layout: Layout, device: torch.device) -> None:
    """Join the process group: NCCL with GPUs, gloo without. A single process joins none."""
    if layout.world_size == 1 or dist.is_initialized():
        return
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "6000")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        rank=layout.rank,
        world_size=layout.world_size,
        device_id=device if device.type == "cuda" else None,
    )


def leave() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
