"""The fault campaign: `python -m tests.faults.campaign` runs it, prints its figures, and fails if anything failed.

Each section gives cases of one class; each case ends as one of three things, or as a failure. The mutants come last: a
campaign that passes a bad variant is a failure itself.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from megalith import __version__
from tests.faults.bad_files import Subject, bad_files
from tests.faults.cases import Case, Grounds, Trial, run_cases
from tests.faults.damage import bit_flips, damages_loaded, damages_met
from tests.faults.errors import every_error, file_too_large, harmless, lies, some_errors
from tests.faults.judge import Outcome, Tally
from tests.faults.kills import every_kill, random_kills, some_kills, stops
from tests.faults.mutants import MUTANTS, catch
from tests.faults.power_loss import power_losses, power_losses_of_maps
from tests.faults.subjects import CheckpointIndex, Maps, TokenFiles, Tokenizers
from tests.faults.twin import SCENARIOS

SEED = 20251125
SHOWN_FAILURES = 20


class Amount(NamedTuple):
    """How many cases: in the quick tier, and in the whole; EVERY for all there are."""

    quick: int
    full: int

    def of(self, tier: str) -> int:
        return self.quick if tier == "quick" else self.full


EVERY = 1 << 30


@dataclass(frozen=True)
class Section:
    """A class of cases. cases: for a layout and a tier; a layout that is not in amounts has none."""

    title: str
    amounts: dict[str, Amount]
    cases: Callable[[Trial, int], list[Case]]


def spread(cases: list[Case], count: int) -> list[Case]:
    """So many of the cases, evenly over all."""
    return cases if count >= len(cases) else [cases[number * len(cases) // count] for number in range(count)]


SECTIONS = [
    Section(
        "kill at an operation of a save",
        {"one": Amount(8, EVERY), "pp2": Amount(3, EVERY), "dp2tp2": Amount(1, EVERY)},
        lambda trial, count: (
            every_kill(trial, once=trial.twin.scenario.world_size > 1)
            if count == EVERY
            else some_kills(trial, count, SEED)
        ),
    ),
    Section(
        "kill at an operation outside of saves",
        {"one": Amount(3, EVERY), "pp2": Amount(1, 80), "dp2tp2": Amount(1, 40)},
        lambda trial, count: spread(every_kill(trial, "main"), count),
    ),
    Section(
        "kill at a random moment",
        {"one": Amount(4, 100), "pp2": Amount(2, 60), "dp2tp2": Amount(1, 40)},
        lambda trial, count: random_kills(trial, count, SEED),
    ),
    Section(
        "signal to one rank in a save",
        {"one": Amount(2, 20), "pp2": Amount(2, 20), "dp2tp2": Amount(1, 10)},
        lambda trial, count: stops(trial, count, SEED),
    ),
    Section(
        "one error of the disk",
        {"one": Amount(10, EVERY), "pp2": Amount(3, 200), "dp2tp2": Amount(1, 60)},
        lambda trial, count: every_error(trial) if count == EVERY else some_errors(trial, count, SEED),
    ),
    Section(
        "errors of the disk from then on",
        {"one": Amount(5, 60), "pp2": Amount(2, 30), "dp2tp2": Amount(1, 12)},
        lambda trial, count: some_errors(trial, count, SEED, for_ever=True),
    ),
    Section("file larger than allowed", {"one": Amount(1, 1), "pp2": Amount(1, 1)}, lambda t, count: file_too_large(t)),
    Section(
        "slow disk, short writes",
        {"one": Amount(3, EVERY), "pp2": Amount(1, EVERY), "dp2tp2": Amount(0, EVERY)},
        lambda trial, count: spread(harmless(trial), count),
    ),
    Section("silent flip while writing", {"one": Amount(6, 60), "pp2": Amount(3, 30)}, lambda t, n: lies(t, n, SEED)),
    Section(
        "power loss in a run",
        {"one": Amount(0, 8), "pp2": Amount(0, 6), "dp2tp2": Amount(0, 4)},
        lambda trial, drawn: power_losses(trial, drawn=drawn, seed=SEED, restarts=4 if drawn == 0 else 40),
    ),
    Section(
        "bit flip in a checkpoint",
        {"one": Amount(300, 1000), "pp2": Amount(100, 500), "dp2tp2": Amount(100, 500)},
        lambda trial, count: bit_flips(trial, count, SEED),
    ),
    Section(
        "other damage to a checkpoint",
        {"one": Amount(1, 10), "pp2": Amount(1, 10), "dp2tp2": Amount(1, 10)},
        lambda trial, rounds: damages_loaded(trial, SEED, rounds=rounds),
    ),
    Section(
        "damaged checkpoint met by the command",
        {"one": Amount(8, EVERY), "pp2": Amount(4, EVERY), "dp2tp2": Amount(4, 20)},
        lambda trial, count: spread(damages_met(trial, SEED), count),
    ),
]

KINDS = ("GPT2BPETokenizer", "BertWordPieceCase", "HuggingFaceTokenizer", "SentencePieceTokenizer")


def subjects(grounds: Grounds) -> Iterator[tuple[Subject, Amount]]:
    """The kinds of files that are mutated, and how many of each."""
    twin = grounds.twin(SCENARIOS["one"])
    yield TokenFiles(whole=False), Amount(400, 4000)
    yield TokenFiles(whole=True), Amount(200, 2000)
    yield Maps(), Amount(100, 1500)
    yield CheckpointIndex(twin), Amount(100, 1500)
    yield CheckpointIndex(twin, signed=True), Amount(50, 500)
    for kind in KINDS:
        yield Tokenizers(kind, saved=True), Amount(50, 250)
        yield Tokenizers(kind, saved=False), Amount(50, 250)


def run_section(section: Section, grounds: Grounds, *, layout: str, tier: str, jobs: int) -> Tally:
    """The outcomes of a section's cases on a layout."""
    tally = Tally(section.title)
    if layout in section.amounts:
        trial = Trial(grounds.twin(SCENARIOS[layout]))
        cases = section.cases(trial, section.amounts[layout].of(tier))
        tally.add(run_cases(cases, grounds.root, jobs=jobs))
    return tally


def run_bad_files(grounds: Grounds, *, tier: str, jobs: int) -> list[Tally]:
    tallies = []
    for subject, amount in subjects(grounds):
        tally = Tally(f"bad file: {subject.name}")
        count = amount.of(tier)
        tally.add(run_cases(bad_files(subject, count, SEED, per_case=-(-count // jobs)), grounds.root, jobs=jobs))
        tallies.append(tally)
    return tallies


def run_mutants(grounds: Grounds, *, jobs: int, names: Sequence[str] | None = None) -> Tally:
    """Whether each bad variant is caught."""
    tally = Tally("mutants")
    for mutant in MUTANTS:
        grounds.twin(SCENARIOS[mutant.scenario])  # made here, once for all workers
    chosen = [mutant for mutant in MUTANTS if names is None or mutant.name in names]
    cases = [Case(f"mutant: {mutant.name}", lambda folder, m=mutant: [catch(m, grounds)]) for mutant in chosen]  # type: ignore[misc]
    tally.add(run_cases(cases, grounds.root, jobs=jobs))
    return tally


@contextmanager
def grounds_in_memory() -> Iterator[Grounds]:
    """A folder for everything, in memory where there is one: syncs of a shared disk would take most of the time."""
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    root = Path(tempfile.mkdtemp(dir=in_memory, prefix="megalith-faults-"))
    try:
        yield Grounds(root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


HEADER = f"{'class of cases':<42}{'layout':<8}{'cases':>7}{'identical':>10}{'recovered':>10}{'refused':>8}"
HEADER += f"{'failures':>9}{'redone':>7}{'slowest':>9}"


def row(tally: Tally, layout: str) -> str:
    """One line of the table. redone: the most steps that one start took again; slowest: seconds of a case."""
    counts, redone = tally.counts, max((outcome.redone for outcome in tally.outcomes), default=0)
    slowest = max((outcome.seconds for outcome in tally.outcomes), default=0.0)
    kinds = f"{counts['finished-identical']:>10}{counts['recovered']:>10}{counts['refused']:>8}{counts['failure']:>9}"
    return f"{tally.title:<42}{layout:<8}{len(tally.outcomes):>7}{kinds}{redone:>7}{slowest:>8.2f}s"


def conditions() -> str:
    """Where and with what the figures were measured."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    cpus = len(os.sched_getaffinity(0))
    return (
        f"megalith {__version__} at {commit}; Python {platform.python_version()}, torch {torch.__version__}, numpy "
        f"{np.__version__}; {platform.system()} {platform.release()}, {cpus} CPU cores, load {os.getloadavg()[0]:.1f}"
    )


def run_campaign(
    tier: str, layouts: Sequence[str], titles: Sequence[str], *, jobs: int, say: Callable[[str], None]
) -> list[Outcome]:
    """Run everything, say each row of the table when it is known, and give the failures. titles: only these."""
    failures: list[Outcome] = []
    total, started = 0, time.monotonic()

    def told(tally: Tally, layout: str) -> None:
        nonlocal total
        total += len(tally.outcomes)
        failures.extend(tally.failures)
        if tally.outcomes:
            say(row(tally, layout))

    say(conditions())
    say(HEADER)
    with grounds_in_memory() as grounds:
        for section in SECTIONS:
            for layout in layouts if not titles or section.title in titles else ():
                told(run_section(section, grounds, layout=layout, tier=tier, jobs=jobs), layout)
        if not titles:
            losses = run_cases(power_losses_of_maps(drawn=4, seed=SEED), grounds.root)
            told(Tally("power loss in building index maps", losses), "")
            for tally in run_bad_files(grounds, tier=tier, jobs=jobs):
                told(tally, "")
            mutants = run_mutants(grounds, jobs=jobs)
            told(mutants, "")
            for outcome in mutants.outcomes:
                say(f"  {outcome.case}: {'SURVIVED' if outcome.kind == 'failure' else 'caught'}")
    say(f"{total} cases, {len(failures)} failures, {(time.monotonic() - started) / 60:.1f} minutes with {jobs} jobs")
    for failure in failures[:SHOWN_FAILURES]:
        say(f"FAILURE {failure.case}\n    {failure.why}")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.campaign", description=__doc__)
    tier = parser.add_mutually_exclusive_group()
    tier.add_argument("--quick", action="store_true", help="a sample of each class [default]")
    tier.add_argument("--full", action="store_true", help="everything")
    parser.add_argument("--layouts", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--only", nargs="+", choices=[section.title for section in SECTIONS], default=[])
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="cases at a time [default 2]")
    options = parser.parse_args()
    chosen = "full" if options.full else "quick"
    failures = run_campaign(
        chosen, options.layouts, options.only, jobs=options.jobs, say=lambda line: print(line, flush=True)
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
