"""Fixtures of the tests that touch Ray: `pytest_plugins = ["engine_fixtures"]`."""

from __future__ import annotations

import pytest

from posttrain.workers.cluster import connect, disconnect


@pytest.fixture(scope="session")
def cluster():
    """Ray on this machine, one for all modules: starting it takes seconds."""
    connect()
    yield
    disconnect()
