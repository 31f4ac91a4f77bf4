"""The undisturbed run of each layout: what every disturbed run must end with, to the last bit."""

import hashlib
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import megalith.train
from megalith.checkpoint.directory import list_checkpoints
from megalith.checkpoint.index import Index
from megalith.checkpoint.saver import AsyncSaver
from megalith.checkpoint.verify import verify
from megalith.data.loader import Batch, Loader
from megalith.job import Job
from megalith.keeper import Keeper
from megalith.monitor.events import StepDone
from tests.faults.cluster import run_ranks
from tests.faults.disk import Disturbance, Operation, recorded, recording, undisturbed
from tests.layouts.runs import write_data
from tests.records import read_records

SAVE_INTERVAL = 2

MODEL = f"""
    --num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16
    --micro-batch-size 1 --global-batch-size 4 --lr 1e-2 --lr-warmup-iters 2 --weight-decay 0.1
    --tokenizer-type ByteLevelTokenizer --make-vocab-size-divisible-by 8 --log-interval 1 --log-params-norm
    --eval-interval 3 --eval-iters 1 --save-interval {SAVE_INTERVAL}
    --log-format json --device cpu
""".split()


class Scenario(NamedTuple):
    """A layout that is put under faults."""

    name: str
    world_size: int
    words: tuple[str, ...]
    last_step: int = 6
    keep_last: int = 2

    @property
    def retention(self) -> tuple[str, ...]:
        """The words that let old checkpoints go: at the last save of the run, if not before."""
        return ("--keep-last", str(self.keep_last))


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        # With fp16, so that there is a loss scale that changes: those of steps 1, 4 and 5 overflow.
        Scenario("one", 1, ("--fp16", "--initial-loss-scale", "524288", "--loss-scale-window", "2")),
        Scenario("pp2", 2, ("--pipeline-model-parallel-size", "2")),
        # Two saves only, for each run keeps four processes busy.
        Scenario("dp2tp2", 4, ("--tensor-model-parallel-size", "2"), last_step=4, keep_last=1),
    )
}


@dataclass(frozen=True)
class Twin:
    """What the undisturbed run did."""

    scenario: Scenario
    data: Path
    indices: dict[int, Index]  # of a checkpoint of each step
    printed: dict[str, Any]  # as `printed_in` gives them
    taken: dict[tuple[int, int], str]  # by rank and step, as `taken_in` gives them
    operations: list[list[Operation]]  # of each rank, when old checkpoints go
    seconds: float = 0.0  # that it took

    @property
    def saved_steps(self) -> list[int]:
        """The steps of which it has written a checkpoint."""
        return [step for step in self.indices if step % SAVE_INTERVAL == 0]

    @property
    def folder(self) -> Path:
        """Where its runs lie, by the names that `make_twin` gives them."""
        return self.data.parent

    def words(self, save: Path, *more: str) -> list[str]:
        """The command of this run, into another run directory."""
        steps = ["--train-iters", str(self.scenario.last_step)]
        given = [*MODEL, *steps, *self.scenario.words, "--data-path", str(self.data), "--save", str(save), *more]
        return ["pretrain", *given]

    def lane(self, rank: int, lane: str) -> list[Operation]:
        """What a rank's disk does in a lane, in that order."""
        return [operation for operation in self.operations[rank] if operation.lane == lane]


def make_twin(scenario: Scenario, folder: Path) -> Twin:
    """Run it: with a checkpoint of each step, with another seed, with all checkpoints, and as the disturbed ones."""
    folder.mkdir()
    twin = Twin(scenario, write_data(folder), {}, {}, {}, [])
    seconds = 0.0
    for name, more, disturb in (
        ("each", ("--save-interval", "1"), undisturbed),
        ("other", ("--seed", "4321"), undisturbed),
        ("all", (), undisturbed),
        ("some", scenario.retention, recording(folder)),
    ):
        save = folder / name
        save.mkdir()

        def on_rank(rank: int, save: Path = save, disturb: Disturbance = disturb) -> None:
            note_steps(save, rank)
            disturb(rank)

        started = time.monotonic()
        ended = run_ranks(twin.words(save, *more), scenario.world_size, folder, disturb=on_rank)
        seconds = time.monotonic() - started
        assert set(ended.statuses) == {0}, ended.said
    return replace(
        twin,
        indices={found.step: verify(found.path) for found in list_checkpoints(folder / "each")},
        printed=printed_in(folder / "all"),
        taken={(entry.rank, entry.step): entry.digest for entry in taken_in(folder / "all")},
        operations=[recorded(folder, rank) for rank in range(scenario.world_size)],
        seconds=seconds,
    )


class Taken(NamedTuple):
    """A step that a rank has begun."""

    rank: int
    attempt: int  # process number of the rank
    step: int
    digest: str  # of its samples' numbers and of all their contents


def note_steps(save: Path, rank: int) -> None:
    """From now on, write down which samples this rank trains on in which step, and which checkpoints it begins."""
    to = os.open(save / f"taken-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    step_batch, take_step, begin_save = Loader.step_batch, megalith.train.take_step, AsyncSaver.save
    digests: list[str] = []

    def noting_batch(loader: Loader, consumed_samples: int, num_microbatches: int) -> list[Batch]:
        batches = step_batch(loader, consumed_samples, num_microbatches)
        sha256 = hashlib.sha256()
        for batch in batches:
            for name in sorted(batch):
                sha256.update(name.encode() + batch[name].contiguous().numpy().tobytes())
        digests.append(sha256.hexdigest())
        return batches

    def noting_step(job: Job, keeper: Keeper) -> StepDone:
        digests.clear()
        done = take_step(job, keeper)
        os.write(to, f"{json.dumps([rank, os.getpid(), done.step, digests[0]])}\n".encode())
        return done

    def noting_save(saver: AsyncSaver, step: int, *what: Any, **how: Any) -> float:
        # The one before has been waited for.
        os.write(to, f"{json.dumps([rank, os.getpid(), step, 'save'])}\n".encode())
        return begin_save(saver, step, *what, **how)

    setattr(Loader, "step_batch", noting_batch)  # noqa: B010 - mypy forbids to assign a method
    setattr(AsyncSaver, "save", noting_save)  # noqa: B010
    megalith.train.take_step = noting_step


def noted_in(save: Path, *, rank: int | None = None) -> list[Taken]:
    """What all starts of a run directory have noted, each rank's, or one's, in its order."""
    paths = sorted(save.glob(f"taken-{'*' if rank is None else rank}"))
    return [Taken(*json.loads(line)) for path in paths for line in path.read_text().splitlines()]


def taken_in(save: Path) -> list[Taken]:
    """The steps that all starts of a run directory have taken, each rank's in its order."""
    return [entry for entry in noted_in(save) if entry.digest != "save"]


STEP_FIGURES = (
    "losses",
    "grad_norm",
    "params_norm",
    "learning_rate",
    "loss_scale",
    "skipped",
    "consumed_samples",
    "global_batch_size",
)


def printed_in(save: Path) -> dict[str, Any]:
    """The figures that a run has printed, at full precision; AssertionError if a step was printed in two ways."""
    printed: dict[str, Any] = {}
    for record in read_records(save / "log.jsonl")[0]:
        if record["event"] == "step_done":
            key = f"step {record['step']}"
            figures = {name: record[name] for name in STEP_FIGURES}
        elif record["event"] == "evaluated":
            key = f"{'final ' if record['final'] else ''}{record['split']} at step {record['step']}"
            figures = record["losses"]
        else:
            continue
        if printed.setdefault(key, figures) != figures:
            raise AssertionError(f"{key} was printed as {printed[key]} and as {figures}")
    return printed
