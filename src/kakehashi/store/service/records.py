"""Where the service keeps its own records: SQLite files of its own, or the store's PostgreSQL."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from kakehashi.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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
        try:
            return sa.create_engine(store.database, hide_parameters=True)
        except (SQLAlchemyError, ImportError, ValueError) as error:
            # The URL may hold a password: name the setting, not its value.
            raise StoreError(
                f"store.database cannot be used ({type(error).__name__}); expected an SQLAlchemy "
                "URL whose driver is installed"
            ) from None
    path = folder(store.root) / f"{name}.sqlite"
    try:
        _make(path)
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be made ({error.strerror}); run `kakehashi store init` first"
        ) from error
    return sqlite(path)


def sqlite(path: Path) -> sa.Engine:
    """Return a file of the service as a database in which nothing deleted is left."""
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        connect_args={"timeout": 30},
        hide_parameters=True,
    )
    sa.event.listen(engine, "connect", _overwrite_what_is_deleted)
    return engine


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


def _overwrite_what_is_deleted(connection: object, _record: object) -> None:
    # A withdrawn person's data must be gone from the file, too, not only from the tables.
    connection.execute("PRAGMA secure_delete = ON")  # type: ignore[attr-defined]
    connection.execute("PRAGMA foreign_keys = ON")  # type: ignore[attr-defined]


@contextmanager
def transaction(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Do all of it or nothing; what the database refuses is a :class:`StoreError`."""
    try:
        with engine.begin() as connection:
            yield connection
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        raise StoreError(f"the service's database refused: {str(cause).strip()}") from error
