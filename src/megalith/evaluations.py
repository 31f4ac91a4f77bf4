"""The evaluations of a run while it trains and at its end, none of which a stop loses.

A signal cuts an evaluation short, for the grace of a scheduler may be shorter. What is cut short, or was due at a step
after which the run stopped, is owed: the checkpoint says so, and the run makes it when it goes on.
"""

import signal
import time
from typing import NamedTuple

import torch

from megalith.job import Job
from megalith.monitor import lines
from megalith.monitor.events import Evaluated
from megalith.monitor.signals import StopSignals
from megalith.passes import run_microbatches
from megalith.ranks import Ranks


class Owed(NamedTuple):
    """An evaluation that a run has to make. then: what it owes after it."""

    part: str
    final: bool
    then: str | None


# By the names that Progress.owes has for them.
OWED = {
    "interval": Owed("valid", final=False, then=None),
    "final": Owed("valid", final=True, then="test"),
    "test": Owed("test", final=True, then=None),
}


def evaluate_if_owed(job: Job, signals: StopSignals) -> str | None:
    """Make the next evaluation that is owed, if any; the name of the signal that cut it short, or None."""
    progress = job.progress
    if progress.owes is None:
        return None
    owed = OWED[progress.owes]
    with signals.doing(f"the run cuts this evaluation short{', saves' if _has_more_to_save(job) else ''} and ends"):
        cut = evaluate(job, owed.part, signals, final=owed.final)
    if cut is None:
        progress.owes = owed.then
    return cut


def _has_more_to_save(job: Job) -> bool:
    """Whether steps were taken since the run started or went on, and it keeps them."""
    return job.run.checkpoint.save is not None and job.progress.step != job.first_step


def evaluate(job: Job, part: str, signals: StopSignals, *, final: bool) -> str | None:
    """Report the mean losses over the next eval_iters batches of a part, if the run has such data.

    A task that validates all begins each time with the first sample, ends with the last, and weights batches by their
    samples.

    None once that is done. Gives the name of a signal, the same on every rank, if one came first: then nothing is
    reported, and nothing has changed.
    """
    if part not in job.loaders or not job.run.evaluate.eval_iters:
        return None
    progress, sums = job.progress, dict[str, float]()
    began = time.perf_counter()
    loader, iterations = job.loaders[part], job.run.evaluate.eval_iters
    size = job.batch_sizes.batch_size(progress.consumed_train_samples)
    consumed = progress.consumed_valid_samples if part == "valid" else 0
    if validates_all := job.task.validates_all:
        # Not a ramp's size of the moment: all validations are of the same samples.
        size, consumed = job.batch_sizes.global_batch_size, 0
        iterations = min(iterations, -(-len(loader.source) // size))
    num_microbatches = size // (loader.micro_batch_size * loader.data_parallel)
    whole_batches = 0.0
    with job.ledger.spend("evaluation"), torch.no_grad():
        for number in range(1, iterations + 1):
            if cut := signal_agreed(job, signals):
                return cut
            job.ledger.move()
            microbatches = loader.step_batch(consumed, num_microbatches)
            losses = run_microbatches(job, microbatches, scale=1.0, backward=False, timers=job.untimed)
            filled = min(1.0, (len(loader.source) - consumed) / size) if validates_all else 1.0
            whole_batches += filled
            consumed += size
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + float(loss) * filled
            if part == "test" and number % job.run.monitor.log_interval == 0:
                job.log.line(lines.evaluating(number, iterations), detail=True)
    if part == "valid" and not validates_all:
        progress.consumed_valid_samples = consumed
    means = {name: total / whole_batches for name, total in sums.items()}
    if part == "valid":
        job.validations.append((progress.step, means))
    split = "validation" if part == "valid" else part
    seconds = time.perf_counter() - began
    job.log.report(Evaluated(progress.step, progress.consumed_train_samples, split, final, means, seconds))
    return None


def signal_agreed(job: Job, signals: StopSignals) -> str | None:
    """The name of a signal that any rank got; every rank calls it."""
    number = Ranks().largest([int(signals.received or 0)])[0]
    return signal.Signals(number).name if number else None


def is_finished(job: Job) -> bool:
    """Whether a run that has taken its last step has made its last evaluations too, the same on every rank."""
    if job.progress.owes is None:
        return True
    finished = job.book.finished_step() if job.book is not None else None
    return Ranks().largest([0 if finished is None else finished])[0] == job.progress.step
