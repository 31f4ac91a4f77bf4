"""Power loss at every operation: once the first commit has returned, some whole checkpoint is always there.

The states that a disk may be in are built from the recorded operations of all ranks (medium.py), so there are thousands
of them in seconds; some of them are laid down, and the run goes on from there.
"""

import hashlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megalith.checkpoint import saver
from megalith.checkpoint.directory import list_checkpoints
from megalith.checkpoint.shards import DamagedError
from megalith.checkpoint.verify import verify
from megalith.data.index_cache import load_or_build_index_maps
from tests.faults.cases import Case, Trial
from tests.faults.disk import Disturbance, Operation, note_operation, recorded, recording
from tests.faults.judge import Outcome, WrongError, check_checkpoints
from tests.faults.medium import DRAWN, LOSSES, Loss, Medium, lay_down
from tests.faults.twin import Twin

RETURNED = "returned"  # the name of what is noted when a save says that its checkpoint exists


def power_losses(trial: Trial, *, drawn: int, seed: int, restarts: int) -> list[Case]:
    """A loss of power after every operation of a run, each way, and some drawn ones; some runs go on from there."""
    name = f"{trial.twin.scenario.name}: power loss"
    return [Case(name, partial(_power_lost, trial, name, drawn, seed, restarts))]


def _power_lost(trial: Trial, name: str, drawn: int, seed: int, restarts: int, folder: Path) -> Iterator[Outcome]:
    operations = operations_of_all(trial, folder)
    states = States(operations, folder / "run", drawn=drawn, seed=seed)
    chosen = random.Random(seed)
    kept: list[State] = []
    for number, state in enumerate(states):
        yield judge_state(trial.twin, f"{name} {state.name}", state, folder / "state")
        # A fair choice among states whose number is not known yet.
        if len(kept) < restarts:
            kept.append(state)
        elif (place := chosen.randrange(number + 1)) < restarts:
            kept[place] = state
    for state in kept:
        yield _gone_on(trial, f"{name} {state.name}, then the same command", state, folder)


def operations_of_all(trial: Trial, folder: Path) -> list[Operation]:
    """What the disks of all ranks have done in an undisturbed run, with what was written, in the order of time."""

    def on_rank(rank: int) -> None:
        note_commits(folder)(rank)
        recording(folder, keeps_data=True)(rank)

    ended = trial.start(folder / "run", disturb=on_rank)
    if ended.status != 0:
        raise WrongError(f"undisturbed, but the status is {ended.status}: {ended.said}")
    world_size = trial.twin.scenario.world_size
    operations = [operation for rank in range(world_size) for operation in recorded(folder, rank)]
    return sorted(operations, key=lambda operation: operation.time)


def note_commits(folder: Path) -> Disturbance:
    """Notes among the operations of rank 0 when a save has returned: from then on its checkpoint is promised."""

    def on_rank(rank: int) -> None:
        if rank:
            return
        write: Callable[..., Path] = vars(saver)["write"]

        def noting(*arguments: Any, **named: Any) -> Path:
            path = write(*arguments, **named)
            note_operation(folder, rank, Operation("save", -1, RETURNED, str(path)))
            return path

        vars(saver)["write"] = noting

    return on_rank


class State(NamedTuple):
    """What a disk may hold after a power loss."""

    name: str
    promised: int  # the newest step whose save had returned; 0: none
    content: dict[str, bytes | None]
    digest: bytes


class States:
    """The states after each operation, each way, and drawn ones."""

    def __init__(self, operations: list[Operation], root: Path, *, drawn: int, seed: int) -> None:
        self._operations, self._root, self._drawn, self._seed = operations, root, drawn, seed

    def __iter__(self) -> Iterator[State]:
        draw = random.Random(self._seed)
        medium, promised = Medium(self._root), 0
        ways: list[Loss] = [*LOSSES, *(DRAWN[number % len(DRAWN)] for number in range(self._drawn))]
        for number, operation in enumerate(self._operations):
            if operation.name == RETURNED:
                promised = int(Path(operation.path).name.removeprefix("step-"))
            medium.do(operation)
            if operation.name in ("open", "read", "close"):
                continue
            for loss in ways:
                content = medium.surviving(loss, draw)
                name = f"after {number}, {operation.name} of {Path(operation.path).name}; lost: {loss}"
                yield State(name, promised, content, _digest(content))


def _digest(content: dict[str, bytes | None]) -> bytes:
    sha256 = hashlib.sha256()
    for name, data in content.items():
        sha256.update(f"{name} {-1 if data is None else len(data)} ".encode() + (data or b""))
    return sha256.digest()


def judge_state(twin: Twin, name: str, state: State, folder: Path) -> Outcome:
    """What has a checkpoint's name and verifies is the twin's; the newest promised one is there, or a newer one."""
    folder.mkdir()
    try:
        lay_down(state.content, folder)
        whole = [found for found in map(_whole_one, list_checkpoints(folder)) if found is not None]
        for index in whole:
            if not index.same_contents(twin.indices[index.step]):
                return Outcome(name, "failure", f"the checkpoint of step {index.step} verifies and is another")
        newest = max((index.step for index in whole), default=0)
        if newest < state.promised:
            return Outcome(
                name, "failure", f"step {state.promised} was committed, but the newest whole one is {newest}"
            )
        return Outcome(name, "recovered")
    finally:
        shutil.rmtree(folder)


def _whole_one(directory: Any) -> Any:
    try:
        return verify(directory.path)
    except (DamagedError, OSError):
        return None


def _gone_on(trial: Trial, name: str, state: State, folder: Path) -> Outcome:
    """The run after a power loss; the log, which is not synced, is taken for lost."""
    save = folder / "again"
    save.mkdir()
    try:
        lay_down(state.content, save)
        ended = trial.start(save)
        if ended.status != 0:
            return Outcome(name, "failure", f"status {ended.status}: {ended.said}")
        check_checkpoints(trial.twin, save)
        if not (steps := list_checkpoints(save)) or steps[-1].step != trial.twin.scenario.last_step:
            return Outcome(name, "failure", f"it ended with checkpoints of {[found.step for found in steps]}")
        return Outcome(name, "finished-identical")
    except WrongError as wrong:
        return Outcome(name, "failure", str(wrong))
    finally:
        shutil.rmtree(save)


def power_losses_of_maps(*, drawn: int, seed: int) -> list[Case]:
    """A loss of power after every operation of building the index maps of a data set."""
    return [Case("index maps: power loss", partial(_maps_lost, drawn, seed))]


LENGTHS = np.random.RandomState(5).randint(1, 30, 50).astype(np.int32)


def _maps_of(folder: Path) -> Any:
    return load_or_build_index_maps(
        folder / "data",
        "train",
        documents=range(40),
        lengths=LENGTHS,
        num_samples=60,
        sequence_length=16,
        seed=7,
    )[0]


def _maps_lost(drawn: int, seed: int, folder: Path) -> Iterator[Outcome]:
    source = folder / "maps"
    source.mkdir()
    in_child(lambda: (recording(folder, keeps_data=True)(0), _maps_of(source)))
    wanted = _maps_of(source)
    for state in States(recorded(folder, 0), source, drawn=drawn, seed=seed):
        place = folder / "state"
        place.mkdir()
        lay_down(state.content, place)
        found = _maps_of(place)
        same = all(
            np.array_equal(getattr(found, name), getattr(wanted, name))
            for name in ("doc_idx", "sample_idx", "shuffle_idx")
        )
        name = f"index maps: power loss {state.name}"
        yield Outcome(name, "recovered") if same else Outcome(name, "failure", "the maps are others")
        del found
        shutil.rmtree(place)


def in_child(work: Callable[[], Any]) -> None:
    """Do it in a forked child; WrongError if that fails."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise WrongError("a child failed")
