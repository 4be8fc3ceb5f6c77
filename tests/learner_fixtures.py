"""Processes for learners, one set for all modules: `pytest_plugins = [..., "learner_fixtures"]`."""

from __future__ import annotations

import pytest
from learner_hosts import Hosts


@pytest.fixture(scope="session")
def one_rank(cluster):
    hosts = Hosts(1)
    yield hosts
    hosts.stop()


@pytest.fixture(scope="session")
def two_ranks(cluster):
    hosts = Hosts(2)
    yield hosts
    hosts.stop()
