"""The store's record in one folder: to be kept elsewhere, and put back when all is lost.

It holds all tables of the database, in a form that SQLite and PostgreSQL read alike, and the
folders of the authority, the projects and the secrets. Packs are not in it; the list of them is,
so that ``fsck`` finds after a restore what is missing.

    manifest.json                what follows, with hashes and numbers of rows
    tables/NAME-HASH.jsonl.gz    a table, one row a line
    NAME-HASH.tar.gz             a folder of the store
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import sqlite3
import tempfile
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from kakehashi.errors import StoreError
from kakehashi.store import folders, portable
from kakehashi.store.catalogue import Catalogue, now
from kakehashi.store.cohorts import Cohorts
from kakehashi.store.database import on_file
from kakehashi.store.layout import PART, Layout, locked, replacing, sync_folder
from kakehashi.store.leftout import WITHDRAWN, LeftOut
from kakehashi.store.service.reports import Reports

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from kakehashi.config import Config

MANIFEST = "manifest.json"
OTHER = "use another backup"
"""What to do about one that is damaged."""

_FORMAT = 1
_MARK = ".kakehashi-backup"
_LEVEL = 3


_EVERY = 1000

_Item = TypeVar("_Item")


def silent(table: str, rows: int) -> None:
    """Tell nobody how far it has come."""


def counted(
    rows: Iterable[_Item], table: str, progress: Callable[[str, int], None]
) -> Iterator[_Item]:
    """Yield rows, and tell now and then how many there were."""
    count = 0
    for count, row in enumerate(rows, start=1):
        yield row
        if count % _EVERY == 0:
            progress(table, count)
    progress(table, count)


@dataclass(frozen=True, slots=True)
class BackedUp:
    """A backup.

    Attributes
    ----------
    made_at : str
        ISO 8601, UTC.
    rows : dict of str to int
        Rows of each table.
    size : int
        Bytes of all files.
    """

    made_at: str
    rows: dict[str, int]
    size: int

    @classmethod
    def of(cls, document: dict[str, Any]) -> BackedUp:
        """Read it from a manifest."""
        return cls(
            made_at=document["made_at"],
            rows={table["name"]: table["rows"] for table in document["tables"]},
            size=sum(one["size"] for one in [*document["tables"], *document["folders"]]),
        )


def backup(
    config: Config,
    catalogue: Catalogue,
    target: Path,
    progress: Callable[[str, int], None] = silent,
) -> BackedUp:
    """Write a backup of the record, and read it back.

    Parameters
    ----------
    config : Config
        With the store.
    catalogue : Catalogue
    target : Path
        A folder that is not there yet, outside of the store.
    progress : callable, optional
        Called with a table and the number of its rows that were written so far.

    Returns
    -------
    BackedUp

    Raises
    ------
    StoreError
        It cannot be written, or is not what was written when it is read back. Nothing is left
        of it then.
    """
    layout = Layout(config.need_store().root)
    target = target.absolute()
    _refuse_place(layout.root, target)
    part = target.with_name(target.name + PART)
    with locked(layout.root / ".backup.lock", wait=False):
        try:
            _begin(part)
            document = _write(layout, catalogue, part, progress)
            verify(part)
            part.rename(target)
            sync_folder(target.parent)
            (target / _MARK).unlink()
        except OSError as error:
            _remove(part)
            raise StoreError(
                f"{error.filename or part}: {error.strerror}; nothing of this backup is left"
            ) from error
        except (SQLAlchemyError, sqlite3.Error) as error:
            _remove(part)
            raise explain(error) from error
        except BaseException:
            _remove(part)
            raise
    return BackedUp.of(document)


def verify(source: Path) -> BackedUp:
    """Read a backup whole: each file against its hash, each table's rows counted.

    Raises
    ------
    StoreError
        It is not a backup, of a newer format, or damaged.
    """
    document = read_manifest(source)
    for one in [*document["tables"], *document["folders"]]:
        path = source / one["file"]
        try:
            with path.open("rb") as file:
                # What the disk has counts, not what is in memory still.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error.strerror}); {OTHER}") from error
        if digest != one["sha256"]:
            raise StoreError(f"{path}: is damaged; {OTHER}")
    for table in document["tables"]:
        rows = sum(1 for _ in read_rows(source, table))
        if rows != table["rows"]:
            raise StoreError(f"{table['file']}: has {rows} rows, not {table['rows']}; {OTHER}")
    return BackedUp.of(document)


def scrub(target: Path, patients: Collection[str]) -> int:
    """Take people out of a backup that was made before they withdrew.

    Parameters
    ----------
    target : Path
        The backup.
    patients : collection of str
        The store's ids of the people, as in the column ``patient_id``.

    Returns
    -------
    int
        Rows that were removed.

    Raises
    ------
    StoreError
        The backup is damaged or cannot be written. It is what it was then; after a kill it is
        either that or without them, and a repetition removes what is left over.
    """
    verify(target)
    document = read_manifest(target)
    left_out = LeftOut(patients, document["tables"], lambda table: read_rows(target, table))
    removed, tables = 0, []
    try:
        for table in document["tables"]:
            kept = left_out.rest(table, read_rows(target, table))
            new = _write_table(target, table, map(_line, kept))
            removed += table["rows"] - new["rows"]
            tables.append(new)
        saved = [
            _scrub_service(target, one, patients, left_out.series)
            if one["folder"] == folders.SERVICE
            else one
            for one in document["folders"]
        ]
        _finish(target, document | {"tables": tables, "folders": saved})
        named = {one["file"] for one in [*tables, *saved]} | {MANIFEST, "tables"}
        for path in (*(target / "tables").iterdir(), *target.iterdir()):
            if path.relative_to(target).as_posix() in named:
                continue
            if path.is_dir():  # left of one that was killed
                shutil.rmtree(path)
            else:
                path.unlink()
        sync_folder(target / "tables")
        sync_folder(target)
    except OSError as error:
        raise StoreError(f"{error.filename or target}: {error.strerror}; repeat it") from error
    verify(target)
    return removed


def _scrub_service(
    target: Path, saved: dict[str, Any], patients: Collection[str], series: Collection[str]
) -> dict[str, Any]:
    """Write the folder of reports and cohorts anew without some people."""
    with tempfile.TemporaryDirectory(prefix=".scrub-", dir=target) as work:
        folders.unpack(target / saved["file"], Path(work), folders.SERVICE)
        folder = Path(work) / folders.SERVICE
        for name in ("reports", "cohorts"):
            path = folder / f"{name}.sqlite"
            if not path.exists():
                continue
            engine = on_file(path)
            try:
                if name == "cohorts":
                    Cohorts(engine).withdraw(series)
                else:
                    for patient in patients:
                        Reports(engine).withdraw((), patient)
            finally:
                engine.dispose()
        return _write_folder(target, folder)


def withdrawn(catalogue: Catalogue) -> set[str]:
    """Return the ids of those who withdrew, for :func:`scrub`."""
    try:
        with catalogue.engine.connect() as connection:
            return listed(connection)
    except SQLAlchemyError as error:
        raise explain(error) from error


def _refuse_place(root: Path, target: Path) -> None:
    if target.exists():
        raise StoreError(f"{target} is there already; name a folder that is not")
    if not target.parent.is_dir():
        raise StoreError(f"{target.parent} is not there; make it, or mount it, first")
    if target.parent.resolve().is_relative_to(root.resolve()):
        raise StoreError(f"{target} lies in the store itself; choose another disk or machine")


def _begin(part: Path) -> None:
    if part.exists():
        if any(part.iterdir()) and not (part / _MARK).exists():
            raise StoreError(f"{part} is there and is no backup that was broken off; move it away")
        _remove(part)
    part.mkdir(mode=0o700)
    (part / _MARK).touch(mode=0o600)
    (part / "tables").mkdir(mode=0o700)


def _remove(part: Path) -> None:
    if (part / _MARK).exists() or (part.is_dir() and not any(part.iterdir())):
        shutil.rmtree(part)


def _write(
    layout: Layout, catalogue: Catalogue, part: Path, progress: Callable[[str, int], None]
) -> dict[str, Any]:
    tables = []
    with _snapshot(catalogue.engine, part) as connection:
        for table in portable.reflect(connection).sorted_tables:
            lines = counted(portable.lines(table, connection), table.name, progress)
            tables.append(_write_table(part, portable.describe(table), lines))
    saved = [
        _write_folder(part, layout.root / name)
        for name in folders.SAVED
        if (layout.root / name).is_dir()
    ]
    return _finish(part, {"made_at": now(), "tables": tables, "folders": saved})


@contextmanager
def _snapshot(engine: sa.Engine, part: Path) -> Iterator[sa.Connection]:
    """Give all tables as they are at one moment, without holding up those who write."""
    if engine.dialect.name != "sqlite":
        options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        with engine.connect().execution_options(**options) as connection:
            yield connection
        return
    copy = part / "record.sqlite"
    copy.touch(mode=0o600)
    with engine.connect() as connection, closing(sqlite3.connect(copy)) as other:
        driver: Any = connection.connection.driver_connection
        driver.backup(other)
    copied = sa.create_engine(sa.URL.create("sqlite", database=str(copy)), hide_parameters=True)
    try:
        with copied.connect() as connection:
            yield connection
    finally:
        copied.dispose()
        copy.unlink()


def _write_table(part: Path, table: dict[str, Any], rows: Iterable[bytes]) -> dict[str, Any]:
    count = 0

    def write(out: gzip.GzipFile) -> None:
        nonlocal count
        for line in rows:
            out.write(line)
            count += 1

    written = _write_file(part, f"tables/{table['name']}", ".jsonl.gz", write)
    return table | written | {"rows": count}


def _write_folder(part: Path, folder: Path) -> dict[str, Any]:
    written = _write_file(part, folder.name, ".tar.gz", lambda out: folders.pack(folder, out))
    return {"folder": folder.name} | written


def _write_file(
    part: Path, name: str, end: str, write: Callable[[gzip.GzipFile], None]
) -> dict[str, Any]:
    """Write a compressed file that is named by its hash, so that it never replaces another."""
    path = part / f"{name}{end}"
    with (
        replacing(path, mode=0o600) as file,
        gzip.GzipFile("", "wb", _LEVEL, file, mtime=0) as out,
    ):
        write(out)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    path = path.rename(part / f"{name}-{digest[:16]}{end}")
    sync_folder(path.parent)
    return {
        "file": path.relative_to(part).as_posix(),
        "sha256": digest,
        "size": path.stat().st_size,
    }


def _finish(part: Path, document: dict[str, Any]) -> dict[str, Any]:
    document = document | {"kakehashi_backup": _FORMAT}
    digest = hashlib.sha256(_canonical(document)).hexdigest()
    with replacing(part / MANIFEST, mode=0o600) as file:
        file.write(_canonical({"backup": document, "sha256": digest}))
    return document


def read_manifest(source: Path) -> dict[str, Any]:
    """Return what a backup says of itself.

    Raises
    ------
    StoreError
        It is not a backup, is damaged, or of another format.
    """
    path = source / MANIFEST
    try:
        whole = json.loads(path.read_bytes())
        document: dict[str, Any] = whole["backup"]
        digest = hashlib.sha256(_canonical(document)).hexdigest()
        version = document["kakehashi_backup"]
    except FileNotFoundError as error:
        raise StoreError(f"{source} is not a backup: it has no {MANIFEST}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: cannot be read ({error}); {OTHER}") from error
    if digest != whole.get("sha256"):
        raise StoreError(f"{path}: is damaged; {OTHER}")
    if version != _FORMAT:
        raise StoreError(f"{path}: has format {version}, this software reads {_FORMAT}")
    return document


def read_rows(source: Path, table: dict[str, Any]) -> Iterator[list[Any]]:
    """Yield the rows of a table of a backup.

    Raises
    ------
    StoreError
        The file cannot be read.
    """
    path = source / table["file"]
    try:
        with gzip.open(path, "rb") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, EOFError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read ({error}); {OTHER}") from error


def _line(row: list[Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _canonical(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def listed(connection: sa.Connection) -> set[str]:
    """Return who withdrew, as the store has it."""
    if not sa.inspect(connection).has_table(WITHDRAWN):
        return set()
    patient: sa.ColumnClause[str] = sa.column("patient_id", sa.Text)
    query = sa.select(patient).select_from(sa.table(WITHDRAWN))
    return set(connection.scalars(query))


def explain(error: Exception) -> StoreError:
    """Return what a database refused, in words."""
    cause = getattr(error, "orig", None) or error
    return StoreError(f"the catalogue's database refused: {str(cause).strip()}; nothing was done")
