"""What is told of the steps that were taken: figures of the machine, the interval's line, timers and memory."""

import time
from pathlib import Path

from megalith.checkpoint.saver import Saved
from megalith.checkpoint.settings import CheckpointConfig
from megalith.job import Job
from megalith.monitor.events import CheckpointSaved, MemoryReported, RankMemory, StepDone, TimersReported, Warned
from megalith.monitor.memory import MemoryUse
from megalith.monitor.pace import SavePace
from megalith.monitor.profile import Profile
from megalith.monitor.timers import STEP_TIMERS
from megalith.monitor.troubles import SaveWasSlow
from megalith.ranks import Ranks

SHORTEST_RISK = 0.1  # hours; what takes less is done again without regret


def open_profile(job: Job) -> Profile | None:
    """What traces the steps that --profile names, on the rank that says what it saw."""
    monitor, save = job.run.monitor, job.run.checkpoint.save
    if not monitor.profile or not job.log.speaks:
        return None
    folder = Path(monitor.profile_dir) if monitor.profile_dir is not None else Path(str(save)) / "profile"
    first, last = monitor.profile_step_start, monitor.profile_step_end
    return Profile(folder, job.device, first=first, last=last, tell=job.log.line)


def report_interval(job: Job, last: StepDone) -> None:
    """Report the steps since the last report, which `last` ended: the line, then timers, then once the memory."""
    num_timed = job.interval.steps_here  # a resumed run timed those since its start alone
    done = job.interval.close(last, time.perf_counter())
    job.log.report(done)
    # Megatron-LM prints the memory with the first line whose learning rate is above 0: then a step has been taken.
    if not job.memory_reported and done.learning_rate > 0:
        job.memory_reported = True
        job.log.report(MemoryReported(last.step, memory_of_ranks(job, last.memory)))
    if not job.risk_told:
        job.risk_told = True
        text = expected_loss(job.run.checkpoint, job.last_step, done.seconds / done.num_steps)
        if text is not None:
            job.log.report(Warned(text))
    seconds = job.timers.elapsed(STEP_TIMERS)
    job.log.report(TimersReported(seconds, num_steps=num_timed, step=last.step))


def report_saved(job: Job, saved: Saved, pace: SavePace, *, stall: float | None) -> None:
    """Report a checkpoint that was written, and whether that took too long. stall: seconds that steps waited for it."""
    directory = str(job.run.checkpoint.save)
    job.log.report(CheckpointSaved(saved.step, directory, saved.seconds, stall is not None, stall))
    if saved.warning:
        job.log.report(Warned(saved.warning))
    if (slow := pace.judge(saved.seconds, saved.num_bytes)) is None:
        return
    speed = saved.num_bytes / saved.seconds
    cost = f"the steps waited {stall:.1f} s for it" if stall is not None else "no step was left to wait for it"
    text = f"the disk is slow: the checkpoint of step {saved.step} took {saved.seconds:.1f} s to write "
    text += f"({speed / 1e6:.2f} MB/s), {slow.ratio:.1f} times the {slow.usual:.1f} s of the {slow.num_before} before "
    text += f"it (their median); {cost}. See what else {directory} is busy with"
    job.log.report(SaveWasSlow(saved.step, saved.seconds, saved.num_bytes, speed, slow.ratio, stall, text))


def expected_loss(checkpoint: CheckpointConfig, num_steps: int, seconds: float) -> str | None:
    """What a kill costs a run of that many steps, of so many seconds each, that saves nothing before its end."""
    hours = num_steps * seconds / 3600
    if hours < SHORTEST_RISK or (checkpoint.save is not None and (checkpoint.save_interval or 0) <= num_steps):
        return None
    why, remedy = f"--save-interval = {checkpoint.save_interval} is longer", "Save more often"
    if checkpoint.save is None:
        why, remedy = "there is no --save", "Give --save DIR and --save-interval"
    return (
        f"a kill would cost {hours / 2:.1f} hours on average and up to {hours:.1f}: the run takes that long, and "
        f"{why}. {remedy}"
    )


def memory_of_ranks(job: Job, memory: MemoryUse | None) -> tuple[RankMemory, ...]:
    """What each rank of the first replica holds, as Megatron-LM prints it; every rank calls this.

    memory: this rank's, None where the system does not say.
    """
    layout = job.layout
    places = {axis: layout.place(axis) for axis in ("pipeline", "data", "context", "tensor")}
    figures = [0] * (5 * layout.pipeline * layout.tensor)
    if memory is not None and places["data"] == places["context"] == 0:
        first = 5 * (places["pipeline"] * layout.tensor + places["tensor"])
        held = (memory.allocated, memory.max_allocated, memory.reserved, memory.max_reserved)
        figures[first : first + 5] = [layout.rank, *held]
    figures = Ranks().largest(figures)
    of_ranks = [figures[first : first + 5] for first in range(0, len(figures), 5)]
    return tuple(RankMemory(rank, MemoryUse(*held)) for rank, *held in of_ranks if any(held))
