"""requirements.lock holds every dependency that pyproject.toml names, exact, within its range, with hashes."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
ENTRY = re.compile(r"([A-Za-z0-9._-]+)==([^ ;\\]+)[^\n]*((?:\\\n    --hash=sha256:[0-9a-f]{64} ?)+)\n")


@pytest.fixture(scope="module")
def lock() -> str:
    return (ROOT / "requirements.lock").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def locked(lock: str) -> dict[str, Version]:
    return {name.lower(): Version(version) for name, version, _ in ENTRY.findall(lock)}


def wanted() -> list[Requirement]:
    read = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = read["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    lines = {*read["build-system"]["requires"], *project["dependencies"], *extras}
    return [Requirement(line) for line in sorted(lines) if not line.startswith(project["name"])]


@pytest.mark.parametrize("requirement", wanted(), ids=str)
def test_every_dependency_is_locked_within_its_range(requirement: Requirement, locked: dict[str, Version]) -> None:
    assert requirement.name.lower() in locked, "run scripts/lock"
    assert requirement.specifier.contains(locked[requirement.name.lower()], prereleases=True)


def test_every_line_is_an_exact_version_with_hashes_and_names_no_place(lock: str, locked: dict[str, Version]) -> None:
    assert not ENTRY.sub(
        "", "".join(line for line in lock.splitlines(keepends=True) if not line.startswith("#"))
    ).strip()
    assert len(locked) > 20
    assert "://" not in lock and "index" not in lock and "find-links" not in lock
