"""The command, for every fault test."""

import pytest
from fault_tools import Command


@pytest.fixture(scope="session")
def mlt(tmp_path_factory) -> Command:
    return Command(tmp_path_factory.mktemp("compiled"))
