"""A run's checkpoints: what goes into one, when one is written, and how a run goes on from it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megalith import __version__
from megalith.adopt import Adoption, begin_with
from megalith.checkpoint.directory import CheckpointError, list_checkpoints, try_run_directory
from megalith.checkpoint.index import Index
from megalith.checkpoint.pieces import Piece
from megalith.checkpoint.saver import AsyncSaver
from megalith.checkpoint.store import Loaded, load_latest
from megalith.config import Run
from megalith.continuity import check_same_samples, decisive, tell_differences
from megalith.files import DISK
from megalith.job import Job
from megalith.models.shape import shape_of
from megalith.monitor.events import (
    CheckpointLoaded,
    CheckpointMissing,
    CheckpointStarted,
    LoadStarted,
    Warned,
)
from megalith.monitor.ledger import LedgerFile
from megalith.monitor.pace import SavePace
from megalith.monitor.timers import Timer
from megalith.optim.finite import BadSteps
from megalith.optim.groups import num_updates, optimizer_tensors, set_num_updates, take_optimizer_tensors
from megalith.optim.schedule import resumed_schedule, schedule_to_json
from megalith.owner import Lease
from megalith.parallel.apply import local_part
from megalith.report import report_saved
from megalith.sources import as_toml

# Tensors of a checkpoint are named after what they are, then by the parameter: weight.layers.0.... , exp_avg. ...
WEIGHT = "weight."
NOTHING_BEFORE = "there is none before it: a kill loses everything"


def try_save_directory(run: Run) -> None:
    """Find out whether --save can be written to. Raises ValueError if not."""
    if run.checkpoint.save is None or run.train.exit_before_training:
        return
    try:
        try_run_directory(run.checkpoint.save, disk=DISK)
    except CheckpointError as error:
        raise ValueError(f"--save = {run.checkpoint.save}: {error}. Choose another directory.") from error


class Keeper:
    """Writes the checkpoints of a run that has --save, in the background; use it in a `with` block.

    A checkpoint that cannot be written is announced, and the run goes on: the next one is tried anew; unless
    --on-save-failure says to stop. lease: of the rank that has one.
    """

    def __init__(self, job: Job, lease: Lease | None = None) -> None:
        self._job, self._lease = job, lease
        self._saver: AsyncSaver | None = None
        self._saved_step: int | None = None
        self._stall = 0.0  # seconds that the steps have waited for the checkpoint that is being written
        self._pace = SavePace(job.run.monitor.slow_save_ratio)
        self.failed = False  # the newest attempt
        self.asks_to_stop = False  # this rank has learnt of a failure; the others may in another step

    def __enter__(self) -> Self:
        checkpoint = self._job.run.checkpoint
        if checkpoint.save is not None and not self._job.run.train.exit_before_training:
            self._saver = AsyncSaver(
                checkpoint.save,
                keep_last=checkpoint.keep_last,
                keep_every=checkpoint.keep_every,
                disk=self._job.disk,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for loader in self._job.loaders.values():
            loader.close()
        if self._saver is not None:
            self._saver.close()

    def save(self, *, while_training: bool = True) -> None:
        """Begin a checkpoint of the step just taken, unless there is one; the step waits for a copy in memory only."""
        job = self._job
        if self._saver is None or self._saved_step == job.progress.step:
            return
        if self._lease is not None:
            self._lease.check()
        with self._timer():
            self.settle()
        assert job.run.checkpoint.save is not None
        job.log.report(CheckpointStarted(job.progress.step, job.run.checkpoint.save))
        with job.ledger.spend("checkpoint"), self._timer():
            self._stall = self._saver.save(
                job.progress.step, tensors_of(job), state_of(job), notes=notes_of(job), overlap=True
            )
        self._saved_step = job.progress.step
        if not while_training:
            self.settle(while_training=False)

    def _timer(self) -> Timer:
        return self._job.timers("checkpoint-stall")

    def look_for_room(self) -> None:
        """Find out, before the first step, whether there is room for a checkpoint. Raises ValueError if not."""
        if self._saver is None:
            return
        need, free = self._saver.room(tensors_of(self._job))
        if free is not None and free < need:
            raise ValueError(
                f"--save = {self._job.run.checkpoint.save}: a checkpoint needs {need:,} bytes, {free:,} are free "
                "there. Make room, or choose another directory."
            )

    def forget_saved(self) -> None:
        """The run went back: what was saved last is of no step that it is at."""
        self._saved_step = None

    def before_update(self) -> None:
        """Wait until the checkpoint that was begun is copied: only then may the weights change."""
        if self._saver is not None and self._saver.is_copying:
            with self._job.ledger.spend("checkpoint"), self._timer():
                self._stall += self._saver.before_update()

    def poll(self) -> None:
        """Say how the checkpoint that was being written went, if it is done; does not wait.

        Raises OwnedError if another job has taken the run directory over.
        """
        if self._lease is not None and self._lease.lost:
            self._lease.check()
        self._settle(wait=False, while_training=True)

    def settle(self, *, while_training: bool = True) -> None:
        """Wait for the checkpoint that is being written, if any, and say how it went."""
        self._settle(wait=True, while_training=while_training)

    def _settle(self, *, wait: bool, while_training: bool) -> None:
        if self._saver is None:
            return
        began = time.monotonic()
        try:
            with self._job.ledger.spend("checkpoint"):
                saved = self._saver.wait() if wait else self._saver.poll()
        except CheckpointError as error:
            self._tell_failure(error)
            return
        self._stall += time.monotonic() - began
        for done in saved:
            self.failed = False
            report_saved(self._job, done, self._pace, stall=self._stall if while_training else None)

    def _tell_failure(self, error: CheckpointError) -> None:
        """Say that a checkpoint could not be written, what that puts at risk, and what becomes of the run."""
        checkpoint = self._job.run.checkpoint
        self.failed, self._saved_step = True, None
        self.asks_to_stop = checkpoint.on_save_failure == "stop"
        assert checkpoint.save is not None
        try:
            safe = [found.step for found in list_checkpoints(checkpoint.save)]
            kept = f"the newest before is of step {safe[-1]}" if safe else NOTHING_BEFORE
        except OSError as unseen:
            kept = f"which there are before it cannot be seen ({unseen.strerror})"
        then = "The run stops" if self.asks_to_stop else "The run goes on; the next checkpoint is tried anew"
        self._job.log.report(Warned(f"{error}; {kept}. {then} (--on-save-failure {checkpoint.on_save_failure})."))


def tensors_of(job: Job) -> dict[str, Piece]:
    """What this rank holds of the weights and, unless --no-save-optim, of the optimizer's tensors."""
    pieces = weight_pieces(job)
    return pieces if job.run.checkpoint.no_save_optim else {**pieces, **optimizer_pieces(job)}


def weight_pieces(job: Job) -> dict[str, Piece]:
    held = job.laid.trained.held
    return {WEIGHT + name: Piece(local_part(h.parameter.data), h.whole, h.offset) for name, h in held.items()}


def optimizer_pieces(job: Job) -> dict[str, Piece]:
    pieces = {}
    for name, tensor in optimizer_tensors(job.laid.trained, job.optimizer).items():
        held = job.laid.trained.held[name.split(".", 1)[1]]
        pieces[name] = Piece(local_part(tensor), held.whole, held.offset)
    return pieces


def state_of(job: Job) -> dict[str, Any]:
    """Everything else that a run goes on from, as JSON."""
    progress = job.progress
    return {
        "step": progress.step,
        "consumed_train_samples": progress.consumed_train_samples,
        "consumed_valid_samples": progress.consumed_valid_samples,
        "schedule_samples": progress.schedule_samples,
        "skipped_steps": progress.skipped_steps,
        "bad_steps": progress.bad_steps.to_json(),
        "spikes": progress.spikes.state(),
        "num_updates": num_updates(job.laid.trained, job.optimizer),
        "loss_scale": None if progress.loss_scale is None else progress.loss_scale.to_json(),
        "schedule": schedule_to_json(job.schedule),
        "model": identity_of(job),
        "data": job.data,
        "samples": decisive(job.run),
    }


def notes_of(job: Job) -> dict[str, Any]:
    """What a checkpoint keeps besides: it may differ between two checkpoints that are the same."""
    return {
        "interval": job.interval.state(time.perf_counter()),
        "ledger": job.ledger.state(),
        "run": as_toml(job.run),
        "megalith": __version__,
    }


def identity_of(job: Job) -> dict[str, Any]:
    """What must be the same for a checkpoint's weights to mean the same."""
    shape = shape_of(job.run.model)
    return {
        "task": job.run.task,
        "num_layers": shape.num_layers,
        "hidden_size": shape.width,
        "num_attention_heads": shape.num_heads,
        "kv_channels": shape.head_width,
        "max_position_embeddings": shape.num_positions,
        "padded_vocab_size": job.vocab_size,
        "tokenizer": None if job.tokenizer is None else job.tokenizer.digest,
        **job.task.identity(job.run),
    }


@dataclass(frozen=True)
class Source:
    """Where a run starts from."""

    directory: Path
    is_own: bool  # the run's own directory: it goes on, whatever --finetune and the like say


def source_of(job: Job) -> Source | None:
    """The run directory to load from; None to start anew.

    Raises ValueError where that would leave checkpoints behind, or there is nothing to load.
    """
    checkpoint = job.run.checkpoint
    own = list_checkpoints(checkpoint.save) if checkpoint.save is not None else []
    if own and (checkpoint.auto_resume or checkpoint.load == checkpoint.save):
        return Source(Path(str(checkpoint.save)), is_own=True)
    if own:
        raise ValueError(
            f"--save = {checkpoint.save}: holds checkpoints up to step {own[-1].step}, and --no-auto-resume forbids to "
            "go on from them. Choose another directory."
        )
    if checkpoint.load is None:
        return None
    if list_checkpoints(checkpoint.load):
        return Source(Path(checkpoint.load), is_own=False)
    if checkpoint.load != checkpoint.save:
        raise ValueError(f"--load = {checkpoint.load}: holds no checkpoint. Correct the path, or leave it out.")
    # The habit of Megatron-LM's scripts: one directory to save to and load from, empty at the first start.
    job.log.report(CheckpointMissing(str(checkpoint.load)))
    return None


def resume(job: Job) -> None:
    """Go on from the newest checkpoint that verifies, or start from the weights of another run; in place.

    Raises ValueError for a checkpoint of another model or of other samples, or if all are damaged.
    """
    source = source_of(job)
    book = LedgerFile(job.run.checkpoint.save).read() if job.run.checkpoint.save is not None else None
    if source is None or job.run.train.exit_before_training:
        job.ledger.restore(None, book)
        begin_with_another(job)
        return
    started = time.monotonic()
    job.log.report(LoadStarted(str(source.directory), list_checkpoints(source.directory)[-1].step))
    fresh = job.run.checkpoint.finetune and not source.is_own
    with_optimizer = not fresh and (source.is_own or not job.run.checkpoint.no_load_optim)
    fit = job.task.fit if fresh else None
    adoption = None if fit is None else Adoption(job.laid.trained.held, fit, prefix=WEIGHT)
    try:
        loaded = load(job, source.directory, fresh=fresh, with_optimizer=with_optimizer, adoption=adoption)
    except CheckpointError as error:
        raise ValueError(str(error)) from error
    if not fresh:
        tell_differences(job.run, job.data, loaded.index.state, loaded.index.notes, job.log)
    if adoption is not None:
        adoption.finish()
    for message in loaded.messages():
        job.log.report(Warned(message))
    if not fresh:
        restore(job, loaded, with_optimizer=with_optimizer)
    job.ledger.restore(None if fresh else loaded.index.notes["ledger"], book)
    job.log.report(
        CheckpointLoaded(
            str(source.directory), job.progress.step, time.monotonic() - started, loaded.index.notes["megalith"]
        )
    )


def begin_with_another(job: Job) -> None:
    """Take over weights of another family's run where the task names one (--bert-load); in place."""
    origin = job.task.origin(job.run)
    if origin is None or job.run.train.exit_before_training:
        return
    started = time.monotonic()
    loaded = begin_with(job.laid.trained.held, origin, identity=identity_of(job), prefix=WEIGHT)
    # Replicas that share out the optimizer have loaded their own rows only.
    job.laid.reduction.after_update()
    for message in loaded.messages():
        job.log.report(Warned(message))
    seconds = time.monotonic() - started
    job.log.line(f"began with the weights of step {loaded.index.step} of {origin.directory} ({seconds:.1f} s)")


def load(
    job: Job,
    directory: Path,
    *,
    fresh: bool,
    with_optimizer: bool,
    step: int | None = None,
    adoption: Adoption | None = None,
) -> Loaded:
    """Fill weights and the optimizer's tensors, in place, from the newest checkpoint that verifies, or from a step's.

    fresh: the run does not go on from it. Raises CheckpointError if there is none that can be read, ValueError if it is
    of another model or, unless fresh, of other samples; then its tensors have not been looked at.
    """
    pieces: dict[str, Piece] = {}

    def wanted_of(index: Index) -> dict[str, Piece]:
        pieces.clear()
        pieces.update(wanted(job, index, with_optimizer=with_optimizer, adoption=adoption))
        if not fresh:
            check_same_samples(job.run, job.data, index.state)
        return pieces

    loaded = load_latest(
        directory,
        wanted_of,
        step=step,
        may_stay_unread=lambda name: not with_optimizer and (adoption is not None or not name.startswith(WEIGHT)),
    )
    assert loaded is not None, "its checkpoints were listed"
    if with_optimizer:
        moments = {name: piece.local for name, piece in pieces.items() if not name.startswith(WEIGHT)}
        take_optimizer_tensors(job.laid.trained, job.optimizer, moments)
    # Replicas that share out the optimizer have loaded their own rows only.
    job.laid.reduction.after_update()
    return loaded


def wanted(job: Job, index: Index, *, with_optimizer: bool, adoption: Adoption | None = None) -> dict[str, Piece]:
    """The pieces to fill, once it is seen that the checkpoint is of this model, or as near as a fine-tuning needs."""
    may_differ = () if adoption is None else adoption.fit.may_differ
    faults = [
        f"{name} is {index.state['model'].get(name)} in the checkpoint and {value} in this run"
        for name, value in identity_of(job).items()
        if index.state["model"].get(name) != value and name not in may_differ
    ]
    if faults:
        raise ValueError(f"the checkpoint of step {index.step} is of another model: {'; '.join(faults)}")
    if adoption is not None:
        return adoption.pieces(index)
    if not with_optimizer:
        return weight_pieces(job)
    pieces = optimizer_pieces(job)
    if not pieces.keys() <= index.tensors.keys():
        raise ValueError(f"the checkpoint of step {index.step} holds no optimizer state for this run: --no-load-optim")
    return {**weight_pieces(job), **pieces}


def restore(job: Job, loaded: Loaded, *, with_optimizer: bool) -> None:
    """Take over everything but the tensors, in place."""
    state: Mapping[str, Any] = loaded.index.state
    progress = job.progress
    progress.step = int(state["step"])
    progress.consumed_train_samples = int(state["consumed_train_samples"])
    progress.consumed_valid_samples = int(state["consumed_valid_samples"])
    progress.schedule_samples = int(state["schedule_samples"])
    progress.skipped_steps = int(state["skipped_steps"])
    # Checkpoints of earlier versions have neither.
    progress.bad_steps = BadSteps.from_json(state.get("bad_steps", {}))
    progress.spikes.restore(state.get("spikes", {}))
    if with_optimizer:
        set_num_updates(job.laid.trained, job.optimizer, int(state["num_updates"]))
        if progress.loss_scale is not None and state["loss_scale"] is not None:
            progress.loss_scale = progress.loss_scale.resumed(state["loss_scale"])
        job.schedule, spoken = resumed_schedule(
            job.schedule,
            state["schedule"],
            override_lr_scheduler=job.run.optimizer.override_lr_scheduler,
            use_checkpoint_lr_scheduler=job.run.optimizer.use_checkpoint_lr_scheduler,
        )
        for line in spoken:
            job.log.line(line, detail=True)
    job.interval.restore(loaded.index.notes["interval"], time.perf_counter())
