"""Bad variants of Megalith's code: each function puts one into a process, which is a fork and ends with it.

They are what the campaign is tried on (mutants.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megalith.files
import megalith.train
from megalith import owner, passes, resume, run_state
from megalith.checkpoint import directory, index, retention, saver, store, verify
from megalith.checkpoint.directory import StepDirectory, folder_of, list_checkpoints, step_name
from megalith.checkpoint.pieces import file_of
from megalith.checkpoint.saver import HostCopy
from megalith.checkpoint.shards import write_shard
from megalith.checkpoint.store import Contents, Loaded
from megalith.data import inspect, kept_arrays, record
from megalith.data.loader import Batch, Loader
from megalith.files import Disk, Location, Written
from megalith.job import Job
from megalith.keeper import Keeper
from megalith.monitor.signals import StopSignals
from megalith.optim.loss_scale import DynamicLossScale
from megalith.ranks import Ranks
from tests.faults.disk import Disturbance


def put(owner: Any, **named: Any) -> None:
    """Put functions in the place of those that a class or module has."""
    for name, value in named.items():
        assert hasattr(owner, name), f"{owner} has no {name} to change"
        setattr(owner, name, value)


def nothing(*arguments: Any, **named: Any) -> None:
    """Instead of a function that does something."""


# Saving.


def manifest_before_shards(rank: int) -> None:
    """The directory gets its name, with an index of what is going to be written, then the shards are written."""

    class Nowhere(Disk):
        def create(self, path: Path) -> int:
            return 1 << 20

        def write(self, descriptor: int, data: memoryview) -> int:
            return len(data)

        sync = close = rename = remove = nothing
        open = create

    def write(
        ranks: Ranks, run_dir: Location, contents: Contents, own: Callable[[], Mapping[str, Tensor]], *, disk: Disk
    ) -> Path:
        folder, name = folder_of(run_dir), file_of(ranks.rank)
        temporary = ranks.together(lambda: store._prepare(run_dir, contents, disk) if ranks.rank == 0 else "")[0]
        written = write_shard(folder / temporary / name, own(), disk=Nowhere())
        listed = ranks.gather([name, written.size, written.digest])
        files = {file: Written(size, digest) for file, size, digest in listed}
        if ranks.rank == 0:
            store._commit(folder, temporary, contents, files, disk)
        ranks.gather(None)
        path = folder / step_name(contents.step)
        write_shard(path / name, own(), disk=disk)
        ranks.gather(None)
        return path

    put(saver, write=write)


def files_not_synced(rank: int) -> None:
    put(megalith.files._DigestedFile, sync=nothing)


def directories_not_synced(rank: int) -> None:
    for module in (megalith.files, store, directory):
        put(module, sync_directory=nothing)


def shards_written_in_place(rank: int) -> None:
    """Straight into the step's directory, over what may be there."""
    put(store, new_name=lambda kind, step: step_name(step))


def tracker_in_place(rank: int) -> None:
    """A file names the newest checkpoint, rewritten in place, and a start believes it."""
    write, listed = saver.write, store.list_checkpoints  # type: ignore[attr-defined]

    def writing(ranks: Ranks, run_dir: Location, contents: Contents, own: Any, *, disk: Disk) -> Path:
        path: Path = write(ranks, run_dir, contents, own, disk=disk)
        tracker = folder_of(run_dir) / "latest.txt"
        if ranks.rank == 0:
            if tracker.exists():
                disk.remove(tracker)
            descriptor = disk.create(tracker)
            disk.write(descriptor, memoryview(str(contents.step).encode()))
            disk.sync(descriptor)
            disk.close(descriptor)
        return path

    def list_tracked(run_dir: Location) -> list[StepDirectory]:
        tracker = folder_of(run_dir) / "latest.txt"
        found: list[StepDirectory] = listed(run_dir)
        return [entry for entry in found if entry.step == int(tracker.read_text())] if tracker.exists() else []

    put(saver, write=writing)
    put(store, list_checkpoints=list_tracked)


def weights_written_uncopied(rank: int) -> None:
    """The thread writes the weights as they are when their turn comes."""

    def copy(host: HostCopy, sources: Mapping[str, Tensor], ready: torch.cuda.Event | None) -> None:
        host.tensors.update(sources)

    put(HostCopy, copy=copy)


def short_writes_taken_for_whole(rank: int) -> None:
    def write(file: Any, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        file._sha256.update(rest)
        file._size += len(rest)
        file._disk.write(file._descriptor, rest)
        return len(rest)

    put(megalith.files._DigestedFile, write=write)


def deleted_before_saved(rank: int) -> None:
    """Room is made before there is anything newer."""
    prepare = store._prepare

    def preparing(run_dir: Location, contents: Contents, disk: Disk) -> str:
        for found in list_checkpoints(run_dir):
            directory.discard(found, disk=disk)
        return prepare(run_dir, contents, disk)

    put(store, _prepare=preparing)


def deleted_without_verifying(rank: int) -> None:
    put(retention, verified_together=nothing)


def remains_not_removed(rank: int) -> None:
    for module in (store, owner):
        put(module, discard_leftovers=nothing)


def failure_not_told(rank: int) -> None:
    def tell(keeper: Keeper, error: Exception, *, is_last: bool) -> None:
        keeper.failed, keeper._saved_step = True, None

    put(Keeper, _tell_failure=tell)


def failure_is_success(rank: int) -> None:
    """The exit status says that all is well, though the last checkpoint could not be written."""
    tell = Keeper._tell_failure

    def telling(keeper: Keeper, error: Any, *, is_last: bool) -> None:
        tell(keeper, error, is_last=is_last)
        keeper.failed = False

    put(Keeper, _tell_failure=telling)


def failure_ends_the_run(rank: int) -> None:
    def tell(keeper: Keeper, error: Exception, *, is_last: bool) -> None:
        raise error

    put(Keeper, _tell_failure=tell)


# Going on.


def changed_state(rank: int, change: Callable[[dict[str, Any]], None]) -> None:
    """What a start takes over beside the tensors is not what was saved."""
    restore = run_state.restore

    def restoring(job: Job, loaded: Loaded, *, with_optimizer: bool) -> None:
        state = dict(loaded.index.state)
        change(state)
        changed = replace(loaded, index=replace(loaded.index, state=state))
        restore(job, changed, with_optimizer=with_optimizer)

    put(resume, restore=restoring)


def restored(**values: Any) -> Disturbance:
    return lambda rank: changed_state(rank, lambda state: state.update(values))


def step_off_by_one(rank: int) -> None:
    changed_state(rank, lambda state: state.update(step=state["step"] + 1))


def loss_scale_not_restored(rank: int) -> None:
    put(DynamicLossScale, resumed=lambda scale, saved: scale)


def updates_not_restored(rank: int) -> None:
    put(run_state, set_num_updates=nothing)


def moments_not_restored(rank: int) -> None:
    load_latest = resume.load_latest  # type: ignore[attr-defined]

    def loading(run_dir: Location, wanted: Any, **named: Any) -> Any:
        def weights_only(index: Any) -> Any:
            return {name: piece for name, piece in wanted(index).items() if name.startswith(run_state.WEIGHT)}

        return load_latest(run_dir, weights_only, **{**named, "may_stay_unread": lambda name: True})

    put(resume, load_latest=loading)


def loader_restarted(rank: int) -> None:
    """Each start reads the data from its beginning."""
    step_batch = Loader.step_batch
    first: dict[int, int] = {}

    def from_start(loader: Loader, consumed_samples: int, num_microbatches: int) -> list[Batch]:
        first.setdefault(id(loader), consumed_samples)
        return step_batch(loader, consumed_samples - first[id(loader)], num_microbatches)

    put(Loader, step_batch=from_start)


def random_numbers_restarted(rank: int) -> None:
    """Dropout draws from a stream that each start begins anew, instead of by sample."""
    dropout_rows = passes.dropout_rows  # type: ignore[attr-defined]
    drawn = 0

    def next_rows(seed: int, samples: Tensor, num_places: int) -> Tensor:
        nonlocal drawn
        drawn += 1
        rows: Tensor = dropout_rows(seed, torch.full_like(samples, drawn), num_places)
        return rows

    put(passes, dropout_rows=next_rows)


def newest_passed_over(rank: int) -> None:
    """A start takes the checkpoint before the newest."""
    listed = store.list_checkpoints  # type: ignore[attr-defined]
    put(store, list_checkpoints=lambda run_dir: listed(run_dir)[:-1] or listed(run_dir))


def stop_not_agreed(rank: int) -> None:
    """Each rank follows its own signals."""

    def own_reason(job: Job, signals: StopSignals, *others: Any) -> str | None:
        return signals.received.name if signals.received is not None else None

    put(megalith.train, reason_to_stop=own_reason)


# Reading.


def digests_not_checked(rank: int) -> None:
    """Files are only looked at as far as it costs nothing: their sizes."""

    def sizes_only(path: Path, contents: index.Index, names: Sequence[str], *, disk: Disk) -> None:
        for name in names:
            if (path / name).lstat().st_size != contents.files[name].size:
                raise verify.DamagedError(f"{path / name} has another size")  # type: ignore[attr-defined]

    put(verify, check_files=sizes_only)


def index_digest_not_checked(rank: int) -> None:
    class Any64:
        """Equal to any digest."""

        def __eq__(self, other: object) -> bool:
            return True

        def __ne__(self, other: object) -> bool:
            return False

    put(index, digest_of_bytes=lambda data: Any64())


def map_digests_not_checked(rank: int) -> None:
    """Index maps are taken if they have the right sizes."""

    class SizeOnly(Written):
        def __ne__(self, other: object) -> bool:
            return isinstance(other, Written) and self.size != other.size

    recorded = kept_arrays._recorded_files

    def sized(wanted: kept_arrays.Wanted) -> dict[str, Written]:
        return {name: SizeOnly(file.size, file.digest) for name, file in recorded(wanted).items()}

    put(kept_arrays, _recorded_files=sized)


def records_not_checked(rank: int) -> None:
    """What preprocessing recorded of a token file is not looked at."""
    for module in (record, inspect):
        put(module, read_record=lambda prefix: None)
