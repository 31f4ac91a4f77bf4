"""How fast a model trains beside other work, by how long threads that wait for each other spin.

    python -m benchmarks.busy_machine                      beside 0, 1, 2 and 4 processes that compute, ten minutes
    python -m benchmarks.busy_machine --beside 2 --rounds 5

Each figure is the median of `megalith bench --preset quickstart` in rounds that take all ways in turn.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megalith.spinning import BY_USER, SPINS, SPINS_BESIDE_OTHERS

CHOICES = (SPINS, SPINS_BESIDE_OTHERS, 0)
SECONDS = 60  # that a run gets; one that takes longer counts as 0 tokens/s
# Spins of threads that wait: what the command settles on, libgomp's own number, those that ours takes, none.
WAYS = {"as it is": None, "300,000 spins": 300_000, **{f"{spins:,} spins": spins for spins in CHOICES}}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--beside", type=int, nargs="+", default=[0, 1, 2, 4], help="processes that compute")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("words", nargs="*", default=["--preset", "quickstart"], help="of megalith bench, after --")
    options = parser.parse_args()
    if options.rounds < 1 or min(options.beside) < 0:
        parser.error("--rounds: must be at least 1, --beside: at least 0")
    print(f"tokens/s of megalith bench {' '.join(options.words)}, {os.cpu_count()} cores")
    for row in [["beside", *WAYS], ["---"] * (1 + len(WAYS))]:
        print(f"| {' | '.join(row)} |")
    for count in options.beside:
        with computing(count):
            rounds = [
                [tokens_per_second(options.words, spins) for spins in WAYS.values()] for _ in range(options.rounds)
            ]
        medians = [f"{statistics.median(found):,.0f}" for found in zip(*rounds, strict=True)]
        print(f"| {count} | {' | '.join(medians)} |", flush=True)


@contextmanager
def computing(count: int) -> Iterator[None]:
    """While entered, so many processes compute."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def tokens_per_second(words: list[str], spins: int | None) -> float:
    """Of one run; spins: None leaves them to the command."""
    command = [sys.executable, "-m", "megalith", "bench", *words, "--json"]
    variables = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", *BY_USER)}
    if spins is not None:
        variables["GOMP_SPINCOUNT"] = str(spins)
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=variables, start_new_session=True) as run:
        try:
            answer, _ = run.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            return 0.0
    return float(json.loads(answer)["tokens_per_second"])


if __name__ == "__main__":
    main()
