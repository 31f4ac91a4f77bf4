"""The directory of a run's checkpoints: names, what is in it, and how something is taken out of it.

Only what Megalith made is ever removed: directories with its names, files with its names in them, never what a link
points at.
"""

import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from megalith.checkpoint.settings import FOLDER as FOLDER
from megalith.checkpoint.shards import DamagedError, read_file
from megalith.files import Disk, Location, make_directories, sync_directory, write_whole

STEP_NAME = re.compile(r"step-([0-9]{7,12})")
LEFTOVER_NAME = re.compile(r"\.(?:tmp|del)-step-[0-9]{7,12}\.[0-9a-f]{8}")
# What a save puts into a directory: files, and the temporary names under which they are written.
OWN_FILE = re.compile(r"(\.)?(?:index\.json|rank-[0-9]{5,9}\.safetensors)(?(1)\.[0-9a-f]{8}\.tmp)")
LONGEST_NAME = "rank-00000.safetensors"  # of these; ranks beyond 99,999 have a longer one


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or, of all that there are, none that can be read; the same on every rank.

    path: the checkpoint, or the folder of checkpoints. need: bytes of the checkpoint; free: those left on its file
    system after the failure. None where they do not matter or are not known. before: what there is to go back to, in
    words, of a checkpoint that was not written.
    """

    def __init__(
        self, message: str, path: Path, *, need: int | None = None, free: int | None = None, before: str = ""
    ) -> None:
        super().__init__(message)
        self.path, self.need, self.free, self.before = path, need, free, before


class StepDirectory(NamedTuple):
    """What has a checkpoint's name; whether it is a directory and holds one is another question."""

    step: int
    path: Path


def folder_of(run_dir: Location) -> Path:
    """Where a run's checkpoints lie."""
    return Path(run_dir) / FOLDER


def try_run_directory(run_dir: Location, *, disk: Disk) -> None:
    """Find out, before the training, whether checkpoints can be written there; nothing but the folder is left.

    Raises CheckpointError if not.
    """
    folder = folder_of(run_dir)
    try:
        make_directories(folder, disk=disk)
        refuse_link(folder)
        # Named as what a killed save leaves behind, so that the next start removes it if this is killed.
        trial = folder / new_name("tmp", 0)
        disk.make_directory(trial)
        # No file of a checkpoint has a longer name.
        write_whole(trial / LONGEST_NAME, "a trial", disk=disk)
        check_directory(trial)
        discard(StepDirectory(0, trial), disk=disk)
    except (OSError, DamagedError) as failed:
        raise CheckpointError(f"checkpoints cannot be written to {folder}: {failed}", folder) from failed


class Mark(NamedTuple):
    """A file by which a run directory is known from any other: what holds it in the folder of checkpoints, its text."""

    name: str
    text: str


def leave_mark(run_dir: Location, *, disk: Disk) -> Mark:
    """Leave a mark that nobody else can have left. Raises OSError.

    It is named as what a killed save leaves behind, so that the next start removes it if this is killed.
    """
    mark = Mark(new_name("tmp", 0), secrets.token_hex(16))
    disk.make_directory(folder_of(run_dir) / mark.name)
    write_whole(folder_of(run_dir) / mark.name / LONGEST_NAME, mark.text, disk=disk)
    return mark


def sees_mark(run_dir: Location, mark: Mark, *, disk: Disk) -> bool:
    """Whether the mark is seen from here. Raises OSError if it is there and cannot be read."""
    try:
        text = read_file(folder_of(run_dir) / mark.name / LONGEST_NAME, len(mark.text), disk=disk)
    except (FileNotFoundError, NotADirectoryError, DamagedError):
        return False
    return text == mark.text.encode()


def remove_mark(run_dir: Location, mark: Mark, *, disk: Disk) -> None:
    """Remove a mark; where that fails the next start does it."""
    with suppress(OSError, DamagedError):
        discard(StepDirectory(0, folder_of(run_dir) / mark.name), disk=disk)


def step_name(step: int) -> str:
    """The name of a step's directory. Raises ValueError if the step has more than 12 digits or is negative."""
    name = f"step-{step:07d}"
    if STEP_NAME.fullmatch(name) is None:
        raise ValueError(f"step={step} must be at least 0 and have at most 12 digits")
    return name


def named_step(path: Location) -> tuple[Path, int] | None:
    """The run directory and the step of which a path is the checkpoint, by its name; None for any other path."""
    given = Path(path)
    match = STEP_NAME.fullmatch(given.name)
    run_dir = given.parent.parent
    return (run_dir, int(match[1])) if match and folder_of(run_dir) == given.parent else None


def list_checkpoints(run_dir: Location) -> list[StepDirectory]:
    """What has a checkpoint's name, oldest step first, also links and files: who reads them says that they are none."""
    try:
        names = os.listdir(folder_of(run_dir))
    except FileNotFoundError:
        return []
    matches = [match for name in names if (match := STEP_NAME.fullmatch(name))]
    # step-00000001 would be a second name of step 1, which no save gives.
    found = [StepDirectory(int(match[1]), folder_of(run_dir) / match[0]) for match in matches]
    return sorted(entry for entry in found if entry.path.name == step_name(entry.step))


def new_name(kind: str, step: int) -> str:
    """A name that no other directory has, for one that is being made (kind "tmp") or removed ("del")."""
    return f".{kind}-{step_name(step)}.{secrets.token_hex(4)}"


def check_directory(path: Path) -> None:
    """Raise DamagedError if a checkpoint's directory is a link, no directory, or writable for everybody."""
    mode = path.lstat().st_mode
    if not stat.S_ISDIR(mode):
        raise DamagedError(f"{path} is {'a link, which is not followed' if stat.S_ISLNK(mode) else 'not a directory'}")
    for directory in (path, path.parent):
        mode = directory.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise DamagedError(f"{directory} can be written by everybody, so its files cannot be trusted: chmod o-w it")


def refuse_link(folder: Path) -> None:
    """Raise OSError if a run directory's folder of checkpoints is a link: who else writes there holds another lease."""
    if folder.is_symlink():
        raise OSError(f"{folder} is a link, which is not followed: let the run directory itself be one")


def discard(directory: StepDirectory, *, disk: Disk) -> None:
    """Remove a checkpoint: it stops being one in a single step, then its files go.

    Files that a save does not write stay, under another name. What a kill leaves behind is for `discard_leftovers`.
    Raises OSError, or DamagedError if it is no directory.
    """
    if not stat.S_ISDIR(directory.path.lstat().st_mode):
        raise DamagedError(f"{directory.path} is in the way of a checkpoint and no directory: move it away")
    removed = directory.path.with_name(new_name("del", directory.step))
    disk.rename(directory.path, removed)
    sync_directory(removed.parent, disk=disk)
    _empty(removed, disk)


def discard_leftovers(run_dir: Location, *, disk: Disk) -> None:
    """Remove what killed saves and removals left behind. Nobody else may be saving in this run directory.

    A directory in which others put files keeps those. Raises OSError.
    """
    folder = folder_of(run_dir)
    refuse_link(folder)
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    for name in filter(LEFTOVER_NAME.fullmatch, names):
        path = folder / name
        if name.startswith(".tmp-"):
            # Out of its name first: should its writer be alive after all, it must not commit what is being emptied.
            removed = folder / f".del-{name.removeprefix('.tmp-')}"
            disk.rename(path, removed)
            path = removed
        _empty(path, disk)


def _empty(directory: Path, disk: Disk) -> None:
    """Remove our files from a directory, and the directory if nothing else is in it."""
    with os.scandir(directory) as entries:
        names = {entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)}
    ours = set(filter(OWN_FILE.fullmatch, names))
    for name in sorted(ours):
        disk.remove(directory / name)
    if not any(directory.iterdir()):
        disk.remove_directory(directory)
