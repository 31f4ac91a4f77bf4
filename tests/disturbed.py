"""The tiny run that tests disturb by a disk, a clock or the kernel, as forked ranks that are judged by how they end."""

from pathlib import Path

from tests.faults.cluster import Ended, run_ranks
from tests.faults.disk import Disturbance, undisturbed
from tests.layouts.runs import MODEL

INTERVAL = 2  # steps between two saves


def start_run(
    folder: Path, data: Path, *words: str, num_steps: int, disturb: Disturbance = undisturbed, world_size: int = 1
) -> Ended:
    """Train into FOLDER/run. words: flags that come last, so they may replace what is given here."""
    given = [*MODEL, "--data-path", str(data), "--save", str(folder / "run"), "--train-iters", str(num_steps)]
    given += ["--save-interval", str(INTERVAL), "--eval-interval", "100"]
    return run_ranks(["pretrain", *given, *words], world_size, folder, disturb=disturb)
