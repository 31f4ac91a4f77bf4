"""When a run's checkpoints are written, and what is told of them."""

import time
from pathlib import Path
from types import TracebackType
from typing import Self

from megalith.agreement import host_name, named_ranks, refuse
from megalith.checkpoint.directory import (
    CheckpointError,
    Mark,
    leave_mark,
    remove_mark,
    sees_mark,
    try_run_directory,
)
from megalith.checkpoint.saver import AsyncSaver
from megalith.checkpoint.store import steps_together
from megalith.config import Run
from megalith.data.tokenizer import Tokenizer
from megalith.files import DISK
from megalith.job import Job
from megalith.monitor.events import CheckpointStarted, Warned
from megalith.monitor.pace import SavePace
from megalith.monitor.timers import Timer
from megalith.owner import Lease, remedy_for
from megalith.parallel.mesh import Layout
from megalith.ranks import Ranks, RanksError
from megalith.report import report_saved
from megalith.run_state import notes_of, state_of, tensors_of
from megalith.sources import write_run_file

SECONDS_TO_SEE = 5.0  # what another node has written


def try_save_directory(run: Run, layout: Layout) -> None:
    """Find out whether --save can be written to from every node, and is the same directory on all; every rank calls it.

    If not, rank 0 says what is wrong and where, and ConfigError is raised on all ranks.
    """
    save = run.checkpoint.save
    if save is None or run.train.exit_before_training:
        return
    ranks, marks = Ranks(), list[Mark]()

    def try_here() -> str:
        try:
            if layout.local_rank == 0:
                try_run_directory(save, disk=DISK)
            if ranks.rank == 0 and ranks.size > 1:
                marks.append(leave_mark(save, disk=DISK))
        except (CheckpointError, OSError) as error:
            raise ValueError(f"{error}. {remedy_for(error)}") from error
        return host_name()

    try:
        hosts = ranks.together(try_here)
        if ranks.size > 1:
            mark = Mark(*ranks.from_first(marks)[0])
            sees = ranks.together(lambda: _is_seen(save, mark))
    except RanksError as failed:
        rank, message, _ = failed.failures[0]
        where = f"on rank {rank}, " if ranks.size > 1 else ""
        refuse(ranks, f"--save = {save}: {where}{message}")
    finally:
        for own in marks:
            remove_mark(save, own, disk=DISK)
    if ranks.size > 1 and (blind := [rank for rank, is_seen in enumerate(sees) if not is_seen]):
        verb = "do" if len(blind) > 1 else "does"
        what = f"{named_ranks(blind, hosts)} {verb} not see what {named_ranks([0], hosts)} wrote there"
        refuse(ranks, f"--save = {save}: {what}. Name a directory on a file system that all nodes share.")


def _is_seen(save: str, mark: Mark) -> bool:
    """Whether rank 0's mark is seen from here; a network's file system may take a moment to show it, or to let it be
    read. Raises ValueError, with a remedy, if it is there and cannot be."""
    until = time.monotonic() + SECONDS_TO_SEE
    while True:
        is_over = time.monotonic() >= until
        try:
            if (seen := sees_mark(save, mark, disk=DISK)) or is_over:
                return seen
        except OSError as error:
            if is_over:
                raise ValueError(f"{error}. {remedy_for(error)}") from error
        time.sleep(0.2)


def keep_what_is_trained(run: Run, tokenizer: Tokenizer | None) -> None:
    """Write what the run's checkpoints are read with into its directory, if there is one: its run file and tokenizer.

    Only once the run may go on from what is there, so that a refused one changes nothing.
    """
    if run.checkpoint.save is not None:
        write_run_file(run)
        if tokenizer is not None:
            folder = Path(run.checkpoint.save) / "tokenizer"
            if folder.is_symlink():
                raise ValueError(f"{folder} is a link, which is not followed: move it away.")
            tokenizer.save(folder)


def has_checkpoint(run: Run) -> bool:
    """Whether the same command has something to go on from; every rank calls it."""
    try:
        return run.checkpoint.save is not None and bool(steps_together(Ranks(), run.checkpoint.save))
    except CheckpointError:
        return True  # what cannot be seen is not known to be lost


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
            self.settle(while_training=False, is_last=True)

    def _timer(self) -> Timer:
        return self._job.timers("checkpoint-stall")

    def look_for_room(self) -> None:
        """Find out, before the first step, whether a checkpoint can be written, and has room; make some if need be.

        Only what --keep-last leaves out is removed. Raises ValueError if that is not enough.
        """
        if self._saver is None:
            return
        save = self._job.run.checkpoint.save
        try:
            need, free = self._saver.room(tensors_of(self._job))
        except ValueError as error:
            raise ValueError(f"--save = {save}: no checkpoint can be written: {error}") from error
        if free is not None and free < need:
            try:
                gone = self._saver.delete_old()
            except CheckpointError as error:
                self._job.log.report(Warned(str(error)))
                gone = []
            if gone:
                self._job.log.line(f"old checkpoints are removed to make room: steps {', '.join(map(str, gone))}")
                need, free = self._saver.room(tensors_of(self._job))
        if free is not None and free < need:
            raise ValueError(
                f"--save = {save}: a checkpoint needs {need:,} bytes, {free:,} are free there. Make room, or choose "
                "another directory."
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

    def settle(self, *, while_training: bool = True, is_last: bool = False) -> None:
        """Wait for the checkpoint that is being written, if any, and say how it went. is_last: none will follow."""
        self._settle(wait=True, while_training=while_training, is_last=is_last)

    def _settle(self, *, wait: bool, while_training: bool, is_last: bool = False) -> None:
        if self._saver is None:
            return
        began = time.monotonic()
        try:
            with self._job.ledger.spend("checkpoint"):
                saved = self._saver.wait() if wait else self._saver.poll()
        except CheckpointError as error:
            self._tell_failure(error, is_last=is_last)
            return
        self._stall += time.monotonic() - began
        for done in saved:
            self.failed = False
            report_saved(self._job, done, self._pace, stall=self._stall if while_training else None)

    def _tell_failure(self, error: CheckpointError, *, is_last: bool) -> None:
        """Say that a checkpoint could not be written, what that puts at risk, and what becomes of the run."""
        checkpoint = self._job.run.checkpoint
        self.failed, self._saved_step = True, None
        self.asks_to_stop = checkpoint.on_save_failure == "stop"
        then = "The run stops" if self.asks_to_stop else "The run goes on; the next checkpoint is tried anew"
        then += f" (--on-save-failure {checkpoint.on_save_failure})"
        if is_last:
            then = "The run ends without it; the same command takes the steps since then again"
        self._job.log.report(Warned(f"{error}; {error.before}. {then}."))
