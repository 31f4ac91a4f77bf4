"""Bad variants of Megalith, put into the code of forked ranks, each of which the campaign must catch.

A campaign that passes a bad variant says nothing about the good one. Each row: what is wrong, how the code is changed,
and the cases of the campaign that are tried until one fails.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tests.faults import variants
from tests.faults.bad_files import bad_files
from tests.faults.cases import JUDGE, Case, Grounds, Trial, run_cases
from tests.faults.damage import bit_flips
from tests.faults.disk import Disturbance, recorded, recording
from tests.faults.errors import every_error, file_too_large, harmless, lies
from tests.faults.judge import Outcome, WrongError
from tests.faults.kills import kill_at, some_kills, stops
from tests.faults.medium import CHANGING
from tests.faults.power_loss import power_losses
from tests.faults.subjects import Maps, TokenFiles
from tests.faults.twin import SCENARIOS


@dataclass(frozen=True)
class Mutant:
    """A bad variant. scenario: the layout that it is tried on. cases: of the campaign, tried until one fails."""

    name: str
    mutate: Disturbance
    cases: Callable[[Trial], list[Case]]
    scenario: str = "one"


def commits_killed(trial: Trial) -> list[Case]:
    """Kills at what makes up the second commit: after each change to the disk, but few of the writes."""
    lane = trial.twin.lane(0, "save")
    begins = [number for number, operation in enumerate(lane) if operation.name == "make_directory"]
    changes = [operation for operation in lane[begins[1] : begins[2]] if operation.name in CHANGING]
    writes = [operation for operation in changes if operation.name == "write"]
    others = sorted(changes, key=lambda operation: operation.name not in ("rename", "create"))
    others = [operation for operation in others if operation.name != "write"]
    return [kill_at(trial, 0, operation, "after") for operation in (*others, *writes[:: len(writes) // 6])]


def few_kills(trial: Trial) -> list[Case]:
    return some_kills(trial, 6, 1)


MUTANTS = [
    Mutant("manifest before shards", variants.manifest_before_shards, commits_killed),
    Mutant("shards written in place", variants.shards_written_in_place, commits_killed),
    Mutant("tracker file in place", variants.tracker_in_place, commits_killed),
    Mutant("old checkpoints deleted before the new one is saved", variants.deleted_before_saved, commits_killed),
    Mutant("remains of killed saves left", variants.remains_not_removed, commits_killed),
    Mutant(
        "files not synced", variants.files_not_synced, lambda trial: power_losses(trial, drawn=0, seed=1, restarts=0)
    ),
    Mutant(
        "directories not synced",
        variants.directories_not_synced,
        lambda trial: power_losses(trial, drawn=0, seed=1, restarts=0),
    ),
    Mutant("weights not copied before they change", variants.weights_written_uncopied, harmless),
    Mutant("short writes taken for whole ones", variants.short_writes_taken_for_whole, harmless),
    Mutant(
        "old checkpoints deleted before the new one is verified",
        variants.deleted_without_verifying,
        lambda t: lies(t, 20, 1),
    ),
    Mutant("failed save not told", variants.failure_not_told, lambda trial: every_error(trial, lanes=("save",))[::40]),
    Mutant(
        "failed save ends the run",
        variants.failure_ends_the_run,
        lambda trial: every_error(trial, lanes=("save",))[::40],
    ),
    Mutant("failed last save ends with status 0", variants.failure_is_success, file_too_large),
    Mutant("position in the samples not restored", variants.restored(consumed_train_samples=0), few_kills),
    Mutant("position in the validation not restored", variants.restored(consumed_valid_samples=0), few_kills),
    Mutant("position in the schedule not restored", variants.restored(schedule_samples=0), few_kills),
    Mutant("step count off by one", variants.step_off_by_one, few_kills),
    Mutant("loss scale not restored", variants.loss_scale_not_restored, few_kills),
    Mutant("optimizer's moments not restored", variants.moments_not_restored, few_kills),
    Mutant("optimizer's count of updates not restored", variants.updates_not_restored, few_kills),
    Mutant("loader restarted", variants.loader_restarted, few_kills),
    Mutant("random numbers restarted", variants.random_numbers_restarted, few_kills),
    Mutant("newest checkpoint passed over", variants.newest_passed_over, commits_killed),
    Mutant("stop flag not reduced", variants.stop_not_agreed, lambda trial: stops(trial, 3, 1, limit=20.0), "pp2"),
    Mutant("digests of shards not checked", variants.digests_not_checked, lambda trial: bit_flips(trial, 60, 1)),
    Mutant("digest of the index not checked", variants.index_digest_not_checked, lambda trial: bit_flips(trial, 60, 1)),
    Mutant(
        "records of token files not checked",
        variants.records_not_checked,
        lambda trial: bad_files(TokenFiles(whole=True), 60, 1, mutate=trial.mutate),
    ),
    Mutant(
        "digests of index maps not checked",
        variants.map_digests_not_checked,
        lambda t: bad_files(Maps(), 60, 1, mutate=t.mutate),
    ),
]


def catch(mutant: Mutant, grounds: Grounds) -> Outcome:
    """Whether the campaign catches a bad variant; "failure" if it survives."""
    trial = Trial(grounds.twin(SCENARIOS[mutant.scenario]), mutant.mutate)
    case = Case(f"mutant: {mutant.name}", lambda folder: _tried(trial, mutant, folder))
    outcomes = run_cases([case], grounds.root)
    failed = [outcome for outcome in outcomes if outcome.kind == "failure"]
    # What goes wrong before a case is tried, or in the judge, has caught nothing.
    caught = [outcome for outcome in failed if outcome.case != case.name and not outcome.why.startswith(JUDGE)]
    seconds = max((outcome.seconds for outcome in outcomes), default=0.0)
    if caught:
        return Outcome(case.name, "refused", f"{caught[0].case}: {caught[0].why}", seconds=seconds)
    said = f": {failed[0].why}" if failed else ""
    return Outcome(case.name, "failure", f"it survived {len(outcomes)} cases{said}", seconds=seconds)


def _tried(trial: Trial, mutant: Mutant, folder: Path) -> list[Outcome]:
    """The outcomes of the mutant's cases, up to the first that fails; it may do other operations than the twin."""
    ended = trial.start(folder / "undisturbed", disturb=recording(folder))
    if ended.status != 0:
        raise WrongError(f"undisturbed it ends with status {ended.status}: {ended.said}")
    operations = [recorded(folder, rank) for rank in range(trial.twin.scenario.world_size)]
    own = replace(trial, twin=replace(trial.twin, operations=operations))
    return run_cases(mutant.cases(own), folder, until_failure=True)
