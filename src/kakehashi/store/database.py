"""How the store opens its databases: SQLite files of its own, or one PostgreSQL for all."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from kakehashi.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def on_server(url: str) -> sa.Engine:
    """Return the database that ``store.database`` names.

    Raises
    ------
    StoreError
        The setting cannot be used.
    """
    try:
        return sa.create_engine(url, hide_parameters=True)
    except (SQLAlchemyError, ImportError, ValueError) as error:
        # The URL may hold a password: name the setting, not its value.
        raise StoreError(
            f"store.database cannot be used ({type(error).__name__}); expected an SQLAlchemy URL "
            "whose driver is installed"
        ) from None


def on_file(path: Path, *, reading: bool = False) -> sa.Engine:
    """Return a file, which is there, as a database in which nothing deleted is left.

    Parameters
    ----------
    path : Path
    reading : bool
        For an account that may only read it.
    """
    query = {"mode": "ro" if reading else "rw", "uri": "true"}
    url = sa.URL.create("sqlite", database=f"file:{quote(str(path))}", query=query)
    engine = sa.create_engine(url, connect_args={"timeout": 30}, hide_parameters=True)
    sa.event.listen(engine, "connect", _prepare)
    return engine


@contextmanager
def transaction(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Do all of it or nothing.

    Raises
    ------
    StoreError
        The database refused.
    """
    try:
        with engine.begin() as connection:
            yield connection
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        raise StoreError(f"the store's database refused: {str(cause).strip()}") from error


def _prepare(connection: Any, _record: object) -> None:
    # Who withdrew must be gone from the file, too, not only from the tables.
    connection.execute("PRAGMA secure_delete = ON")
    # As PostgreSQL does.
    connection.execute("PRAGMA foreign_keys = ON")
