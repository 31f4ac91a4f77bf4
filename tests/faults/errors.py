"""A disk that fails, is slow, writes in parts or lies: the run goes on, or ends and says why, and saving recovers."""

import errno
import os
import random
import resource
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from tests.faults.cases import Case, Trial
from tests.faults.cluster import Ended
from tests.faults.disk import Disturbance, Operation, Point, failing, lying, shortening, slow
from tests.faults.judge import (
    Outcome,
    WrongError,
    check_checkpoints,
    check_finished,
    check_left,
    check_warned_of,
    lost_saves_in,
    steps_done_again,
    told_of_damage,
    warnings_in,
)

CODES = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EINTR, errno.EACCES, errno.EMFILE, errno.ENAMETOOLONG)
AT_EACH = 3  # errors that are tried at each operation; neighbours differ, so that each kind of operation meets all
FOR_EVER = 1 << 30  # operations
REFUSED, NOT_SAVED = 2, 74
# What the others end with when one refuses to start.
FOLLOWED = (0, REFUSED, 77, -9)


def every_error(trial: Trial, lanes: Sequence[str] = ("save", "main")) -> list[Case]:
    """AT_EACH of the errors, in turns, at each operation of each rank's disk; then all is well again."""
    return [
        error_at(trial, rank, operation, code)
        for rank in range(trial.twin.scenario.world_size)
        for lane in lanes
        for operation in trial.twin.lane(rank, lane)
        for code in in_turns(operation.number)
    ]


def in_turns(number: int) -> list[int]:
    """The errors that are tried at the number-th operation."""
    return [CODES[(AT_EACH * number + turn) % len(CODES)] for turn in range(AT_EACH)]


def some_errors(trial: Trial, count: int, seed: int, *, for_ever: bool = False) -> list[Case]:
    """Some of them, spread over ranks, operations and errors. for_ever: the disk does not recover before a restart."""
    draw = random.Random(seed)
    cases = []
    for _ in range(count):
        rank = draw.randrange(trial.twin.scenario.world_size)
        operation = draw.choice(trial.twin.operations[rank])
        cases.append(error_at(trial, rank, operation, draw.choice(CODES), count=FOR_EVER if for_ever else 1))
    return cases


def error_at(trial: Trial, rank: int, operation: Operation, code: int, *, count: int = 1) -> Case:
    lasting = " and ever after" if count > 1 else ""
    place = f"{operation.lane} {operation.number}{lasting}, {operation.name} of {Path(operation.path).name}"
    name = f"{trial.twin.scenario.name}: {errno.errorcode[code]} on rank {rank} at {place}"
    point = Point(rank, operation.lane, operation.number)
    return Case(name, partial(_failed_there, trial, name, point, code, count))


def _failed_there(trial: Trial, name: str, point: Point, code: int, count: int, folder: Path) -> Iterator[Outcome]:
    save, struck = folder / "run", folder / "struck"
    ended = trial.start(save, disturb=failing(point, code, count=count, struck=struck))
    if point.lane == "save" and ended.status not in (0, NOT_SAVED):
        raise WrongError(f"an error of the disk ended the run with status {ended.status}: {ended.said}")
    place = save
    if struck.exists() and not struck.read_text().startswith(str(save)):
        place = trial.twin.data.parent
    yield after_error(trial, name, save, ended, os.strerror(code), place, lasting=count > 1)


def after_error(
    trial: Trial, name: str, save: Path, ended: Ended, sentence: str, place: Path, *, lasting: bool
) -> Outcome:
    """Whether the run told of it, and what becomes of it when the same command is given again to a disk that works.

    sentence: what the system calls the error. place: the directory of the file that it struck. lasting: nothing could
    be removed any more, either.
    """
    if strange := [status for status in ended.statuses if status not in (*FOLLOWED, NOT_SAVED)]:
        raise WrongError(f"a rank ended with status {strange[0]}: {ended.said}")
    check_checkpoints(trial.twin, save)
    refused = ended.status == REFUSED
    if refused and (sentence not in ended.said or str(place) not in ended.said):
        raise WrongError(f"refused without naming path and error: {ended.said!r}")
    lost = [] if refused else lost_saves_in(trial.twin, save)
    for step in lost:
        check_warned_of(save, step, sentence)
    # What could not be removed is for the next save or start.
    left = lasting or any("are kept" in text for text in warnings_in(save))
    if ended.status == 0:
        # It has gone on and saved since.
        check_finished(trial.twin, save)
        if not left:
            check_left(save)
    ended = trial.start(save)
    if ended.status != 0:
        raise WrongError(f"the run did not go on when the disk worked again, status {ended.status}: {ended.said}")
    if told_of_damage(save):
        raise WrongError("an error has left a damaged checkpoint behind")
    redone = steps_done_again(save, lost_saves=max(1, len(lost)))
    check_finished(trial.twin, save)
    check_left(save)
    if refused:
        return Outcome(name, "refused", redone=redone)
    told = lost or any(sentence in text for text in warnings_in(save))
    return Outcome(name, "recovered" if told else "finished-identical", redone=redone)


def harmless(trial: Trial) -> list[Case]:
    """A disk that is slow, or writes less than it is given: nothing comes of it."""
    world_size = trial.twin.scenario.world_size
    disturbances: dict[str, Disturbance] = {
        "every operation of a save takes 10 ms": slow(0.01),
        "every write takes half of what it gets": shortening(lambda size: size // 2),
        "every write takes 4093 bytes at most": shortening(lambda size: 4093),
    }
    for rank in range(world_size):
        disturbances[f"every operation of a save takes 20 ms on rank {rank}"] = slow(0.02, rank=rank)
    return [
        Case(name, partial(_harmless, trial, name, disturb))
        for words, disturb in disturbances.items()
        for name in [f"{trial.twin.scenario.name}: {words}"]
    ]


def _harmless(trial: Trial, name: str, disturb: Disturbance, folder: Path) -> Iterator[Outcome]:
    save = folder / "run"
    ended = trial.start(save, disturb=disturb)
    if ended.status != 0:
        raise WrongError(f"status {ended.status}: {ended.said}")
    if lost := [text for text in warnings_in(save) if "not written" in text]:
        raise WrongError(lost[0])
    check_finished(trial.twin, save)
    check_left(save)
    yield Outcome(name, "finished-identical", redone=steps_done_again(save))


def file_too_large(trial: Trial) -> list[Case]:
    """The kernel itself refuses to let a file grow, in the middle of a write: a short write, then an error."""
    name = f"{trial.twin.scenario.name}: no file may be larger than the log and a part of a shard"
    return [Case(name, partial(_file_too_large, trial, name))]


def _file_too_large(trial: Trial, name: str, folder: Path) -> Iterator[Outcome]:
    index = trial.twin.indices[trial.twin.scenario.last_step]
    limit = max(written.size for written in index.files.values()) - 100

    def on_rank(rank: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    save = folder / "run"
    ended = trial.start(save, disturb=on_rank)
    if ended.status != NOT_SAVED:
        raise WrongError(f"no checkpoint could be written, but the status is {ended.status}: {ended.said}")
    yield after_error(trial, name, save, ended, os.strerror(errno.EFBIG), save, lasting=True)


def lies(trial: Trial, count: int, seed: int) -> list[Case]:
    """A write of a checkpoint turns a bit and says that all is well; only one checkpoint is to be kept."""
    draw = random.Random(seed)
    cases = []
    for _ in range(count):
        rank = draw.randrange(trial.twin.scenario.world_size)
        writes = [operation for operation in trial.twin.lane(rank, "save") if operation.name == "write"]
        operation, bit = draw.choice(writes), draw.randrange(1 << 16)
        place = f"{operation.number}, write of {Path(operation.path).name}"
        name = f"{trial.twin.scenario.name}: rank {rank} turns bit {bit} unnoticed at save {place}"
        cases.append(Case(name, partial(_lied_there, trial, name, Point(rank, "save", operation.number), bit)))
    return cases


def _lied_there(trial: Trial, name: str, point: Point, bit: int, folder: Path) -> Iterator[Outcome]:
    save = folder / "run"
    ended = trial.start(save, disturb=lying(point, bit), more=("--keep-last", "1"))
    if ended.status != 0:
        raise WrongError(f"status {ended.status}: {ended.said}")
    yield after_lie(trial, name, save)


def after_lie(trial: Trial, name: str, save: Path) -> Outcome:
    """Retention has noticed it, so an older checkpoint is there to go on from; or a later save has replaced it."""
    noticed = any("are kept" in text for text in warnings_in(save))
    ended = trial.start(save, more=("--keep-last", "1"))
    if ended.status != 0:
        raise WrongError(f"nothing to go on from: {ended.said}")
    lost = told_of_damage(save)
    if lost and not noticed:
        raise WrongError("the damaged checkpoint was trusted when older ones were deleted")
    check_finished(trial.twin, save)
    return Outcome(name, "recovered" if noticed else "finished-identical", redone=steps_done_again(save, lost_saves=2))
