"""Put a backup of the store's record back, into an empty store and into any database."""

from __future__ import annotations

from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from kakehashi.errors import StoreError
from kakehashi.store import folders, portable
from kakehashi.store.backup import (
    counted,
    explain,
    listed,
    read_manifest,
    read_rows,
    silent,
    verify,
)
from kakehashi.store.catalogue import Catalogue
from kakehashi.store.layout import Layout, locked
from kakehashi.store.leftout import WITHDRAWN, LeftOut

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from pathlib import Path

    from kakehashi.config import Config


@dataclass(frozen=True, slots=True)
class Restored:
    """What :func:`restore` put back.

    Attributes
    ----------
    rows : dict of str to int
        Rows of each table.
    left_out : frozenset of str
        Series of the backup that are not in the store, since they are of people who withdrew.
    """

    rows: dict[str, int]
    left_out: frozenset[str]


_TELLING = {"patient_id", "study_uid", "series_uid", "project"}


def restore(
    config: Config,
    source: Path,
    *,
    replace: bool = False,
    without: Collection[str] = (),
    progress: Callable[[str, int], None] = silent,
) -> Restored:
    """Put a backup back: all of it or nothing.

    Parameters
    ----------
    config : Config
        With the store; its database may be another than that of the backup.
    source : Path
        The backup.
    replace : bool
        Also if the store has a record already. Its folders are moved aside, its rows removed;
        the list of those who withdrew stays.
    without : collection of str
        Ids of people who withdrew since. Those whom the backup or the store itself has as
        withdrawn stay away anyway.
    progress : callable, optional
        Called with a table and the number of its rows that were written so far.

    Returns
    -------
    Restored

    Raises
    ------
    StoreError
        The backup is damaged, the store is running or not empty, or the database refuses.
    """
    store = config.need_store()
    layout = Layout(store.root)
    folders.refuse_running(layout.root)
    verify(source)
    document = read_manifest(source)
    with locked(layout.root / ".backup.lock", wait=False), closing(Catalogue.open(store)) as opened:
        names = [one["folder"] for one in document["folders"]]
        if not replace:
            folders.refuse_there(layout.root, names)
        try:
            with _transaction(opened.engine) as connection:
                restored = _fill(
                    connection, document, source, progress, replace=replace, without=without
                )
                archives = {one["folder"]: source / one["file"] for one in document["folders"]}
                # Last before the commit: with it nothing is left that could fail.
                with folders.swapped(layout.root, archives):
                    connection.commit()
        except OSError as error:
            raise StoreError(f"{error.filename}: {error.strerror}; nothing was restored") from error
        except SQLAlchemyError as error:
            raise explain(error) from error
    return restored


@contextmanager
def _transaction(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Give a connection on which also tables are made all or not at all."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            # Its driver begins by itself only when rows are written.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield connection


def _fill(
    connection: sa.Connection,
    document: dict[str, Any],
    source: Path,
    progress: Callable[[str, int], None],
    *,
    replace: bool,
    without: Collection[str],
) -> Restored:
    described = document["tables"]
    portable.make_missing(described, connection)
    tables = portable.reflect(connection)
    if not replace:
        _refuse_rows(connection, tables)
    for table in reversed(tables.sorted_tables):
        if table.name != WITHDRAWN:
            connection.execute(sa.delete(table))
    by_name = {one["name"]: one for one in described}
    known = listed(connection)
    saved = _saved(by_name[WITHDRAWN], source) if WITHDRAWN in by_name else {}
    gone = {*without, *known, *saved}
    left_out = LeftOut(gone, described, lambda one: read_rows(source, one))
    counts = {}
    for table in tables.sorted_tables:
        one = by_name.get(table.name)
        if one is None:
            continue
        rows: Iterable[list[Any]]
        if table.name == WITHDRAWN:
            before, rows = len(known), [row for who, row in saved.items() if who not in known]
        else:
            before, rows = (
                0,
                (row for row in read_rows(source, one) if not left_out.drops(one, row)),
            )
        written = portable.insert(one, counted(rows, table.name, progress), table, connection)
        there = connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
        if there != before + written:
            raise StoreError(f"{written} rows were written to {table.name!r}, {there} are there")
        portable.go_on_counting(table, connection)
        counts[table.name] = there
    return Restored(counts, left_out.series)


def _refuse_rows(connection: sa.Connection, tables: sa.MetaData) -> None:
    """Refuse a database that has rows; but not for what new tables begin with, e.g. a counter."""
    for table in tables.sorted_tables:
        if table.name == WITHDRAWN or not _TELLING.intersection(table.columns.keys()):
            continue
        if connection.execute(sa.select(*table.columns).limit(1)).first():
            raise StoreError(
                f"the table {table.name!r} has rows; restore into an empty database, or give "
                "--replace to lose what is in this one"
            )


def _saved(table: dict[str, Any], source: Path) -> dict[str, list[Any]]:
    """Return the rows of those who withdrew, as the backup has them."""
    at = [column["name"] for column in table["columns"]].index("patient_id")
    return {row[at]: row for row in read_rows(source, table)}
