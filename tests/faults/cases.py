"""Cases of a campaign, and running them: each in a folder of its own, judged, on as many processes as there are."""

import json
import os
import select
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.cluster import Ended, run_ranks
from tests.faults.disk import Disturbance, undisturbed
from tests.faults.judge import Outcome, WrongError
from tests.faults.twin import Scenario, Twin, make_twin, note_steps

JUDGE = "the judge: "  # how the words on a fault of the campaign itself begin


@dataclass(frozen=True)
class Trial:
    """A layout, and the version of the code that is tried: the real one, unless a mutant is put into every rank."""

    twin: Twin
    mutate: Disturbance = undisturbed

    def start(
        self, save: Path, *, disturb: Disturbance = undisturbed, more: Sequence[str] = (), **settings: Any
    ) -> Ended:
        """Start the run, or go on with it, as `run_ranks` does; what it takes is noted in the run directory.

        more: further words, which take the place of those that let old checkpoints go.
        """
        save.mkdir(exist_ok=True)

        def on_rank(rank: int) -> None:
            note_steps(save, rank)
            self.mutate(rank)
            disturb(rank)

        words = self.twin.words(save, *(more or self.twin.scenario.retention))
        ended = run_ranks(words, self.twin.scenario.world_size, save.parent, disturb=on_rank, **settings)
        if ended.hung:
            raise WrongError(f"a rank hung: statuses {ended.statuses}; {ended.said[-500:]}")
        if ended.raised:
            raise WrongError(f"a traceback instead of a sentence: {ended.said[-1500:]}")
        return ended


class Case(NamedTuple):
    """A case, or many alike that are tried in one process. run gets an empty folder."""

    name: str
    run: Callable[[Path], Iterable[Outcome]]


def outcomes_of(case: Case, root: Path) -> Iterator[Outcome]:
    """Run a case in a new folder; what goes wrong is a failure."""
    folder = Path(tempfile.mkdtemp(dir=root, prefix="case-"))
    try:
        yield from _timed(case.run(folder))
    except WrongError as wrong:
        yield Outcome(case.name, "failure", str(wrong))
    except Exception:  # whatever a run did that its judge did not expect
        yield Outcome(case.name, "failure", f"{JUDGE}{traceback.format_exc()[-1500:]}")
    finally:
        shutil.rmtree(folder)


def _timed(outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """The outcomes, with the seconds that each took, if nobody has said that yet."""
    started = time.monotonic()
    for outcome in outcomes:
        yield replace(outcome, seconds=outcome.seconds or time.monotonic() - started)
        started = time.monotonic()


def run_cases(cases: Sequence[Case], root: Path, *, jobs: int = 1, until_failure: bool = False) -> list[Outcome]:
    """The outcomes of all cases, run by that many processes; until_failure: no more once one has failed."""
    if jobs == 1:
        outcomes: list[Outcome] = []
        for case in cases:
            for outcome in outcomes_of(case, root):
                outcomes.append(outcome)
                if until_failure and outcome.kind == "failure":
                    return outcomes
        return outcomes
    sys.stdout.flush()
    pids, said = [], {}
    for number in range(jobs):
        from_worker, to = os.pipe()
        pid = os.fork()
        if pid == 0:
            _work(cases[number::jobs], root, to)
        # Before the next one is forked, which would keep it open.
        os.close(to)
        pids.append(pid)
        said[from_worker] = bytearray()
    outcomes = [Outcome(**json.loads(line)) for text in _read_all(said) for line in text.splitlines()]
    for pid in pids:
        if os.waitpid(pid, 0)[1]:
            outcomes.append(Outcome("a worker", "failure", "it died"))
    return outcomes


def _read_all(said: dict[int, bytearray]) -> Iterable[bytearray]:
    """What comes through pipes until all are closed; from all at once, for a writer waits when its pipe is full."""
    poll = select.poll()
    for pipe in said:
        poll.register(pipe, select.POLLIN)
    left = len(said)
    while left:
        for pipe, _ in poll.poll():
            data = os.read(pipe, 1 << 16)
            said[pipe] += data
            if not data:
                poll.unregister(pipe)
                os.close(pipe)
                left -= 1
    return said.values()


def _work(cases: Sequence[Case], root: Path, to: int) -> None:
    """The life of a worker."""
    status = 1
    try:
        with os.fdopen(to, "w") as lines:
            for case in cases:
                for outcome in outcomes_of(case, root):
                    print(json.dumps(asdict(outcome)), file=lines, flush=True)
        status = 0
    finally:
        os._exit(status)


def forked(work: Callable[[], Iterable[Outcome]], mutate: Disturbance) -> list[Outcome]:
    """What the work gives in a child, in which a mutant may change the code."""
    from_child, to = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            mutate(0)
            with os.fdopen(to, "w") as lines:
                for outcome in _timed(work()):
                    print(json.dumps(asdict(outcome)), file=lines)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(to)
    with os.fdopen(from_child) as lines:
        outcomes = [Outcome(**json.loads(line)) for line in lines]
    if os.waitpid(pid, 0)[1]:
        raise WrongError("the process in which the code was tried died")
    return outcomes


class Grounds:
    """The twins, each made once, in a folder in memory where there is one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._twins: dict[str, Twin] = {}

    def twin(self, scenario: Scenario) -> Twin:
        if scenario.name not in self._twins:
            self._twins[scenario.name] = make_twin(scenario, self.root / scenario.name)
        return self._twins[scenario.name]
