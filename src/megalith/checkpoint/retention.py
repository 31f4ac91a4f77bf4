"""Which old checkpoints may go: none before the newest has been verified."""

import stat

from megalith.checkpoint.directory import CheckpointError, StepDirectory, discard, folder_of, list_checkpoints
from megalith.checkpoint.shards import DamagedError
from megalith.checkpoint.verify import read_index, verified_together
from megalith.files import DISK, Disk, Location
from megalith.ranks import Ranks, RanksError


def delete_old(
    ranks: Ranks, run_dir: Location, *, keep_last: int, keep_every: int | None = None, disk: Disk = DISK
) -> list[int]:
    """Delete old checkpoints, oldest first, and give their steps. Called by all ranks alike.

    keep_last: how many of the newest stay; such as do not look whole are not counted. keep_every: those at multiples of
    that step stay too.

    Raises CheckpointError on all ranks, and deletes nothing more, if the newest checkpoint does not verify or a
    deletion fails. Raises ValueError if keep_last or keep_every is below 1.
    """
    if keep_last < 1 or (keep_every is not None and keep_every < 1):
        raise ValueError(f"keep_last={keep_last} and keep_every={keep_every} must be at least 1")
    existing: list[StepDirectory] = []
    old: list[StepDirectory] = []

    def choose() -> None:
        if ranks.rank == 0:
            # Links and files with such names are not ours to delete.
            existing.extend(found for found in list_checkpoints(run_dir) if stat.S_ISDIR(found.path.lstat().st_mode))
            old.extend(_old_ones(existing, keep_last, keep_every, disk))

    def delete() -> list[int]:
        for directory in old:
            discard(directory, disk=disk)
        return [directory.step for directory in old]

    folder = folder_of(run_dir)
    try:
        ranks.together(choose)
        newest = ranks.from_first(existing[-1].path.name if old else None)
        if newest is None:
            return []
        verified_together(ranks, folder / newest, disk=disk)
        return ranks.together(delete)[0]
    except (RanksError, DamagedError) as failed:
        raise CheckpointError(f"old checkpoints in {folder} are kept: {failed}", folder) from failed


def _old_ones(existing: list[StepDirectory], keep_last: int, keep_every: int | None, disk: Disk) -> list[StepDirectory]:
    """Those before the keep_last-th newest that looks whole, but for multiples of keep_every; oldest first."""
    num_whole = 0
    for number in reversed(range(len(existing))):
        num_whole += _looks_whole(existing[number], disk)
        if num_whole == keep_last:
            return [entry for entry in existing[:number] if keep_every is None or entry.step % keep_every]
    return []


def _looks_whole(directory: StepDirectory, disk: Disk) -> bool:
    """Whether the index is sound and the files have their sizes. The files' bytes are not read."""
    try:
        index = read_index(directory.path, disk=disk)
        return all((directory.path / name).lstat().st_size == file.size for name, file in index.files.items())
    except (OSError, DamagedError):
        return False
