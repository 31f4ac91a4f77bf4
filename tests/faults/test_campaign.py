"""The quick tier of the fault campaign: a sample of each class of cases, on each layout; with --slow every mutant."""

from collections.abc import Iterator

import pytest

from tests.faults.campaign import (
    SECTIONS,
    SEED,
    Section,
    grounds_in_memory,
    row,
    run_bad_files,
    run_campaign,
    run_mutants,
    run_section,
)
from tests.faults.cases import Grounds, run_cases
from tests.faults.judge import Tally
from tests.faults.mutants import MUTANTS
from tests.faults.power_loss import power_losses_of_maps
from tests.faults.twin import SCENARIOS

# The tests' process has threads of torch's, one for each operation; they are idle when it forks.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
JOBS = 2


@pytest.fixture(scope="module")
def grounds() -> Iterator[Grounds]:
    with grounds_in_memory() as grounds:
        yield grounds


def assert_no_failure(tally: Tally, layout: str = "") -> None:
    print(row(tally, layout))
    assert tally.outcomes and not tally.failures, "\n".join(f"{f.case}: {f.why}" for f in tally.failures[:5])


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.title.replace(" ", "-"))
def test_each_case_ends_identical_recovered_or_refused(section: Section, grounds: Grounds) -> None:
    for layout in section.amounts:
        tally = run_section(section, grounds, layout=layout, tier="quick", jobs=JOBS)
        if layout == "one" or tally.outcomes:
            assert_no_failure(tally, layout)


def test_a_power_loss_while_index_maps_are_built_costs_nothing(grounds: Grounds) -> None:
    tally = Tally("index maps")
    tally.add(run_cases(power_losses_of_maps(drawn=2, seed=SEED), grounds.root))
    assert_no_failure(tally)


def test_bad_files_are_refused_rebuilt_or_harmless(grounds: Grounds) -> None:
    for tally in run_bad_files(grounds, tier="quick", jobs=JOBS):
        assert_no_failure(tally)


@pytest.mark.slow
def test_every_bad_variant_is_caught(grounds: Grounds) -> None:
    tally = run_mutants(grounds, jobs=JOBS)
    assert len(tally.outcomes) == len(MUTANTS) >= 12
    assert_no_failure(tally)


@pytest.mark.slow
def test_the_whole_campaign() -> None:
    failures = run_campaign("full", list(SCENARIOS), [], jobs=JOBS, say=print)
    assert not failures
