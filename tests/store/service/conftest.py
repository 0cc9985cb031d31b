"""The service on each record."""

from __future__ import annotations

import pytest

from kakehashi.config import Config
from tests.store.conftest import settings

from .serving import running, series


@pytest.fixture
def on_both(database):
    """The service on SQLite and on PostgreSQL."""
    with running(database, series(150)) as service:
        yield service


@pytest.fixture
def service(tmp_path):
    """The service on SQLite, with a small catalogue."""
    root = tmp_path / "root"
    root.mkdir()
    with running(Config.model_validate(settings(root)), series(60)) as served:
        yield served
