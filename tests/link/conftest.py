"""Stores and servers for the tests of the link."""

from __future__ import annotations

import shutil
import tempfile
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
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server, to write to as well where the module says ``SERVER_WRITES``."""
    server = Server(writes=getattr(request.module, "SERVER_WRITES", False))
    yield server
    server.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The work folder, where the store keeps it."""
    root = tmp_path / "work"
    root.mkdir()
    return root


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every account can enter and only root can change, as are those above it."""
    path = Path(tempfile.mkdtemp(prefix="kakehashi-link-", dir="/run"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)
