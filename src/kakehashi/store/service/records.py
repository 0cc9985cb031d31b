"""Where the service keeps its own records: SQLite files of its own, or the store's PostgreSQL."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kakehashi.errors import StoreError
from kakehashi.store.database import on_file, on_server

if TYPE_CHECKING:
    from pathlib import Path

    import sqlalchemy as sa

    from kakehashi.config import StoreHost


def folder(root: Path) -> Path:
    """Return the folder of the service's own files, below the store's root."""
    return root / "service"


def open_engine(store: StoreHost, name: str) -> sa.Engine:
    """Return a database of the service.

    Parameters
    ----------
    store : StoreHost
        Where a database is configured it is that one; else a file of its own.
    name : str
        Of the SQLite file, without suffix.

    Raises
    ------
    StoreError
        The setting cannot be used, or the folder is missing.
    """
    if store.database is not None:
        return on_server(store.database)
    path = folder(store.root) / f"{name}.sqlite"
    try:
        _make(path)
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be made ({error.strerror}); run `kakehashi store init` first"
        ) from error
    return on_file(path)


def _make(path: Path) -> None:
    """Make the file where there is none, for the account that the folder belongs to.

    That account could put a link in its place: a file is only given away that was made here.
    """
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileExistsError:
        return
    try:
        if os.geteuid() == 0:
            owner = path.parent.stat()
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
    finally:
        os.close(descriptor)
