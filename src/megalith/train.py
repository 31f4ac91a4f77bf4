"""The run from start to end, in the order in which it happens.

Everything that changes from step to step is in `Progress`, the weights and the optimizer's state; the rest of a job is
fixed once it is built (job.py). So a checkpoint is these three, and a resumed run goes on bit for bit.
"""

import os
import signal
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import SupportsFloat

from torch import Tensor

from megalith.agreement import require_same_settings
from megalith.allocator import keep_freed_memory
from megalith.closing import flags_of_a_longer_run, tell_what_next
from megalith.config import Run
from megalith.corpora import prepare_corpus
from megalith.derived import collective_timeout
from megalith.evaluations import evaluate_if_owed, is_finished
from megalith.guard import EXIT_STATUS, leaves_out, may_save, reason_to_give_up, report_slow_ranks
from megalith.job import Job, build_job, open_log, told_length
from megalith.keeper import Keeper, has_checkpoint, keep_what_is_trained, try_save_directory
from megalith.launch import speaks_for_all
from megalith.loaders import open_data
from megalith.monitor.events import PlaceReached, RunEnded, StepDone, TrainingStarted, Warned
from megalith.monitor.log import RunLog
from megalith.monitor.memory import memory_use
from megalith.monitor.profile import Profile
from megalith.monitor.signals import StopSignals, stopped_status
from megalith.optim.clip import clip_gradients, count_zeros, global_norm, is_clipped, unscale_gradients
from megalith.optim.finite import GRAD_NORM, measure
from megalith.optim.groups import set_learning_rate
from megalith.optim.schedule import learning_rate
from megalith.owner import owned
from megalith.parallel.mesh import choose_device, joined, make_layout
from megalith.passes import take_passes
from megalith.ranks import Ranks
from megalith.recheck import is_due, take_checked_passes, tell_what_is_compared
from megalith.report import open_profile, report_interval
from megalith.resume import resume
from megalith.room import refuse_what_cannot_fit
from megalith.threads import leave_threads_of_parent
from megalith.watching import Places, open_watch

# Exit status beside 0 (done, or stopped where --exit-interval or --exit-duration-in-mins said) and those of guard.py
# and monitor/signals.py.
NOT_SAVED = 74  # the last checkpoint could not be written


def train(run: Run, *, started: float) -> int:
    """Run a training to its end, or to where it is told to stop; return the exit status.

    started: when the program began, by time.monotonic. Raises ValueError for what is found unfit before the first step.
    """
    layout = make_layout(
        os.environ,
        tensor=run.parallel.tensor_model_parallel_size,
        pipeline=run.parallel.pipeline_model_parallel_size,
        context=run.parallel.context_parallel_size,
    )
    inherited, stopped = leave_threads_of_parent(), stopped_status(saves=run.checkpoint.save is not None)
    with ExitStack() as stack:
        device = choose_device(run.parallel.device, layout.local_rank)
        refuse_what_cannot_fit(run, layout, device)
        if device.type == "cpu":
            keep_freed_memory()
        meeting = joined(layout, device, join_timeout=run.parallel.join_timeout, timeout=collective_timeout(run))
        company = stack.enter_context(meeting)
        watch = stack.enter_context(open_watch(run, layout, company))
        require_same_settings(run)
        lease = stack.enter_context(owned(run, layout))
        try_save_directory(run, layout)
        log = stack.enter_context(open_log(run, layout))
        if inherited:
            log.report(Warned(f"this process was forked: it computes with 1 thread, not {inherited}; spawn keeps all"))
        signals = stack.enter_context(
            StopSignals("the run ends before its first step", speaks=speaks_for_all(layout.rank))
        )
        asked, run = run, prepare_corpus(run, layout, log)
        if was_stopped(signals, log):
            return stopped
        job = build_job(run, layout, device, log, started=started)
        watch.follow(Places(job))
        if was_stopped(signals, log):
            return stopped
        keeper = stack.enter_context(Keeper(job, lease))
        with job.timers("model-and-optimizer-setup"):
            resume(job)
        if was_stopped(signals, log):
            return stopped
        log.report(PlaceReached("after model, optimizer, and learning rate scheduler are built"))
        open_data(job)
        tell_what_is_compared(job)
        if run.train.exit_before_training:
            log.line(f"nothing was trained: --exit-before-training ({run.task}, {job.last_step} steps)")
            return 0
        if layout.rank == 0:
            keep_what_is_trained(asked, job.tokenizer)
        if is_over(job):
            log.line(said_of_finished(job))
            return 0
        keeper.look_for_room()
        # From here on a signal lets a step be done; one that came before does not.
        signals.effect = f"the run finishes its step{', saves' if run.checkpoint.save is not None else ''} and ends"
        if was_stopped(signals, log):
            return stopped
        reason = run_steps(job, keeper, signals)
        if reason is None:
            reason = finish(job, keeper, signals)
        keeper.settle(is_last=True)
        log.report(
            RunEnded(
                step=job.progress.step,
                reason=reason or "done",
                minutes=(time.monotonic() - started) / 60,
                spent=job.ledger.seconds(),
            )
        )
        tell_what_next(job, reason, saved=has_checkpoint(run))
        if job.book is not None:
            finished = job.progress.step if reason is None else None
            job.book.write(job.ledger, ended=reason is None or reason.startswith("exit-"), finished=finished)
    if keeper.failed or reason == "save-failure":
        return NOT_SAVED
    if reason is None or reason.startswith("exit-"):
        return 0
    if reason in EXIT_STATUS:
        return EXIT_STATUS[reason]
    return stopped


def is_over(job: Job) -> bool:
    """Whether nothing is left to do, not even to save what was loaded from elsewhere, the same on every rank."""
    if job.progress.step < job.last_step or not is_finished(job):
        return False
    return job.run.checkpoint.save is None or has_checkpoint(job.run)


def said_of_finished(job: Job) -> str:
    """Why there is nothing to do, and what goes on: all steps were taken, or more than the run is asked to have now."""
    step = job.progress.step
    more = f"{flags_of_a_longer_run(job)} goes on"
    if step == job.last_step:
        taken = "the one step was" if step == 1 else f"all {step} steps were"
        return f"the run is finished: {taken} taken; {more}"
    below = f"{told_length(job)} lies below step {step}, of which the newest checkpoint is"
    return f"nothing is trained: {below}, and its weights stay; {more}"


def was_stopped(signals: StopSignals, log: RunLog) -> bool:
    """Whether any rank got a signal while the run was being started; said. Every rank calls it."""
    number: int = max(Ranks().gather(int(signals.received or 0)))
    if number:
        log.line(f"stopped by {signal.Signals(number).name} before the first step")
    return bool(number)


def run_steps(job: Job, keeper: Keeper, signals: StopSignals) -> str | None:
    """Take steps until the last one is done (None), or until something asks to stop (its name)."""
    run, progress, log = job.run, job.progress, job.log
    log.report(
        TrainingStarted(
            step=progress.step,
            last_step=job.last_step,
            consumed_samples=progress.consumed_train_samples,
            num_devices=job.layout.world_size,
            peak_flops=job.interval.peak_flops,
        )
    )
    log.report(PlaceReached("before the start of training step"))
    if progress.step == 0 and run.evaluate.eval_first:
        progress.owes = "interval"
    job.ledger.switch("other")
    job.first_step = progress.step
    if progress.owes != "interval" and progress.step < job.last_step:
        progress.owes = None  # it was the end of a run that goes on now
    profile = open_profile(job)
    reason = _run_on(job, keeper, signals, profile)
    if profile is not None:
        profile.close()
    return reason


def _run_on(job: Job, keeper: Keeper, signals: StopSignals, profile: Profile | None) -> str | None:
    """The steps of `run_steps`."""
    run, progress = job.run, job.progress
    while progress.step < job.last_step:
        if cut := evaluate_if_owed(job, signals):
            return cut
        if profile is not None:
            profile.before_step(progress.step + 1)
        take_told_step(job, keeper)
        if profile is not None:
            profile.after_step(progress.step)
        if every(progress.step, run.evaluate.eval_interval):
            progress.owes = "interval"
        if job.stop is None and not evaluate_if_owed(job, signals) and progress.step == job.last_step:
            progress.owes = "final"
        reason = reason_to_give_up(job, keeper) or reason_to_stop(job, signals, keeper)
        if (reason or every(progress.step, run.checkpoint.save_interval)) and may_save(job, reason):
            keeper.save()
        if reason:
            return reason
    return None


def take_told_step(job: Job, keeper: Keeper) -> StepDone:
    """Take a step and do what follows each: log it, look after the checkpoint being written, print the line if due."""
    with job.ledger.spend("step"):
        done = take_step(job, keeper)
    job.log.report(done)
    keeper.poll()
    if job.book is not None:
        job.book.write_if_due(job.ledger)
    job.interval.add(done)
    if every(job.progress.step, job.run.monitor.log_interval):
        report_interval(job, done)
        report_slow_ranks(job)
    return done


def every(step: int, interval: int | None) -> bool:
    """Whether something is due at this step."""
    return interval is not None and step % interval == 0


@dataclass(frozen=True)
class Update:
    """What became of a step: its losses, and whether its gradients have changed the weights."""

    losses: Mapping[str, SupportsFloat]
    skipped: bool
    grad_norm: float | None = None
    num_zeros: Tensor | None = None


def take_step(job: Job, keeper: Keeper) -> StepDone:
    """One optimizer step: microbatches forward and backward, one reduction, one update or none."""
    began = time.perf_counter()
    progress, timers = job.progress, job.timers
    batch_size = job.batch_sizes.batch_size(progress.consumed_train_samples)
    if progress.bad_steps.passes_over(progress.step + 1):
        return step_done(job, Update({}, skipped=True), batch_size, began=began, num_computed=0)
    job.pace.begin()
    job.seen.clear()
    num_microbatches = job.batch_sizes.num_microbatches(progress.consumed_train_samples)
    with timers("batch-generator"), job.ledger.spend("data"), job.pace.own():
        microbatches = job.loaders["train"].step_batch(progress.consumed_train_samples, num_microbatches)

    scale = 1.0 if progress.loss_scale is None else progress.loss_scale.scale
    take = take_checked_passes if is_due(job) else take_passes
    losses = take(job, microbatches, scale=scale)
    if losses is None:
        return step_done(job, Update({}, skipped=True), batch_size, began=began, num_computed=batch_size)
    with timers("optimizer"):
        update = update_weights(job, keeper, losses, scale=scale, batch_size=batch_size)
    return step_done(job, update, batch_size, began=began, num_computed=batch_size)


def step_done(job: Job, update: Update, batch_size: int, *, began: float, num_computed: int) -> StepDone:
    """Count the step, in place, and give what is to be said of it. num_computed: samples, of batch_size drawn."""
    progress, run = job.progress, job.run
    progress.step += 1
    progress.consumed_train_samples += batch_size
    progress.skipped_steps += update.skipped
    if not update.skipped:
        progress.schedule_samples += batch_size
    causal = job.task.causal_flops
    return StepDone(
        step=progress.step,
        consumed_samples=progress.consumed_train_samples,
        num_tokens=num_computed * job.task.num_places(run),
        seconds=time.perf_counter() - began,
        losses=update.losses,
        learning_rate=learning_rate(progress.schedule_samples, job.schedule),
        global_batch_size=batch_size,
        loss_scale=1.0 if progress.loss_scale is None else progress.loss_scale.scale,
        skipped=update.skipped,
        grad_norm=update.grad_norm,
        num_zeros=update.num_zeros,
        params_norm=weights_norm(job) if run.monitor.log_params_norm else None,
        model_flops=job.task.step_flops(run, job.vocab_size, num_computed),
        causal_flops=None if causal is None else causal(run, job.vocab_size, num_computed),
        memory=memory_use(job.device) if _shows_memory(run, progress.step) else None,
    )


def _shows_memory(run: Run, step: int) -> bool:
    monitor = run.monitor
    in_tensorboard = monitor.log_memory_to_tensorboard and every(step, monitor.tensorboard_log_interval)
    return every(step, monitor.log_interval) or in_tensorboard


def update_weights(job: Job, keeper: Keeper, losses: Mapping[str, Tensor], *, scale: float, batch_size: int) -> Update:
    """See with all ranks whether the numbers are sound, unscale, clip and update, or skip the step; in place."""
    progress, config, timers = job.progress, job.run.optimizer, job.timers
    counted, copies = job.laid.gradients(counted=True), job.laid.gradients(counted=False)
    norm = None
    with timers("optimizer-unscale-and-check-inf"):
        if config.clip_grad > 0:
            # One pass for both: where a gradient is not finite, the norm is not either.
            norm = global_norm(counted, device=job.device, reduce=job.laid.total) / scale
            overflow = (~(norm + global_norm(copies, device=job.device)).isfinite()).float()
        else:
            overflow = unscale_gradients([*counted, *copies], scale)
        # The only place at which a step waits for the device.
        measured = measure(losses, overflow, norm, reduce=job.laid.largest)
    skipped = leaves_out(job, measured, batch_size=batch_size)
    if progress.loss_scale is not None:
        progress.loss_scale = progress.loss_scale.updated(measured.overflow)
    known = {name: measured.values.get(name, loss) for name, loss in losses.items()}
    if skipped:
        return Update(known, skipped=True)
    grad_norm = measured.values.get(GRAD_NORM)
    if norm is not None and grad_norm is not None and (scale != 1 or is_clipped(grad_norm, config.clip_grad)):
        with timers("optimizer-clip-main-grad"):
            clip_gradients([*counted, *copies], norm, config.clip_grad, scale=scale)
    zeros = None
    if job.run.monitor.log_num_zeros_in_grad:
        zeros = count_zeros(counted, device=job.device, reduce=job.laid.total)
    keeper.before_update()
    set_learning_rate(job.optimizer, learning_rate(progress.schedule_samples, job.schedule))
    job.optimizer.step()
    job.laid.reduction.after_update()
    return Update(known, skipped=False, grad_norm=grad_norm, num_zeros=zeros)


def weights_norm(job: Job) -> Tensor:
    """The L2 norm of all weights."""
    return global_norm(job.laid.weights(counted=True), device=job.device, reduce=job.laid.total)


def finish(job: Job, keeper: Keeper, signals: StopSignals) -> str | None:
    """After the last step: validate, save, test; the name of the signal that cut an evaluation short, or None."""
    progress = job.progress
    job.log.report(PlaceReached("after training is done"))
    if progress.owes == "interval":  # cut short at the last step of an earlier start
        if cut := evaluate_if_owed(job, signals):
            return cut
        progress.owes = "final"
    cut = evaluate_if_owed(job, signals)
    # A run that was over in the directory it was loaded from has a checkpoint in its own one too.
    if progress.step != job.first_step or not has_checkpoint(job.run):
        keeper.save(while_training=False)
    return cut or evaluate_if_owed(job, signals)


def reason_to_stop(job: Job, signals: StopSignals, keeper: Keeper) -> str | None:
    """Why the run is to stop after this step, the same on every rank; None to go on."""
    train = job.run.train
    minutes = (time.monotonic() - job.started) / 60
    late = train.exit_duration_in_mins is not None and minutes > train.exit_duration_in_mins
    number = int(signals.received or 0)
    # One small reduction on the host: what one rank got or found, a signal, a clock past its hour, stops all.
    number, late_anywhere, not_saved = Ranks().largest([number, int(late), int(keeper.asks_to_stop)])
    if number:
        return signal.Signals(number).name
    if not_saved:
        return "save-failure"
    if late_anywhere:
        return "exit-duration"
    if every(job.progress.step, train.exit_interval):
        return "exit-interval"
    return None
