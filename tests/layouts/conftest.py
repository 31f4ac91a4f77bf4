"""One token file and each reference run once for all tests of layouts."""

import pytest

from tests.layouts.runs import Runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))
