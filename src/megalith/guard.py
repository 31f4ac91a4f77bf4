"""What a run does when its numbers go wrong: steps that are left out, going back, replicas that differ, a slow rank.

Everything is decided from what all ranks have exchanged, so all ranks decide alike.
"""

import time
from pathlib import Path

from megalith.agreement import stretches
from megalith.checkpoint.directory import CheckpointError, StepDirectory, discard, list_checkpoints
from megalith.checkpoint.shards import DamagedError
from megalith.checkpoint.store import steps_together
from megalith.files import DISK
from megalith.job import Job
from megalith.keeper import Keeper
from megalith.monitor.events import CheckpointLoaded, LoadStarted, Warned
from megalith.monitor.pace import slow_ranks
from megalith.monitor.troubles import RankIsSlow, ReplicasCompared, Rewound, SpikeFound, StepLeftOut
from megalith.optim.clip import global_norm
from megalith.optim.finite import GRAD_NORM, Measured
from megalith.parallel.replicas import Difference, all_alike, differences, digests_held, folded
from megalith.ranks import Ranks, RanksError
from megalith.resume import load
from megalith.run_state import restore

# Why a run stops, and its exit status then.
TOO_MANY_BAD_STEPS, SPIKE, REPLICAS_DIFFER = "too many bad steps", "a spike", "replicas that differ"
COMPUTES_WRONGLY = "a rank that computes wrongly"
EXIT_STATUS = {TOO_MANY_BAD_STEPS: 80, SPIKE: 80, REPLICAS_DIFFER: 81, COMPUTES_WRONGLY: 81}

MOST_REWINDS = 3  # without a good step beyond what is passed over
MOST_NAMES = 3  # of tensors in a line


def leaves_out(job: Job, measured: Measured, *, batch_size: int) -> bool:
    """Whether the step's gradients must not change the weights; says why. Called before the loss scale is updated."""
    progress, config = job.progress, job.run.optimizer
    step = progress.step + 1
    watched = {name: value for name, value in measured.values.items() if "loss" in name or name == GRAD_NORM}
    is_bad = measured.is_bad(progress.loss_scale)
    spikes = [] if is_bad or measured.overflow else progress.spikes.find(watched)
    progress.spikes.keep(watched)
    if measured.overflow and not is_bad:
        return True
    skips = is_bad or (bool(spikes) and config.on_spike != "warn")
    progress.bad_steps.note(step, bad=skips)
    first = progress.consumed_train_samples
    of_step = tuple(range(first, first + batch_size))
    for spike in spikes:
        text = f"step {step}: {spike.name} {spike.value:.6g} is a spike, {spike.score:.1f} standard deviations above "
        text += f"the {spike.median:.6g} of the last steps; samples {ranges(of_step)}"
        job.log.report(SpikeFound(step, *spike, of_step, text))
    if skips:
        samples = (samples_not_finite(job) if is_bad else ()) or of_step
        found = f"{measured.told()} is not finite" if is_bad else " and ".join(spike.name for spike in spikes)
        in_a_row = progress.bad_steps.in_a_row
        text = f"step {step} is skipped: {found if is_bad else 'a spike in ' + found}; samples {ranges(samples)}"
        text += f"; bad steps in a row: {in_a_row} of at most {config.max_bad_steps}"
        job.log.report(StepLeftOut(step, found, samples, in_a_row, text))
        if spikes and config.on_spike == "stop":
            job.stop = SPIKE
        elif in_a_row > config.max_bad_steps or (is_bad and config.on_nan == "stop"):
            job.stop = TOO_MANY_BAD_STEPS
    return skips


def samples_not_finite(job: Job) -> tuple[int, ...]:
    """The samples, by their numbers in the run, of the microbatches of any rank whose losses are not finite."""
    found = Ranks().gather(job.seen.not_finite())
    return tuple(sorted({sample for microbatches in found for samples in microbatches for sample in samples}))


def ranges(numbers: tuple[int, ...]) -> str:
    """Sorted numbers as a person writes them: 3, 8-15."""
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in stretches(numbers))


def reason_to_give_up(job: Job, keeper: Keeper) -> str | None:
    """What is so wrong after this step that the run must stop; None if nothing is, or if it went back instead."""
    step, every = job.progress.step, job.run.parallel.check_replicas
    if job.stop == TOO_MANY_BAD_STEPS and job.run.optimizer.on_nan == "rewind" and rewind(job, keeper):
        job.stop = None
    elif job.stop is None and every is not None and step % every == 0 and not compare_replicas(job):
        job.stop = REPLICAS_DIFFER if job.run.parallel.on_replica_fault == "stop" else None
    return job.stop


def may_save(job: Job, reason: str | None) -> bool:
    """Whether a checkpoint of the weights as they are now is worth having.

    In a row of bad steps they have not changed, and may be what is bad: only a stop saves them, if they are finite.
    Where replicas differ, or a rank computes wrongly, nobody knows what is right.
    """
    if reason in (REPLICAS_DIFFER, COMPUTES_WRONGLY):
        return False
    return not job.progress.bad_steps.in_a_row or (reason is not None and weights_are_finite(job))


def weights_are_finite(job: Job) -> bool:
    """Whether no weight on any rank is infinite or NaN; waits for the device."""
    norm = global_norm(job.laid.weights(), device=job.device, reduce=job.laid.total)
    return bool(norm.isfinite())


def rewind(job: Job, keeper: Keeper) -> bool:
    """Go back to a checkpoint from before the row of bad steps, and pass over what is to blame; in place.

    False if there is none to go back to, or it has been tried too often. The checkpoints that lie ahead then are
    removed, once the one gone back to has been read: the run will write others of their steps.
    """
    progress, save = job.progress, job.run.checkpoint.save
    bad, left, ranks = progress.bad_steps, progress.step, Ranks()
    assert save is not None, "checked"
    if bad.rewinds >= MOST_REWINDS:
        job.log.report(Warned(f"went back {bad.rewinds} times and came no further than step {left}"))
        return False
    keeper.settle()
    try:
        listed = steps_together(ranks, save)
    except CheckpointError as error:
        job.log.report(Warned(str(error)))
        return False
    for step in sorted((step for step in listed if step < bad.turns_back_below()), reverse=True):
        try:
            go_back(job, step)
        except CheckpointError as error:
            job.log.report(Warned(str(error)))
            continue
        progress.bad_steps = bad.rewound(left, step)
        keeper.forget_saved()
        first = step + 1 if bad.rewinds else bad.first
        assert first is not None, "there is a row"
        text = (
            f"went back from step {left} to the checkpoint of step {step}; the samples of steps {first} to {left} are "
        )
        text += f"passed over from now on (rewind {progress.bad_steps.rewinds} of at most {MOST_REWINDS})"
        job.log.report(Rewound(step, left, first, left, text))
        remove_after(job, step)
        return True
    job.log.report(
        Warned(f"there is no checkpoint in {save} of fewer than {bad.turns_back_below()} steps to go back to")
    )
    return False


def go_back(job: Job, step: int) -> None:
    """Go on from an earlier checkpoint of this run, in the middle of it; in place.

    Raises CheckpointError if it is damaged or gone; then nothing has changed.
    """
    save, started = str(job.run.checkpoint.save), time.monotonic()
    job.log.report(LoadStarted(save, step))
    with job.ledger.spend("checkpoint"):
        loaded = load(job, Path(save), step=step, fresh=False, with_optimizer=True)
    restore(job, loaded, with_optimizer=True)
    job.validations = [(taken, means) for taken, means in job.validations if taken <= step]
    job.ledger.go_back(loaded.index.notes["ledger"])
    job.log.report(CheckpointLoaded(save, step, time.monotonic() - started, loaded.index.notes["megalith"]))


def remove_after(job: Job, step: int) -> None:
    """Remove the checkpoints of later steps; what cannot be removed is announced."""
    save, ranks = str(job.run.checkpoint.save), Ranks()

    def remove() -> None:
        later: list[StepDirectory] = []
        if ranks.rank == 0:
            later = [found for found in list_checkpoints(save) if found.step > step]
        for directory in reversed(later):
            try:
                discard(directory, disk=DISK)
            except DamagedError as error:
                raise ValueError(str(error)) from error

    try:
        ranks.together(remove)
    except RanksError as error:
        job.log.report(Warned(f"checkpoints after step {step} could not be removed: {error}"))


def compare_replicas(job: Job) -> bool:
    """Whether all ranks that hold the same weights and optimizer state hold the same bits; names those that do not."""
    began, ranks = time.perf_counter(), Ranks()
    digests = digests_held(job.laid, job.optimizer, job.layout, job.run.parallel)
    found: list[Difference] = []
    if not all_alike(ranks.gather(folded(digests))):
        found = differences(ranks.gather(digests))
    differing = tuple(sorted({rank for difference in found for rank in difference.ranks}))
    text = "; ".join(told(difference) for difference in found)
    seconds = time.perf_counter() - began
    job.log.report(ReplicasCompared(job.progress.step, seconds, differing, text))
    return not found


def told(difference: Difference) -> str:
    """A difference in words."""
    names = ", ".join(difference.names[:MOST_NAMES])
    more = len(difference.names) - MOST_NAMES
    what = names + (f" and {more} more" if more > 0 else "")
    ranks = ", ".join(map(str, difference.ranks))
    if difference.is_minority:
        word = "rank" if len(difference.ranks) == 1 else "ranks"
        return f"{word} {ranks} differ from most that hold the same: {what}"
    return f"ranks {ranks} should hold the same and differ, which is right cannot be told: {what}"


def report_slow_ranks(job: Job) -> None:
    """Name the ranks for which the others wait; asked where a log line is due, and every rank calls it."""
    layout, ratio = job.layout, job.run.monitor.slow_rank_ratio
    if layout.world_size == 1 or not ratio or (own := job.pace.median()) is None:
        return
    microseconds = [0] * layout.world_size
    microseconds[layout.rank] = max(1, round(own * 1e6))
    seconds = {rank: number / 1e6 for rank, number in enumerate(Ranks().largest(microseconds))}
    in_stage = layout.world_size // layout.pipeline
    stages = [range(first, first + in_stage) for first in range(0, layout.world_size, in_stage)]
    for slow in slow_ranks(seconds, stages, ratio=ratio):
        text = f"rank {slow.rank} is slow: it takes {slow.ratio:.2f} times as long for its part of a step as the others"
        job.log.report(RankIsSlow(job.progress.step, slow.rank, slow.ratio, text))
