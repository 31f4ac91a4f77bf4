"""What the compiler chooses otherwise for Megalith's blocks on GPUs. Importing it imports the compiler."""

from typing import Any

from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

# Features that a norm's kernel holds in registers; beyond them backward passes spill (8192 on an H100).
LONGEST_HELD = 4096


class KernelChoices(InductorChoices):
    """Rows of features are read once and kept, where Inductor reads those beyond 1024 in a loop, twice.

    Its loop takes the variance by Welford's formula, a division an element: a norm of GPT-2 XL, which reads and writes
    105 MB, took 86 us so on an H200 (docs/LOG.md). Other choices need another name of the class, by which alone the
    compiler's cache knows them (torch 2.11).
    """

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        """Whether a kernel holds all that it sums up."""
        is_of_rows = features.get_reduction_hint() == ReductionHint.INNER and not cooperative_reduction
        if is_of_rows and V.graph.sizevars.statically_known_leq(features.reduction_numel, LONGEST_HELD):
            return True
        return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)
