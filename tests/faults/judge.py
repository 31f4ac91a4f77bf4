"""What became of a disturbed run: finished as if nothing had happened, recovered, refused; all else is a failure."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megalith.checkpoint.directory import list_checkpoints, step_name
from megalith.checkpoint.index import Index
from megalith.checkpoint.shards import DamagedError
from megalith.checkpoint.verify import verify
from tests.faults.twin import SAVE_INTERVAL, Taken, Twin, noted_in, printed_in, taken_in
from tests.records import read_records

Kind = Literal["finished-identical", "recovered", "refused", "failure"]


@dataclass(frozen=True)
class Outcome:
    """How a case ended."""

    case: str
    kind: Kind
    why: str = ""
    redone: int = 0  # steps done again by one start, at the most
    seconds: float = 0.0  # that the case took


@dataclass
class Tally:
    """The outcomes of one section of the campaign."""

    title: str
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def counts(self) -> Counter[str]:
        return Counter(outcome.kind for outcome in self.outcomes)

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.kind == "failure"]

    def add(self, outcomes: Iterable[Outcome]) -> None:
        self.outcomes.extend(outcomes)


class WrongError(Exception):
    """What a run did that none may do."""


def check_checkpoints(twin: Twin, save: Path) -> None:
    """Every directory with a checkpoint's name holds the twin's checkpoint of that step, whole.

    Or that of a stop by a signal, which owes the evaluation of its step; that it is made is for `check_printed` to see.
    """
    for found in list_checkpoints(save):
        try:
            index = verify(found.path)
        except (DamagedError, OSError) as error:
            raise WrongError(f"a checkpoint that is none has its name: {error}") from error
        if found.step not in twin.indices:
            raise WrongError(f"the twin has no checkpoint of step {found.step}")
        if not any(map(index.same_contents, (twin.indices[found.step], *owing(twin, found.step)))):
            raise WrongError(f"the checkpoint of step {found.step} differs from the twin's{_difference(twin, index)}")


def owing(twin: Twin, step: int) -> list[Index]:
    """The twin's checkpoint as it was before the evaluation of that step, if it has made one there."""
    if step - 1 not in twin.indices:
        return []
    before, after = (twin.indices[number].state["consumed_valid_samples"] for number in (step - 1, step))
    state = {**twin.indices[step].state, "consumed_valid_samples": before, "owes": "interval"}
    return [replace(twin.indices[step], state=state)] if before != after else []


def _difference(twin: Twin, index: Any) -> str:
    wanted = twin.indices[index.step]
    state = [name for name in wanted.state if index.state.get(name) != wanted.state[name]]
    files = [name for name in wanted.files if index.files.get(name) != wanted.files[name]]
    return f": {', '.join(map(str, state + files))}"


def check_finished(twin: Twin, save: Path) -> None:
    """The run has ended as the twin: weights, optimizer, everything printed, every sample of every step."""
    check_checkpoints(twin, save)
    steps = [found.step for found in list_checkpoints(save)]
    if not steps or steps[-1] != twin.scenario.last_step:
        raise WrongError(f"the run says that it is finished, but its checkpoints are of steps {steps}")
    check_printed(twin, save)
    taken = taken_in(save)
    for entry in taken:
        if twin.taken[entry.rank, entry.step] != entry.digest:
            raise WrongError(f"rank {entry.rank} trained on other samples in step {entry.step}")
    if missing := twin.taken.keys() - {(entry.rank, entry.step) for entry in taken}:
        raise WrongError(f"rank and step {min(missing)} were never taken")
    newest = max(taken, key=lambda entry: entry.step).step
    if newest != twin.scenario.last_step:
        raise WrongError(f"the last step taken was {newest}")


def check_printed(twin: Twin, save: Path) -> None:
    """All that was printed of steps and validations is what the twin printed, and nothing is missing."""
    try:
        printed = printed_in(save)
    except AssertionError as error:
        raise WrongError(str(error)) from error
    for name, figures in printed.items():
        if twin.printed.get(name) != figures:
            raise WrongError(f"{name} was printed as {figures}, by the twin as {twin.printed.get(name)}")
    missing = [name for name in twin.printed if name not in printed]
    if missing:
        raise WrongError(f"{missing[0]} was never printed")


def check_left(save: Path) -> None:
    """Nothing half-written or half-deleted lies in the run directory."""
    left = [path.name for path in (save / "checkpoints").iterdir() if path.name.startswith(".")]
    left += [path.name for path in save.iterdir() if path.name.endswith(".tmp")]
    if left:
        raise WrongError(f"{left[0]} was left behind")


def steps_done_again(save: Path, *, lost_saves: int = 1) -> int:
    """How many steps a start has taken again, at the most.

    Raises WrongError if a start went on from more than lost_saves saves before the newest one that had been begun.
    """
    redone = 0
    begun = newest = attempt = 0
    for entry in noted_in(save, rank=0):
        if entry.attempt != attempt and entry.digest != "save":
            from_step = entry.step - 1
            if from_step < begun - lost_saves * SAVE_INTERVAL:
                raise WrongError(f"went on from step {from_step}, though a save of step {begun} had been begun")
            redone = max(redone, newest - from_step)
            attempt = entry.attempt
        if entry.digest == "save":
            begun = entry.step
        else:
            newest = entry.step
    return redone


def newest_step(save: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    found = list_checkpoints(save)
    return found[-1].step if found else 0


def check_went_on_from(step: int, noted: Sequence[Taken]) -> None:
    """A start has begun with the step after the newest checkpoint. noted: by its rank 0."""
    taken = [entry.step for entry in noted if entry.digest != "save"]
    if taken and taken[0] != step + 1:
        raise WrongError(f"a start began with step {taken[0]}, though there was a checkpoint of step {step}")


def warnings_in(save: Path) -> list[str]:
    """What the run has warned of, in all its starts."""
    path = save / "log.jsonl"
    records = read_records(path)[0] if path.exists() else []
    return [str(record["text"]) for record in records if record["event"] == "warned"]


def told_of_damage(save: Path) -> bool:
    """Whether a start has said that it passed a checkpoint over."""
    return any("is damaged and was not used" in text for text in warnings_in(save))


def lost_saves_in(twin: Twin, save: Path) -> list[int]:
    """The steps of which no start has said that their checkpoint is written, though all have ended."""
    path = save / "log.jsonl"
    records = read_records(path)[0] if path.exists() else []
    saved = {record["step"] for record in records if record["event"] == "checkpoint_saved"}
    return [step for step in twin.saved_steps if step not in saved]


def check_warned_of(save: Path, step: int, sentence: str) -> None:
    """The run has said which checkpoint was lost, where, and by which error."""
    path = str(save / "checkpoints" / step_name(step))
    if not any(f"{path} was not written" in text and sentence in text for text in warnings_in(save)):
        raise WrongError(f"nobody said that {path} was lost by {sentence!r}: {warnings_in(save)}")
