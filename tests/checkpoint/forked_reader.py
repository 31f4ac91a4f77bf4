"""The process that reads foreign files, forked from the test instead of started anew: importing torch takes seconds.

What it runs and how it is limited are the same; tests/checkpoint/test_foreign.py also starts the real one.
"""

import os
import sys
import traceback
import warnings
from pathlib import Path

import pytest

from megalith.checkpoint import foreign
from megalith.checkpoint.shards import DamagedError


def read_in_fork(path: Path, target: Path) -> None:
    """As `foreign._run_reader`."""
    with warnings.catch_warnings():
        # From Python 3.12 on a fork warns of threads; those of torch are idle.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        messages = os.open(target / foreign.MESSAGES_NAME, os.O_WRONLY | os.O_CREAT)
        os.dup2(messages, 1)
        os.dup2(messages, 2)
        try:
            status = foreign.main([str(path), str(target)])
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            sys.stdout = sys.stderr = None
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0:
        said = (target / foreign.MESSAGES_NAME).read_text(errors="replace")
        raise DamagedError(f"{path} {foreign._reason(status, said)}")


@pytest.fixture
def forked_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "_run_reader", read_in_fork)
