"""Threads that wait look for others for a short time, a shorter one beside other work, or as the user says."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalith import spinning
from megalith.spinning import BY_USER, LOOKS, SPINS, SPINS_BESIDE_OTHERS, num_running, spin_shortly

PROGRAM = "import os; from megalith.cli import main; main(['verify']); print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("given", "spins"),
    [
        ({}, {str(SPINS), str(SPINS_BESIDE_OTHERS)}),
        ({"GOMP_SPINCOUNT": "7"}, {"7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"None"}),
    ],
    ids=["none", "spins", "policy"],
)
def test_a_command_settles_it_unless_the_user_has(given: dict[str, str], spins: set[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in BY_USER} | given
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout.splitlines()[-1] in spins


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The variables of this process, in which nothing is settled yet."""
    variables = {name: value for name, value in os.environ.items() if name not in BY_USER}
    monkeypatch.setattr(os, "environ", variables)
    yield variables


@pytest.mark.parametrize(
    ("running", "spins"),
    [([1], SPINS), ([2, 3, 1], SPINS), ([2] * LOOKS, SPINS_BESIDE_OTHERS), ([0], SPINS)],
    ids=["alone", "others for a moment", "others", "not known"],
)
def test_fewer_spins_only_where_others_run_at_every_look(
    running: list[int], spins: int, settled: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter(running)
    monkeypatch.setattr(spinning, "num_running", lambda: next(looks))
    spin_shortly()
    assert settled["GOMP_SPINCOUNT"] == str(spins) and next(looks, None) is None


def test_this_process_is_among_those_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_running() >= 1
    monkeypatch.setattr(spinning, "KERNEL_STATISTICS", tmp_path / "stat")
    assert num_running() == 0
    (tmp_path / "stat").write_text("cpu 1 2\nprocs_running 3\nprocs_blocked 0\n")
    assert num_running() == 3
