"""Thousands of bad files of every kind that Megalith reads, each read in a child that may crash, hang or lie.

A subject (subjects.py) makes files, and reads them back as a run does. After a mutation of one file, reading must give
what was there before, or refuse by a ValueError that names a file, or rebuild what was there. Anything else is a
failure: another exception, the death of the process, more than a second, other contents taken without a word.
"""

import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tests.faults.cases import Case
from tests.faults.disk import Disturbance, undisturbed
from tests.faults.judge import Kind, Outcome
from tests.faults.mutations import mutated

LONGEST = 1.0  # seconds of the processor that one file may take
KILLED_AFTER = 20  # seconds of a clock; a busy machine makes them of one
MEMORY = 1 << 30  # bytes that reading may take beyond what the process has


class ChangedError(Exception):
    """What was read is not what was written, and nobody said so."""


class Subject(Protocol):
    """A kind of files."""

    name: str

    def make(self, folder: Path) -> list[str]:
        """Write the files into a folder, and remember what they hold; give the names of those to be mutated."""

    def read(self, folder: Path) -> Kind:
        """Read them as a run does: "finished-identical", or "recovered" if they were rebuilt or are known to be others.

        Raises ValueError or OSError to refuse, ChangedError if the contents differ.
        """


def bad_files(
    subject: Subject, count: int, seed: int, *, mutate: Disturbance = undisturbed, per_case: int = 500
) -> list[Case]:
    """That many mutated files of a subject, each read."""
    return [
        Case(
            f"{subject.name} {seed}-{begin}",
            partial(_read_all, subject, min(per_case, count - begin), f"{seed}-{begin}", mutate),
        )
        for begin in range(0, count, per_case)
    ]


def _read_all(subject: Subject, count: int, seed: str, mutate: Disturbance, folder: Path) -> Iterator[Outcome]:
    names = subject.make(folder)
    contents = {name: (folder / name).read_bytes() for name in names}
    first = 0
    while first < count:
        outcomes, begun, status = _in_child(partial(_read_some, subject, contents, first, count, seed, folder), mutate)
        yield from outcomes
        first += len(outcomes)
        if first < count:
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
            yield Outcome(begun, "failure", f"the process ended with {how}")
            first += 1
            restore(folder, contents)


def restore(folder: Path, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def _read_some(
    subject: Subject, contents: dict[str, bytes], first: int, count: int, seed: str, folder: Path
) -> Iterator[Outcome | str]:
    """Mutate and read, one after the other; before each comes its name."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    for number in range(first, count):
        draw = random.Random(f"{seed} {number}")
        name = draw.choice(sorted(contents))
        way, content = mutated(contents[name], draw)
        case = f"{subject.name} {seed} {number}: {name}, {way}"
        yield case
        (folder / name).write_bytes(content)
        signal.alarm(KILLED_AFTER)
        began = time.process_time()
        outcome = _read_one(subject, case, folder, changed=content != contents[name])
        seconds = time.process_time() - began
        signal.alarm(0)
        restore(folder, contents)
        if seconds > LONGEST and outcome.kind != "failure":
            outcome = Outcome(case, "failure", f"it took {seconds:.1f} s")
        yield replace(outcome, seconds=max(seconds, 1e-6))


def _read_one(subject: Subject, case: str, folder: Path, *, changed: bool) -> Outcome:
    try:
        return Outcome(case, subject.read(folder))
    except ChangedError as error:
        return Outcome(case, "failure", f"taken without a word: {error}")
    except (ValueError, OSError) as error:
        said = str(error)
        if not changed:
            return Outcome(case, "failure", f"the file is as it was, but: {said}")
        if str(folder) not in said:
            return Outcome(case, "failure", f"no path is named by {error!r}")
        return Outcome(case, "refused", said[:200])
    except BaseException as error:  # also a panic of a library's Rust code
        return Outcome(case, "failure", f"{error!r:.500}")


def _in_child(work: Callable[[], Iterator[Outcome | str]], mutate: Disturbance) -> tuple[list[Outcome], str, int]:
    """What the work gives in a child, up to its end or its death; what it had begun; and how the child ended."""
    from_child, to = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            # Libraries print what they think of such files.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            mutate(0)
            with os.fdopen(to, "w") as lines:
                for entry in work():
                    print(json.dumps(entry if isinstance(entry, str) else asdict(entry)), file=lines, flush=True)
            status = 0
        finally:
            os._exit(status)
    os.close(to)
    outcomes: list[Outcome] = []
    begun = ""
    with os.fdopen(from_child) as lines:
        for line in lines:
            told: Any = json.loads(line)
            if isinstance(told, str):
                begun = told
            else:
                outcomes.append(Outcome(**told))
    return outcomes, begun, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
