"""Stores and servers for the tests of the link."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.link.stores import Server, StoreFolder


@pytest.fixture
def folder(tmp_path: Path) -> StoreFolder:
    root = tmp_path / "store"
    root.mkdir()
    return StoreFolder(root)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()
