"""The losses of single microbatches, which a step's sum hides: kept until it is known whether one was not finite."""

import torch
from torch import Tensor, nn

from megalith.parallel.journal import JOURNAL
from megalith.parallel.step import Batch, RunPart


class SeenLosses:
    """Runs a part of the model, and remembers what each microbatch of the step lost; nothing waits for the device."""

    def __init__(self, run_part: RunPart) -> None:
        self._run_part = run_part
        self._seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, part: nn.Module, entering: Tensor, batch: Batch) -> Tensor:
        leaving = self._run_part(part, entering, batch)
        # The stream has more dimensions. In evaluations nothing is to be found.
        if leaving.dim() == 1 and torch.is_grad_enabled():
            JOURNAL.made(leaving, "the losses")
            self._seen.append((batch["samples"], leaving.detach().clone()))
        return leaving

    def clear(self) -> None:
        """Forget the step before."""
        self._seen = []

    def not_finite(self) -> list[list[int]]:
        """The samples, by their numbers in the run, of each microbatch here whose loss is infinite or NaN."""
        return [samples.tolist() for samples, losses in self._seen if not bool(losses.isfinite().all())]
