"""Shared by all tests: one thread for torch (a forked child of a multi-threaded parent hangs), and the --slow flag."""

import os
import signal
from pathlib import Path

# Before torch is imported anywhere, so that neither the parent nor a forked rank ever starts a pool of threads.
os.environ["OMP_NUM_THREADS"] = "1"
# Where there is no GPU Triton interprets its kernels; it decides when it is imported, by whomever.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A shell starts what it puts in the background with SIGINT ignored, and processes under test would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# So does nohup with SIGHUP; this process goes on without a terminal all the same.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)

import hypothesis
import pytest

# What a launcher or a scheduler has told this process is not for those under test.
for name in list(os.environ):
    if name in ("RANK", "WORLD_SIZE") or name.startswith(("LOCAL_", "MASTER_", "SLURM_", "TORCHELASTIC_", "MEGALITH_")):
        del os.environ[name]
# Property tests write files and start threads: on a busy machine an example may take longer than it is granted.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

GOLDEN = Path(__file__).parent / "golden" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the long campaigns")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a long campaign: run with --slow"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of a small token file."""
    from tests.layouts.runs import write_data  # torch only where a test needs it

    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The run directory of the run that nothing disturbs, which the module's function `start` starts."""
    folder = tmp_path_factory.mktemp("whole")
    assert request.module.start(folder, data).statuses == (0,)
    return folder / "run"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder with data made by Megatron-LM (its README says how)."""
    return GOLDEN
