"""Whether a run's blocks are compiled: by its settings, its length and the device, so that a restart decides alike.

Compiled blocks round differently, so the decision counts all steps of the run and not those that are left.
"""

from typing import NamedTuple

from megalith.config import Run

# What compiling each block saves of a step on a GPU: torchtitan's Llama 3 8B runs 15.7 % faster so. On two CPUs it
# saved at most 5 %, and often nothing (docs/LOG.md).
SAVED_ON_GPU = 0.136
# Seconds until blocks forward and backward are compiled, twice that must be saved.
COMPILING = 60.0
# Without compiling, and of a device that has no data sheet here: operations per second.
USUAL_UTILIZATION = 0.4
USUAL_PEAK = 150e12


class Decision(NamedTuple):
    compiles: bool
    why: str | None  # to be said; None where nobody asked


def decide(run: Run, *, device_type: str, peak_flops: float | None, step_flops: float, num_steps: int) -> Decision:
    """peak_flops: per second of one device, if known; step_flops: operations of one device in a step."""
    parallel = run.parallel
    if parallel.compile == "on":
        return Decision(True, None)
    if parallel.compile == "off":
        return Decision(False, None)
    if device_type == "cpu":
        return _no("on a CPU it saves less than it costs")
    if parallel.pipeline_schedule == "zero-bubble":
        return _no("a compiled block cannot split its backward pass, as zero-bubble wants")
    seconds = num_steps * step_flops / (USUAL_UTILIZATION * (peak_flops or USUAL_PEAK))
    saved = SAVED_ON_GPU * seconds
    length = f"about {seconds / 60:,.0f} minutes of steps, of which it would save {saved / 60:,.1f}"
    if saved < 2 * COMPILING:
        return _no(f"{length} and cost {COMPILING / 60:.0f}")
    return Decision(True, f"blocks are compiled (--compile auto): {length}; the first step waits about a minute.")


def _no(why: str) -> Decision:
    return Decision(False, f"blocks are not compiled (--compile auto): {why}.")
