"""Checkpoints that know no layout: saved by any number of ranks, loaded by any other, refused if a bit has changed.

    RUN/checkpoints/step-0000100/index.json              what it is, where every tensor lies, digests
                                 rank-00000.safetensors  what rank 0 wrote, ...

A checkpoint is written under another name, synced, and then renamed: only then does it exist. No file says which one is
the latest; it is the newest that verifies.
"""

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from megalith.checkpoint.directory import (
    CheckpointError,
    StepDirectory,
    discard,
    discard_leftovers,
    folder_of,
    list_checkpoints,
    new_name,
    step_name,
)
from megalith.checkpoint.fit import UnfitError, check_fit, fill
from megalith.checkpoint.index import INDEX_NAME, Index, plain_json, render
from megalith.checkpoint.pieces import Piece, file_of
from megalith.checkpoint.shards import DamagedError, write_shard
from megalith.checkpoint.verify import check_together, index_together, verify, why_unread
from megalith.checkpoint.writers import Plan, plan
from megalith.files import DISK, Disk, Location, Written, make_directories, sync_directory, write_whole
from megalith.ranks import Ranks, RanksError
from megalith.terminal import counted

NOTHING_BEFORE = "there is none before it: a kill loses everything"


def save(
    run_dir: Location,
    step: int,
    tensors: Mapping[str, Piece],
    state: Mapping[str, Any],
    *,
    notes: Mapping[str, Any] | None = None,
    ranks: Ranks | None = None,
    disk: Disk = DISK,
) -> Path:
    """Write a checkpoint of the tensors and the state, and give its path; it exists when this returns.

    Called by all ranks alike. ranks: if not all of the process group. tensors: what this rank holds; together the
    pieces must cover every tensor, copies are written once. state and notes: JSON of rank 0, as in `Index`.

    Raises CheckpointError on all ranks if any fails to write: then nothing of it is left, the earlier checkpoints are
    untouched, and training can go on. Raises ValueError if the pieces, the state or the step cannot be stored.
    """
    ranks = ranks or Ranks()
    planned = plan(ranks, tensors)
    own = {name: tensors[name].elements for name in planned.own}
    try:
        kept = ranks.together(lambda: [plain_json("state", state), plain_json("notes", notes or {})])[0]
    except RanksError as failed:
        raise ValueError(str(failed)) from failed
    return write(ranks, run_dir, Contents(step, planned, *kept), lambda: own, disk=disk)


@dataclass(frozen=True)
class Contents:
    """What is to be written. state and notes matter on rank 0 only. Raises ValueError if the step has no name."""

    step: int
    plan: Plan
    state: Mapping[str, Any]
    notes: Mapping[str, Any]

    def __post_init__(self) -> None:
        step_name(self.step)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.plan.num_bytes


def write(
    ranks: Ranks, run_dir: Location, contents: Contents, own: Callable[[], Mapping[str, Tensor]], *, disk: Disk
) -> Path:
    """The commit: as `save`, with the plan made and own giving the tensors that this rank writes.

    own may raise OSError or ValueError, which ends the save on all ranks.
    """
    folder = folder_of(run_dir)
    path = folder / step_name(contents.step)
    temporary = ""

    def write_own() -> Any:
        tensors = own()
        if not tensors:
            return None
        written = write_shard(folder / temporary / file_of(ranks.rank), tensors, disk=disk)
        return [file_of(ranks.rank), written.size, written.digest]

    def first(work: Callable[[], Any]) -> Any:
        return ranks.together(lambda: work() if ranks.rank == 0 else None)[0]

    try:
        temporary = first(lambda: _prepare(run_dir, contents, disk))
        listed = ranks.together_to_first(write_own)
        files = {name: Written(size, digest) for name, size, digest in filter(None, listed)}
        first(lambda: _commit(folder, temporary, contents, files, disk))
    except RanksError as failed:
        raise _give_up(ranks, folder, temporary, contents, str(failed), disk) from failed
    return path


def _prepare(run_dir: Location, contents: Contents, disk: Disk) -> str:
    """Clean up after killed saves, look for room, and make the directory to write into; give its name."""
    folder = folder_of(run_dir)
    make_directories(folder, disk=disk)
    discard_leftovers(run_dir, disk=disk)
    free = disk.free_bytes(folder)
    if free < contents.num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    name = new_name("tmp", contents.step)
    disk.make_directory(folder / name)
    return name


def _commit(folder: Path, temporary: str, contents: Contents, files: Mapping[str, Written], disk: Disk) -> None:
    """Write the index and give the directory its name, unless there is an equal checkpoint already."""
    index = Index(contents.step, contents.state, contents.notes, files, contents.plan.table)
    write_whole(folder / temporary / INDEX_NAME, render(index), disk=disk)
    target = StepDirectory(contents.step, folder / step_name(contents.step))
    if os.path.lexists(target.path):
        try:
            existing = verify(target.path, disk=disk)
        except (DamagedError, OSError) as error:
            if why_unread(target.path, error) is not None:
                raise  # it may be sound
            discard(target, disk=disk)
        else:
            if not existing.same_contents(index):
                raise ValueError(
                    f"{target.path} exists and holds another checkpoint of step {contents.step}: move it away, or save "
                    "into another run directory"
                )
            discard(StepDirectory(contents.step, folder / temporary), disk=disk)
            return
    disk.rename(folder / temporary, target.path)
    sync_directory(folder, disk=disk)


def _give_up(
    ranks: Ranks, folder: Path, temporary: str, contents: Contents, reason: str, disk: Disk
) -> CheckpointError:
    """Remove what was written, and say on every rank what happened."""
    free, before = None, ""
    if ranks.rank == 0:
        if temporary:
            # The disk fails already: what cannot be removed now is left for the next save.
            with suppress(OSError, DamagedError):
                discard(StepDirectory(contents.step, folder / temporary), disk=disk)
        with suppress(OSError):
            free = disk.free_bytes(folder)
        before = _told_of_earlier(folder.parent)
    # Also keeps the other ranks from starting the next save before this one is cleared away.
    free, before = ranks.from_first([free, before])
    path, need = folder / step_name(contents.step), contents.num_bytes
    message = f"{path} was not written: {reason}. It needs {need} bytes; "
    message += "how many are free is not known" if free is None else f"{free} are free there"
    return CheckpointError(f"{message}. Earlier checkpoints are untouched", path, need=need, free=free, before=before)


def _told_of_earlier(run_dir: Path) -> str:
    """What there is to go back to."""
    try:
        earlier = list_checkpoints(run_dir)
    except OSError as unseen:
        return f"which there are before it cannot be seen ({unseen.strerror})"
    return f"the newest before is of step {earlier[-1].step}" if earlier else NOTHING_BEFORE


class Refused(NamedTuple):
    """A checkpoint that was not used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Loaded:
    """The checkpoint that was loaded, and the newer ones that could not be, newest first."""

    path: Path
    index: Index
    refused: tuple[Refused, ...]

    def messages(self, *, goes_on: bool = True) -> list[str]:
        """What was lost, as sentences to print; none if the newest checkpoint was loaded.

        goes_on: a run goes on from it; else it is only looked at.
        """
        if not self.refused:
            return []
        lost = int(self.refused[0].path.name.removeprefix("step-")) - self.index.step
        steps = f"{counted(lost, 'step')} {'is' if lost == 1 else 'are'}"
        instead = f"going on from step {self.index.step} instead: {steps} lost and done again"
        return [
            *(f"{path} is damaged and was not used: {reason}" for path, reason in self.refused),
            instead if goes_on else f"step {self.index.step} is used instead",
        ]


# What a loader wants: the pieces that it fills, or a function that makes them once it has seen the index, of which no
# file has been opened yet; it may raise ValueError to refuse it.
Wanted = Mapping[str, Piece] | Callable[[Index], Mapping[str, Piece]]


def nothing(name: str) -> bool:
    """Every tensor of the checkpoint must be wanted."""
    return False


def steps_together(ranks: Ranks, run_dir: Location) -> list[int]:
    """The steps of a run's checkpoints, oldest first, as rank 0 sees them; called by all ranks alike.

    What another host lists may be old: a network file system keeps listings for a while, and ranks that each believed
    their own would part. Raises CheckpointError on all ranks if there is no listing.
    """
    folder = folder_of(run_dir)
    try:
        listed = ranks.together(lambda: [found.step for found in list_checkpoints(run_dir)] if ranks.rank == 0 else [])
    except RanksError as failed:
        said = why_unread(folder, failed) or f"{folder} cannot be read: {failed}"
        raise CheckpointError(said, folder) from failed
    return listed[0]


def load_latest(
    run_dir: Location,
    wanted: Wanted,
    *,
    step: int | None = None,
    may_stay_unread: Callable[[str], bool] = nothing,
    ranks: Ranks | None = None,
    disk: Disk = DISK,
) -> Loaded | None:
    """Fill the wanted pieces, in place, from the newest checkpoint that verifies; None if there is none at all.

    Called by all ranks alike; they need not be those that saved. Each reads what overlaps with its pieces,
    so none needs memory for more than those and a few megabytes. step: only that checkpoint. may_stay_unread: the names
    of tensors that may be in the checkpoint without any rank wanting them.

    A damaged checkpoint is passed over for the one before it: see `Loaded.messages`; one that may not be read is not,
    for it may be sound. Raises CheckpointError for such a one, if all are damaged, or if the step is not there;
    ValueError if the tensors of the run and of the checkpoint are not the same.

    What does not fit is refused by its index alone, for the files of a large run take minutes to verify; but where an
    earlier one fits, only after it has verified: the index of another run may lie among files that are not its own.
    """
    ranks = ranks or Ranks()
    folder = folder_of(run_dir)
    steps = steps_together(ranks, run_dir)
    if step is not None:
        if step not in steps:
            raise CheckpointError(f"{folder} has no checkpoint of step {step}; it has {steps}", folder)
        steps = [step]
    refused: list[Refused] = []
    choice = _Choice(ranks, folder, wanted, may_stay_unread, disk)
    while steps:
        candidate = steps.pop()
        path = folder / step_name(candidate)
        try:
            index, pieces = choice.fitting_unless_damaged(candidate, steps)
            check_together(ranks, path, index, disk=disk)
            fill(ranks, path, index, pieces, disk=disk)
        except (RanksError, DamagedError) as failed:
            if (unread := why_unread(path, failed)) is not None:
                raise CheckpointError(unread, path) from failed
            refused.append(Refused(path, str(failed)))
        else:
            return Loaded(path, index, tuple(refused))
    if refused:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in refused)
        raise CheckpointError(f"no checkpoint in {folder} can be used: {reasons}", folder)
    return None


@dataclass(frozen=True)
class _Choice:
    """Which checkpoint a run can go on from, by the indices; all ranks call its methods alike."""

    ranks: Ranks
    folder: Path
    wanted: Wanted
    may_stay_unread: Callable[[str], bool]
    disk: Disk

    def fitting_unless_damaged(self, step: int, earlier: Sequence[int]) -> tuple[Index, Mapping[str, Piece]]:
        """As `fitting`; where a step of earlier fits in its stead, the unfit one's files are verified first."""
        try:
            return self.fitting(step)
        except UnfitError as unfit:
            if any(map(self.fits, reversed(earlier))):
                check_together(self.ranks, self.folder / step_name(step), unfit.index, disk=self.disk)
            raise

    def fits(self, step: int) -> bool:
        try:
            self.fitting(step)
        except (RanksError, DamagedError, UnfitError):
            return False
        return True

    def fitting(self, step: int) -> tuple[Index, Mapping[str, Piece]]:
        """The index, and the pieces to fill. Raises UnfitError, or RanksError or DamagedError for a damaged index."""
        path = self.folder / step_name(step)
        index = index_together(self.ranks, path, disk=self.disk)
        try:
            pieces = self.wanted(index) if callable(self.wanted) else self.wanted
        except DamagedError:
            raise
        except ValueError as error:
            raise UnfitError(f"{path} is refused: {error}", index) from error
        check_fit(self.ranks, path, index, pieces, self.may_stay_unread)
        return index, pieces
