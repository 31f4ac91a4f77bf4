"""From where a run goes on: its own newest checkpoint, or the weights of another run."""

import time
from dataclasses import dataclass
from pathlib import Path

from megalith.adopt import Adoption, begin_with
from megalith.checkpoint.contents import check_contents
from megalith.checkpoint.directory import CheckpointError, named_step
from megalith.checkpoint.index import Index
from megalith.checkpoint.pieces import Piece
from megalith.checkpoint.settings import TRACKER
from megalith.checkpoint.store import Loaded, load_latest, steps_together
from megalith.continuity import check_same_samples, tell_differences
from megalith.job import Job
from megalith.monitor.events import CheckpointLoaded, CheckpointMissing, LoadStarted, Warned
from megalith.monitor.ledger import LedgerFile
from megalith.optim.groups import take_optimizer_tensors
from megalith.ranks import Ranks
from megalith.run_state import (
    WEIGHT,
    differing,
    identity_of,
    optimizer_pieces,
    restore,
    samples_of,
    weight_pieces,
)


@dataclass(frozen=True)
class Source:
    """Where a run starts from."""

    directory: Path
    newest: int  # step of its newest checkpoint, or of the one that was named
    is_own: bool  # the run's own directory: it goes on, whatever --finetune and the like say
    is_named: bool = False  # that checkpoint it must be


def source_of(job: Job) -> Source | None:
    """The run directory to load from, the same on all ranks; None to start anew.

    Raises ValueError where that would leave checkpoints behind, or there is nothing to load, or it cannot be seen.
    """
    checkpoint = job.run.checkpoint
    own = _steps_in(checkpoint.save) if checkpoint.save is not None else []
    is_same = checkpoint.loads_own
    if own and (checkpoint.auto_resume or is_same):
        _tell_what_is_overruled(job, is_same=is_same)
        return Source(Path(str(checkpoint.save)), own[-1], is_own=True)
    if own:
        raise ValueError(
            f"--save = {checkpoint.save}: holds checkpoints up to step {own[-1]}, and --no-auto-resume forbids to "
            "go on from them. Choose another directory."
        )
    if checkpoint.load is None:
        _may_begin(job)
        return None
    if (named := named_step(checkpoint.load)) is not None:
        run_dir, step = named
        if step in _steps_in(str(run_dir)):
            return Source(run_dir, step, is_own=False, is_named=True)
    if others := _steps_in(checkpoint.load):
        return Source(Path(checkpoint.load), others[-1], is_own=False)
    if not is_same:
        raise ValueError(f"--load = {checkpoint.load}: holds no checkpoint. Correct the path, or leave it out.")
    _may_begin(job)
    # The habit of Megatron-LM's scripts: one directory to save to and load from, empty at the first start.
    job.log.report(CheckpointMissing(str(Path(checkpoint.load) / TRACKER)))
    return None


def _may_begin(job: Job) -> None:
    """Raise ValueError where a run that would begin anew is to go on, or not to start."""
    checkpoint = job.run.checkpoint
    if checkpoint.exit_on_missing_checkpoint:
        flag, place = ("--save", checkpoint.save) if checkpoint.load is None else ("--load", checkpoint.load)
        shown = flag if place is None else f"{flag} = {place}"
        raise ValueError(
            f"{shown}: holds no checkpoint, and --exit-on-missing-checkpoint forbids to begin anew. Correct the path, "
            "or leave that flag out."
        )


def _steps_in(run_dir: str) -> list[int]:
    try:
        return steps_together(Ranks(), run_dir)
    except CheckpointError as error:
        raise ValueError(str(error)) from error


def _tell_what_is_overruled(job: Job, *, is_same: bool) -> None:
    """A run that goes on is not begun again, whatever was said of its beginning: the same command may be a restart."""
    checkpoint = job.run.checkpoint
    said = [
        *((f"--load {checkpoint.load}",) if checkpoint.load is not None and not is_same else ()),
        *(("--finetune",) if checkpoint.finetune else ()),
        *(("--no-load-optim",) if checkpoint.no_load_optim else ()),
    ]
    if said:
        text = f"{checkpoint.save} holds checkpoints of this run, which goes on from the newest: {' and '.join(said)} "
        job.log.line(f"note: {text}counted at its first start. To begin anew choose another --save.")


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
    job.log.report(LoadStarted(str(source.directory), source.newest))
    fresh = job.run.checkpoint.finetune and not source.is_own
    with_optimizer = not fresh and (source.is_own or not job.run.checkpoint.no_load_optim)
    may_lack = source.is_own and bool(job.run.checkpoint.no_load_optim or job.run.checkpoint.no_save_optim)
    fit = job.task.fit if fresh else None
    adoption = None if fit is None else Adoption(job.laid.trained.held, fit, prefix=WEIGHT)
    try:
        loaded = load(
            job,
            source.directory,
            fresh=fresh,
            with_optimizer=with_optimizer,
            may_lack=may_lack,
            step=source.newest if source.is_named else None,
            adoption=adoption,
        )
    except CheckpointError as error:
        raise ValueError(str(error)) from error
    if with_optimizer and may_lack and _lacks_optimizer(job, loaded.index):
        with_optimizer = False
        job.log.report(Warned(f"step {loaded.index.step} was saved without its optimizer, whose state begins anew"))
    if not fresh:
        tell_differences(job.run, job.data, samples_of(job), loaded.index.state, loaded.index.notes, job.log)
    if adoption is not None:
        adoption.finish()
    for message in loaded.messages(goes_on=not fresh):
        job.log.report(Warned(message))
    if not fresh:
        restore(job, loaded, with_optimizer=with_optimizer, goes_on=source.is_own)
    # The time between another run's checkpoint and this run's beginning is nobody's interruption.
    spent = None if fresh else {**loaded.index.notes["ledger"], **({} if source.is_own else {"ended": True})}
    # What a finished run did after its last checkpoint, its last evaluations, is not done again by a longer one.
    is_finished = source.is_own and book is not None and book.get("finished") == job.progress.step
    job.ledger.restore(book if is_finished else spent, book)
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
    for message in loaded.messages(goes_on=False):
        job.log.report(Warned(message))
    seconds = time.monotonic() - started
    job.log.line(f"began with the weights of step {loaded.index.step} of {origin.directory} ({seconds:.1f} s)")


def load(
    job: Job,
    directory: Path,
    *,
    fresh: bool,
    with_optimizer: bool,
    may_lack: bool = False,
    step: int | None = None,
    adoption: Adoption | None = None,
) -> Loaded:
    """Fill weights and the optimizer's tensors, in place, from the newest checkpoint that verifies, or from a step's.

    fresh: the run does not go on from it. may_lack: a checkpoint without the optimizer's tensors will do. Raises
    CheckpointError if there is none that can be read, ValueError if it is of another model or, unless fresh, of other
    samples; then its tensors have not been looked at.
    """
    pieces: dict[str, Piece] = {}

    def wanted_of(index: Index) -> dict[str, Piece]:
        check_contents(index)
        pieces.clear()
        asked = with_optimizer and not (may_lack and _lacks_optimizer(job, index))
        pieces.update(wanted(job, index, directory, with_optimizer=asked, adoption=adoption))
        if not fresh:
            check_same_samples(job.run, job.data, samples_of(job), index.state)
        return pieces

    loaded = load_latest(
        directory,
        wanted_of,
        step=step,
        may_stay_unread=lambda name: not with_optimizer and (adoption is not None or not name.startswith(WEIGHT)),
    )
    assert loaded is not None, "its checkpoints were listed"
    if with_optimizer and not (may_lack and _lacks_optimizer(job, loaded.index)):
        moments = {name: piece.local for name, piece in pieces.items() if not name.startswith(WEIGHT)}
        take_optimizer_tensors(job.laid.trained, job.optimizer, moments)
    # Replicas that share out the optimizer have loaded their own rows only.
    job.laid.reduction.after_update()
    return loaded


def wanted(
    job: Job, index: Index, directory: Path, *, with_optimizer: bool, adoption: Adoption | None = None
) -> dict[str, Piece]:
    """The pieces to fill, once it is seen that the checkpoint is of this model, or as near as a fine-tuning needs.

    directory: of the run that saved it.
    """
    # Another head takes nothing from the output layer.
    may_differ = () if adoption is None else (*adoption.fit.may_differ, "untie_embeddings_and_output_weights")
    faults = [
        _other_tokenizer(stored, value, directory)
        if name == "tokenizer"
        else f"{name} is {stored} in the checkpoint and {value} in this run"
        for name, stored, value in differing(index.state["model"], identity_of(job))
        if name not in may_differ
    ]
    if faults:
        remedy = "Restore what differs, or begin a new run with another --save and without --load of this one"
        raise ValueError(f"the checkpoint of step {index.step} is of another model: {'; '.join(faults)}. {remedy}")
    if adoption is not None:
        return adoption.pieces(index)
    if not with_optimizer:
        return weight_pieces(job)
    pieces = optimizer_pieces(job)
    if not pieces.keys() <= index.tensors.keys():
        if all(name.startswith(WEIGHT) for name in index.tensors):
            raise ValueError(
                f"the checkpoint of step {index.step} was saved without its optimizer. With --no-load-optim the run "
                "goes on with a new one"
            )
        raise ValueError(
            f"the checkpoint of step {index.step} holds no optimizer state for this model and --optimizer "
            f"{job.run.optimizer.optimizer}. Give the optimizer of before, or --no-load-optim"
        )
    return {**weight_pieces(job), **{name: piece.to_fill() for name, piece in pieces.items()}}


def _other_tokenizer(stored: str | None, own: str | None, directory: Path) -> str:
    """That the run reads text by another tokenizer, and where the checkpoint's is to be had."""
    kept = directory / "tokenizer"
    here, there = ("none" if digest is None else f"one with digest {digest[:12]}" for digest in (own, stored))
    place = f", whose files are in {kept}" if stored is not None and kept.is_dir() else ""
    return f"the tokenizer is {here}, and the checkpoint's is {there}{place}"


def _lacks_optimizer(job: Job, index: Index) -> bool:
    return not optimizer_pieces(job).keys() <= index.tensors.keys()
