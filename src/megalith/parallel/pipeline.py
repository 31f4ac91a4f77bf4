"""Pipeline parallelism: stages on different ranks, run by the schedules of torch.distributed.pipelining.

Each rank holds one part of the model, or several with an interleaved schedule. Streams travel forward and their
gradients back; what belongs to a batch besides (positions, masks, labels) every rank has read by itself.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    _PipelineSchedule,
)

from megalith.parallel.collectives import Group, all_reduce
from megalith.parallel.journal import JOURNAL
from megalith.parallel.reduce import Reduction
from megalith.parallel.step import Batch, RunPart, Timers

# By name: the class, and whether it takes several parts of a rank.
SCHEDULES: dict[str, tuple[type[Any], bool]] = {
    "gpipe": (ScheduleGPipe, False),
    "1f1b": (Schedule1F1B, False),
    "interleaved": (ScheduleInterleaved1F1B, True),
    "zero-bubble": (ScheduleInterleavedZeroBubble, True),
}


class _Part(nn.Module):
    """A part of the model as a stage sees it: one tensor in, the entries of the batch beside it, one tensor out."""

    def __init__(self, part: nn.Module, run_part: RunPart, *, is_first: bool) -> None:
        super().__init__()
        self._is_first = is_first
        self.part = part
        self._run_part = run_part
        if any(hasattr(parameter, "device_mesh") for parameter in part.parameters()):
            from megalith.parallel.shard import become_root

            become_root(self, part)

    def forward(self, entering: Tensor, **batch: Tensor) -> Tensor:
        entering = entering if self._is_first else JOURNAL.entering(entering)
        leaving = self._run_part(self.part, entering, batch)
        # Losses may be a view, to which FSDP2 cannot fix what it has to do before the backward pass.
        # What is sent must lie in memory in order.
        if leaving.dim() == 1:
            return leaving.clone()
        leaving = leaving.contiguous()
        JOURNAL.leaving(leaving)
        return leaving


class _SplitStage(PipelineStage):
    """A stage whose backward pass by the weights comes later than that by the inputs.

    Before torch 2.13 the first takes the graph from the outputs away, and with it the nodes of our own functions, which
    the second needs: they live as long as what points at them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: dict[int, list[GradientEdge]] = {}

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        leaving = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        tensors = leaving if isinstance(leaving, tuple) else (leaving,)
        self._held[fwd_chunk_id] = [get_gradient_edge(tensor) for tensor in tensors if tensor.requires_grad]
        return leaving

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)
        self._held.pop(bwd_chunk_id, None)


class Pipeline:
    """The engine of a model that is cut into stages.

    parts: those held here, by number; num_parts: of the whole model. stream_shape: of what travels for a microbatch of
    one sample, without the batch dimension. entering: the entry of a batch that enters the first part. sums_over: the
    groups over which losses add up, replicas and stages.
    """

    def __init__(
        self,
        parts: Mapping[int, nn.Module],
        run_part: RunPart,
        *,
        num_parts: int,
        schedule: str,
        group: ProcessGroup,
        device: torch.device,
        stream_shape: tuple[int, ...],
        stream_dtype: torch.dtype,
        reduction: Reduction,
        num_losses: int,
        sums_over: Sequence[Group],
        entering: str = "tokens",
    ) -> None:
        self._parts = {number: _Part(part, run_part, is_first=number == 0) for number, part in sorted(parts.items())}
        self._num_parts = num_parts
        self._schedule = schedule
        self._group = group
        self._device = device
        self._stream_shape = stream_shape
        self._stream_dtype = stream_dtype
        self._reduction = reduction
        self._num_losses = num_losses
        self._sums_over = sums_over
        self._entering = entering
        self._made: dict[bool, tuple[tuple[int, int], _PipelineSchedule]] = {}
        self._losses: list[Tensor] = []

    def run(self, microbatches: Sequence[Batch], *, backward: bool, timers: Timers) -> Tensor:
        schedule = self._schedule_for(len(microbatches), microbatches[0][self._entering], backward)
        batch: dict[str, Any] = {n: torch.cat([micro[n] for micro in microbatches]) for n in microbatches[0]}
        entering = [batch[self._entering]] if 0 in self._parts else []
        # Every stage is given the target, since torch splits it along with the rest; only the last looks at it.
        target = batch[self._entering] if self._num_parts - 1 in self._parts else None
        self._losses = []
        if backward:
            self._reduction.before_last_backward(len(microbatches))
            with timers("forward-backward"):
                schedule.step(*entering, target=target, return_outputs=False, **batch)
            self._reduction.after_last_backward()
        else:
            schedule.eval(*entering, target=target, **batch)
        # One after the other, as one rank adds them up.
        sums = reduce(torch.add, self._losses, torch.zeros(self._num_losses, device=self._device))
        for group in self._sums_over:
            sums = all_reduce(sums, group)
        return sums

    def _note_losses(self, losses: Tensor, target: Tensor) -> Tensor:
        self._losses.append(losses.detach())
        return losses.sum()

    def _schedule_for(self, num_microbatches: int, entering: Tensor, backward: bool) -> _PipelineSchedule:
        """The schedule for that many such microbatches, with or without a backward pass.

        Stages keep a buffer for each microbatch, so of either kind only that of the last batch is kept.
        """
        asked = (num_microbatches, entering.shape[0])
        if backward not in self._made or self._made[backward][0] != asked:
            self._made.pop(backward, None)  # before there are others
            stages = [self._stage(number, part, entering, backward) for number, part in self._parts.items()]
            kind, takes_several = SCHEDULES[self._schedule]
            schedule = kind(
                stages if takes_several else stages[0],
                n_microbatches=num_microbatches,
                loss_fn=self._note_losses,
                scale_grads=False,
            )
            self._made[backward] = asked, schedule
        return self._made[backward][1]

    def _stage(self, number: int, part: nn.Module, entering: Tensor, backward: bool) -> PipelineStage:
        size = entering.shape[0]
        stream = torch.empty(size, *self._stream_shape, dtype=self._stream_dtype, device="meta", requires_grad=backward)
        losses = torch.empty(self._num_losses, device="meta", requires_grad=backward)
        kind = _SplitStage if backward and self._schedule == "zero-bubble" else PipelineStage
        return kind(
            part,
            number,
            self._num_parts,
            self._device,
            input_args=entering.to("meta") if number == 0 else stream,
            output_args=losses if number == self._num_parts - 1 else stream,
            group=self._group,
        )
