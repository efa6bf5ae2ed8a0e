"""The command, for every fault test."""

from collections.abc import Iterator

import pytest
from fault_tools import Command


@pytest.fixture(scope="session")
def mlt(tmp_path_factory) -> Iterator[Command]:
    command = Command(tmp_path_factory.mktemp("mlt"))
    yield command
    command.close()
