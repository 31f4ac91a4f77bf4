"""Kills: at every operation of every save, on every rank; and at random moments, of any rank or of all."""

import random
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from tests.faults.cases import Case, Trial
from tests.faults.cluster import Ended
from tests.faults.disk import LANES, Disturbance, Moment, Operation, Point, killing, undisturbed
from tests.faults.judge import (
    Outcome,
    WrongError,
    check_checkpoints,
    check_finished,
    check_left,
    check_went_on_from,
    newest_step,
    steps_done_again,
    told_of_damage,
)
from tests.faults.twin import noted_in

MOMENTS: tuple[Moment, ...] = ("before", "after")
MOST_STARTS = 3
STOPPED = 75
# A rank that lost another: it says so, or is ended by the launcher.
FOLLOWED = (0, 77, -9)


def every_kill(trial: Trial, lane: str = "save", *, once: bool = False) -> list[Case]:
    """A kill before and after each operation that each rank's disk does in a lane.

    once: only before a write that another operation follows: after it is before the next, but for a digest in memory.
    """
    return [
        kill_at(trial, rank, operation, moment)
        for rank in range(trial.twin.scenario.world_size)
        for operation in trial.twin.lane(rank, lane)
        for moment in MOMENTS
        if not (once and moment == "after" and operation.name == "write")
    ]


def some_kills(trial: Trial, count: int, seed: int, lane: str = "save") -> list[Case]:
    """Some of them, spread over ranks and operations."""
    cases = every_kill(trial, lane)
    return random.Random(seed).sample(cases, min(count, len(cases)))


def kill_at(trial: Trial, rank: int, operation: Operation, moment: Moment) -> Case:
    place = f"{operation.lane} {operation.number}, {operation.name} of {Path(operation.path).name}"
    name = f"{trial.twin.scenario.name}: kill -9 of rank {rank} {moment} {place}"
    point = Point(rank, operation.lane, operation.number, moment)
    return Case(name, partial(_killed_there, trial, name, point))


def _killed_there(trial: Trial, name: str, point: Point, folder: Path) -> Iterator[Outcome]:
    ended = trial.start(folder / "run", disturb=killing(point))
    if ended.statuses[point.rank] != -9 and point.lane == "save":
        raise WrongError(f"nobody was killed there: statuses {ended.statuses}; {ended.said}")
    yield after_kill(trial, name, folder / "run", ended)


def after_kill(trial: Trial, name: str, save: Path, ended: Ended, kills: Sequence[Disturbance] = ()) -> Outcome:
    """What becomes of the run when the same command is given again; it may be killed again, too."""
    if strange := [status for status in ended.statuses if status not in FOLLOWED]:
        raise WrongError(f"a rank ended with status {strange[0]} when another was killed: {ended.said}")
    check_checkpoints(trial.twin, save)
    for disturb in [*kills, undisturbed]:
        newest, num_noted = newest_step(save), len(noted_in(save, rank=0))
        ended = trial.start(save, disturb=disturb)
        check_checkpoints(trial.twin, save)
        noted = noted_in(save, rank=0)[num_noted:]
        check_went_on_from(newest, noted)
    if ended.status != 0:
        raise WrongError(f"the run did not go on, status {ended.status}: {ended.said}")
    if told_of_damage(save):
        raise WrongError("a kill has left a damaged checkpoint behind")
    redone = steps_done_again(save)
    check_finished(trial.twin, save)
    check_left(save)
    return Outcome(name, "finished-identical", redone=redone)


def random_kills(trial: Trial, count: int, seed: int) -> list[Case]:
    """Kills of one rank or of all, in turns at a random operation and at a random time; a third are killed again."""
    return [
        Case(
            f"{trial.twin.scenario.name}: random kill {seed}-{number}", partial(_killed_somewhere, trial, seed, number)
        )
        for number in range(count)
    ]


def _killed_somewhere(trial: Trial, seed: int, number: int, folder: Path) -> Iterator[Outcome]:
    draw = random.Random(f"{seed}-{number}")
    world_size = trial.twin.scenario.world_size
    name = f"{trial.twin.scenario.name}: random kill {seed}-{number}"
    again = [killing(_random_point(trial, draw)) for _ in range(MOST_STARTS - 1) if draw.random() < 1 / 3]
    if number % 2:
        ended = trial.start(folder / "run", disturb=killing(_random_point(trial, draw)))
    else:
        at = draw.uniform(0.0, trial.twin.seconds)
        victims = draw.choice([[draw.randrange(world_size)], list(range(world_size))])
        ended = trial.start(folder / "run", kill_after=lambda seconds: victims if seconds >= at else ())
    yield after_kill(trial, name, folder / "run", ended, again)


def _random_point(trial: Trial, draw: random.Random) -> Point:
    rank = draw.randrange(trial.twin.scenario.world_size)
    operation = draw.choice(trial.twin.lane(rank, draw.choice(LANES)) or trial.twin.lane(rank, "save"))
    return Point(rank, operation.lane, operation.number, draw.choice(MOMENTS))


def stops(trial: Trial, count: int, seed: int, *, limit: float = 60.0) -> list[Case]:
    """SIGTERM, SIGINT or SIGUSR1 to one rank while it saves: all stop after the same step, saved. limit: seconds."""
    draw = random.Random(seed)
    cases = []
    for _ in range(count):
        rank = draw.randrange(trial.twin.scenario.world_size)
        operation = draw.choice(trial.twin.lane(rank, "save")[: len(trial.twin.lane(rank, "save")) // 2])
        number = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
        name = f"{trial.twin.scenario.name}: {number.name} to rank {rank} at save {operation.number}"
        cases.append(Case(name, partial(_stopped, trial, name, Point(rank, "save", operation.number), number, limit)))
    return cases


def _stopped(
    trial: Trial, name: str, point: Point, number: signal.Signals, limit: float, folder: Path
) -> Iterator[Outcome]:
    save = folder / "run"
    ended = trial.start(save, disturb=killing(point, number), limit=limit)
    if set(ended.statuses) not in ({STOPPED}, {0}):
        raise WrongError(f"not all ranks stopped alike: {ended.statuses}; {ended.said}")
    check_checkpoints(trial.twin, save)
    ended = trial.start(save)
    if ended.status != 0:
        raise WrongError(f"the run did not go on, status {ended.status}: {ended.said}")
    if redone := steps_done_again(save):
        raise WrongError(f"{redone} steps were done again after a stop that had saved")
    check_finished(trial.twin, save)
    yield Outcome(name, "finished-identical")
