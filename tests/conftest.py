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

import pytest

GOLDEN = Path(__file__).parent / "golden" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the long campaigns")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a long campaign: run with --slow"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder with data made by Megatron-LM (its README says how)."""
    return GOLDEN
