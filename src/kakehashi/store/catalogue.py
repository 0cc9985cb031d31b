"""The catalogue: one row a series, the kept objects, and the projects' frozen cohorts.

There is no row per image: what is known of single images lies in the packs.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import sqlalchemy as sa
from sqlalchemy.schema import CreateColumn

from kakehashi.errors import StoreError
from kakehashi.store.database import on_file, on_server, transaction
from kakehashi.store.layout import Layout, give_to_group
from kakehashi.store.query import Query, matches
from kakehashi.store.sql import narrowing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kakehashi.config import StoreHost

_METADATA = sa.MetaData()
_UID = sa.String(64)
_SHA256 = sa.String(64)

_SERIES = sa.Table(
    "series",
    _METADATA,
    sa.Column("series_uid", _UID, primary_key=True),
    sa.Column("study_uid", _UID, nullable=False, index=True),
    sa.Column("patient_id", sa.Text, nullable=False, index=True),
    sa.Column("facility", sa.Text, nullable=False, server_default="", index=True),
    sa.Column("tier", sa.SmallInteger, nullable=False, server_default="1"),
    sa.Column("modality", sa.String(16), nullable=False, index=True),
    sa.Column("body_part", sa.Text, index=True),
    sa.Column("manufacturer", sa.Text, index=True),
    sa.Column("vendor", sa.Text),
    sa.Column("model", sa.Text),
    sa.Column("kernel", sa.Text),
    sa.Column("description", sa.Text),
    sa.Column("study_date", sa.Date),
    sa.Column("rows", sa.Integer, nullable=False),
    sa.Column("columns", sa.Integer, nullable=False),
    sa.Column("slices", sa.Integer, nullable=False),
    sa.Column("volumes", sa.Integer, nullable=False, server_default="1"),
    sa.Column("usable_3d", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("spacing_z", sa.Double, nullable=False),
    sa.Column("spacing_y", sa.Double, nullable=False),
    sa.Column("spacing_x", sa.Double, nullable=False),
    sa.Column("thickness", sa.Double),
    sa.Column("orientation", sa.String(16), nullable=False),
    sa.Column("kvp", sa.Double),
    sa.Column("exposure", sa.Double),
    sa.Column("contrast", sa.Boolean, nullable=False),
    sa.Column("sex", sa.String(16)),
    sa.Column("age", sa.Double),
    sa.Column("transfer_syntax", _UID, nullable=False),
    sa.Column("flags", sa.JSON, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("blocks", _SHA256, nullable=False),
    sa.Column("added_at", sa.String(32), nullable=False),
)
_KEPT = sa.Table(
    "kept",
    _METADATA,
    sa.Column("sha256", _SHA256, primary_key=True),
    sa.Column("sop_uid", sa.Text),
    sa.Column("series_uid", sa.Text, index=True),
    sa.Column("study_uid", sa.Text),
    sa.Column("patient_id", sa.Text, index=True),
    sa.Column("tier", sa.SmallInteger, nullable=False, server_default="1"),
    sa.Column("modality", sa.Text),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("added_at", sa.String(32), nullable=False),
)
_REFERENCES = sa.Table(
    "kept_references",
    _METADATA,
    sa.Column("sha256", sa.ForeignKey("kept.sha256"), primary_key=True),
    sa.Column("series_uid", sa.Text, primary_key=True, index=True),
)
_WITHDRAWN = sa.Table(
    "withdrawn",
    _METADATA,
    sa.Column("patient_id", sa.String(128), primary_key=True),
    sa.Column("by", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("at", sa.String(32), nullable=False),
)
_STAYS = _SERIES.c.patient_id.not_in(sa.select(_WITHDRAWN.c.patient_id))
# What changed since the index of facets was brought up to this record the last time, and the
# sign that this index then was given: an older record or index has another one.
_CHANGES = sa.Table("series_changes", _METADATA, sa.Column("series_uid", _UID, primary_key=True))
_MARK = sa.Table(
    "series_mark",
    _METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("mark", sa.String(32), nullable=False),
)
_COHORTS = sa.Table(
    "cohorts",
    _METADATA,
    sa.Column("project", sa.String(28), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("sha256", _SHA256, nullable=False),
    sa.Column("series", sa.JSON, nullable=False),
    sa.Column("frozen_at", sa.String(32), nullable=False),
)


_AT_ONCE = 500

TOMBSTONE = "withdrawn"
"""What stands in a frozen cohort where a series was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesFacts:
    """What a packed series is, from its DICOM attributes and its grid.

    Attributes
    ----------
    vendor : str or None
        The manufacturer under one name, however its machines spell it.
    slices : int
        Of all volumes together.
    volumes : int
        Grids that the series holds, e.g. phases.
    usable_3d : bool
        At least 32 slices in one volume lie across the body's axis.
    spacing_z, spacing_y, spacing_x : float
        Lengths of one step between slices, rows, columns, mm.
    thickness : float or None
        Slice Thickness, mm.
    orientation : str
        ``axial``, ``coronal``, ``sagittal``, ``oblique``.
    kvp : float or None
        Tube voltage, kV.
    exposure : float or None
        Tube current times time, mAs.
    contrast : bool
        A contrast agent is named.
    age : float or None
        Years.
    flags : tuple of str
        ``tilted``, ``uneven-spacing``, ``single-slice``, ``spaced-slices``,
        ``overlapping-slices`` (distance against Slice Thickness), ``repeated-volume``, ``lossy``,
        ``synthetic``; ``incomplete``, ``incomplete-study`` (fewer objects came than were stated).
    """

    series_uid: str
    study_uid: str
    patient_id: str
    modality: str
    body_part: str | None
    manufacturer: str | None
    vendor: str | None
    model: str | None
    kernel: str | None
    description: str | None
    study_date: dt.date | None
    rows: int
    columns: int
    slices: int
    volumes: int
    usable_3d: bool
    spacing_z: float
    spacing_y: float
    spacing_x: float
    thickness: float | None
    orientation: str
    kvp: float | None
    exposure: float | None
    contrast: bool
    sex: str | None
    age: float | None
    transfer_syntax: str
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series(SeriesFacts):
    """One row of the catalogue.

    Attributes
    ----------
    facility : str
        The hospital it came from, by the store's name for it; empty if nobody said.
    tier : int
        How much of the person it may still show: 1 (least) to 3.
    path : str
        Of the pack, relative to the store's root.
    size : int
        Bytes of the pack.
    blocks : str
        SHA-256 of the pack's ``.blocks`` file, hexadecimal.
    added_at : str
        ISO 8601, UTC.
    """

    facility: str
    tier: int
    path: str
    size: int
    blocks: str
    added_at: str

    def as_json(self) -> dict[str, Any]:
        """Return the row as JSON types."""
        row = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        row["study_date"] = self.study_date and self.study_date.isoformat()
        row["flags"] = list(self.flags)
        return row


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """An object that was kept as it came, because it could not be packed.

    Attributes
    ----------
    sha256 : str
        Of the file.
    reason : str
        Why it was not packed.
    path : str
        Relative to the store's root.
    refers_to : tuple of str
        SeriesInstanceUIDs that it refers to.
    """

    sha256: str
    sop_uid: str | None
    series_uid: str | None
    study_uid: str | None
    patient_id: str | None
    tier: int
    modality: str | None
    reason: str
    path: str
    size: int
    added_at: str
    refers_to: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the row as JSON types."""
        return dataclasses.asdict(self) | {"refers_to": list(self.refers_to)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """A project's frozen list of series.

    Attributes
    ----------
    version : int
        From 1; grows when the list changes.
    sha256 : str
        Over the list of (series, blocks).
    series : tuple of str
        SeriesInstanceUIDs, sorted; a `TOMBSTONE` in the place of each that was withdrawn.
    """

    project: str
    version: int
    sha256: str
    series: tuple[str, ...]
    frozen_at: str


def now() -> str:
    """Return the time as the records hold it: ISO 8601, UTC, to the second."""
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Catalogue:
    """The records, on SQLite or PostgreSQL.

    Parameters
    ----------
    engine : sqlalchemy.Engine
        Missing tables are made.

    Raises
    ------
    StoreError
        The database cannot be reached or used; so do all methods.
    """

    def __init__(self, engine: sa.Engine, *, reading: bool = False) -> None:
        self._engine = engine
        if reading:
            return
        with self.transaction() as connection:
            _METADATA.create_all(connection)
            _add_missing_columns(connection)

    @classmethod
    def open(cls, store: StoreHost, *, reading: bool = False) -> Self:
        """Open the catalogue of a configured store.

        Parameters
        ----------
        store : StoreHost
        reading : bool
            For an account that may only read it.
        """
        if store.database is not None:
            return cls(on_server(store.database), reading=reading)
        path = Layout(store.root).catalogue
        if not path.parent.is_dir():
            raise StoreError(f"{path.parent} is not there; make it with `kakehashi store init`")
        if not reading:
            path.touch(mode=0o640)  # names of patients' studies are not for everyone here
            give_to_group(path, f"{store.account_prefix}view")
        return cls(on_file(path, reading=reading), reading=reading)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @property
    def engine(self) -> sa.Engine:
        """The database, for what looks after its tables as such."""
        return self._engine

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """Do all of it or nothing.

        Raises
        ------
        StoreError
            The database refused.
        """
        with transaction(self._engine) as connection:
            yield connection

    def add_series(self, row: Series) -> None:
        """Add a series that is not there yet."""
        with self.transaction() as connection:
            connection.execute(sa.insert(_SERIES).values(**_values(row)))
            _note_changes(connection, [row.series_uid])

    def replace_series(self, row: Series) -> None:
        """Put a row in the place of the one that a series has."""
        same = _SERIES.c.series_uid == row.series_uid
        with self.transaction() as connection:
            connection.execute(sa.update(_SERIES).where(same).values(**_values(row)))
            _note_changes(connection, [row.series_uid])

    def changes(self) -> list[str]:
        """Return the series that changed since :meth:`followed`, sorted."""
        with self.transaction() as connection:
            return sorted(connection.scalars(sa.select(_CHANGES.c.series_uid)))

    def has_change(self, series_uid: str) -> bool:
        """Say whether a series is among :meth:`changes`."""
        query = sa.select(_CHANGES.c.series_uid).where(_CHANGES.c.series_uid == series_uid)
        with self.transaction() as connection:
            return connection.scalar(query) is not None

    def mark(self) -> str | None:
        """Return what :meth:`followed` noted the last time, None before the first."""
        with self.transaction() as connection:
            return connection.scalar(sa.select(_MARK.c.mark))

    def followed(self, changes: Iterable[str], mark: str) -> None:
        """Note that the index has these changes, and the mark that it has got with them."""
        uids = sorted(changes)
        with self.transaction() as connection:
            for start in range(0, len(uids), _AT_ONCE):
                some = uids[start : start + _AT_ONCE]
                connection.execute(sa.delete(_CHANGES).where(_CHANGES.c.series_uid.in_(some)))
            connection.execute(sa.delete(_MARK))
            connection.execute(sa.insert(_MARK).values(id=1, mark=mark))

    def series(self, series_uid: str) -> Series | None:
        """Return a series' row, None if there is none."""
        rows = self._select(sa.select(_SERIES).where(_SERIES.c.series_uid == series_uid))
        return rows[0] if rows else None

    def list_series(self, *, modality: str | None = None, study: str | None = None) -> list[Series]:
        """Return all series, or those of a modality or a study, sorted by UID."""
        query = sa.select(_SERIES)
        if modality is not None:
            query = query.where(_SERIES.c.modality == modality)
        if study is not None:
            query = query.where(_SERIES.c.study_uid == study)
        return self._select(query)

    def select(self, query: Query) -> list[Series]:
        """Return the series that meet a query, sorted by UID, but those of who withdrew."""
        rows = self._select(sa.select(_SERIES).where(narrowing(query, _SERIES), _STAYS))
        return [row for row in rows if matches(query, row)]

    def facilities(self) -> set[str]:
        """Return the hospitals that series are from."""
        with self.transaction() as connection:
            return set(connection.scalars(sa.select(_SERIES.c.facility).distinct()))

    def count(self) -> int:
        """Return how many series there are, but those of who withdrew."""
        with self.transaction() as connection:
            found = connection.scalar(sa.select(sa.func.count()).select_from(_SERIES).where(_STAYS))
        return int(found or 0)

    def batches(self, size: int) -> Iterator[list[Series]]:
        """Yield all series, but those of who withdrew, some at a time."""
        uid = _SERIES.c.series_uid
        last = ""
        while True:
            query = sa.select(uid).where(_STAYS, uid > last).order_by(uid).limit(size)
            with self.transaction() as connection:
                uids = list(connection.scalars(query))
            if not uids:
                return
            yield self._select(sa.select(_SERIES).where(_STAYS, uid.in_(uids)))
            last = uids[-1]

    def withdraw(self, patient_id: str, by: str, reason: str) -> None:
        """Note that a person withdrew: from now on no cohort has a series of them.

        What the store holds of them is removed by :func:`kakehashi.store.withdraw.withdraw`.
        """
        values = {"patient_id": patient_id, "by": by, "reason": reason, "at": now()}
        with self.transaction() as connection:
            same = _WITHDRAWN.c.patient_id == patient_id
            if connection.execute(sa.select(_WITHDRAWN).where(same)).first() is None:
                connection.execute(sa.insert(_WITHDRAWN).values(**values))
                theirs = sa.select(_SERIES.c.series_uid).where(_SERIES.c.patient_id == patient_id)
                _note_changes(connection, connection.scalars(theirs).all())

    def withdrawn(self) -> frozenset[str]:
        """Return the ids of all who withdrew."""
        with self.transaction() as connection:
            return frozenset(connection.scalars(sa.select(_WITHDRAWN.c.patient_id)))

    def of_patient(self, patient_id: str) -> tuple[list[Series], list[Kept]]:
        """Return all that the store has of a person."""
        series = self._select(sa.select(_SERIES).where(_SERIES.c.patient_id == patient_id))
        studies = sorted({row.study_uid for row in series})
        return series, self._kept(
            sa.or_(_KEPT.c.patient_id == patient_id, _KEPT.c.study_uid.in_(studies))
        )

    def forget(self, series_uids: Iterable[str], kept: Iterable[str]) -> None:
        """Forget series and kept objects, whose files are gone, all at once.

        The index has let go of them before: nothing here would tell it. In frozen cohorts a
        tombstone takes the place of each series; their hashes stay.
        """
        gone = set(series_uids)
        holding = [one for one in self.cohort_history() if not gone.isdisjoint(one.series)]
        with self.transaction() as connection:
            for cohort in holding:
                left = [TOMBSTONE if uid in gone else uid for uid in cohort.series]
                same = _COHORTS.c.project == cohort.project, _COHORTS.c.version == cohort.version
                connection.execute(sa.update(_COHORTS).where(*same).values(series=left))
            for series in sorted(gone):
                connection.execute(sa.delete(_SERIES).where(_SERIES.c.series_uid == series))
                connection.execute(sa.delete(_CHANGES).where(_CHANGES.c.series_uid == series))
            for sha256 in sorted(set(kept)):
                connection.execute(sa.delete(_REFERENCES).where(_REFERENCES.c.sha256 == sha256))
                connection.execute(sa.delete(_KEPT).where(_KEPT.c.sha256 == sha256))

    def _select(self, query: sa.Select[Any]) -> list[Series]:
        with self.transaction() as connection:
            found = connection.execute(query).mappings().all()
        rows = [Series(**(dict(row) | {"flags": tuple(row["flags"])})) for row in found]
        # Not by the database: PostgreSQL may have another order, and lists are hashed.
        return sorted(rows, key=lambda row: row.series_uid)

    def add_kept(self, row: Kept) -> None:
        """Add a kept object, or give one that is there already a new reason."""
        values = dataclasses.asdict(row)
        del values["refers_to"]
        with self.transaction() as connection:
            same = _KEPT.c.sha256 == row.sha256
            if connection.execute(sa.select(_KEPT.c.sha256).where(same)).first():
                connection.execute(sa.update(_KEPT).where(same).values(reason=row.reason))
                connection.execute(sa.delete(_REFERENCES).where(_REFERENCES.c.sha256 == row.sha256))
            else:
                connection.execute(sa.insert(_KEPT).values(**values))
            for series in sorted(set(row.refers_to)):
                connection.execute(
                    sa.insert(_REFERENCES).values(sha256=row.sha256, series_uid=series)
                )

    def drop_kept(self, sha256: Iterable[str]) -> list[Kept]:
        """Forget kept objects, e.g. those that are in a pack now; return what was there."""
        gone = self._kept(_KEPT.c.sha256.in_(sorted(set(sha256))))
        with self.transaction() as connection:
            for row in gone:
                connection.execute(sa.delete(_REFERENCES).where(_REFERENCES.c.sha256 == row.sha256))
                connection.execute(sa.delete(_KEPT).where(_KEPT.c.sha256 == row.sha256))
        return gone

    def kept(self, sha256: str) -> Kept | None:
        """Return a kept object by its hash, None if there is none."""
        rows = self._kept(_KEPT.c.sha256 == sha256)
        return rows[0] if rows else None

    def list_kept(self, *, modality: str | None = None) -> list[Kept]:
        """Return all kept objects, or those of a modality, sorted by series and UID."""
        return self._kept(*([] if modality is None else [_KEPT.c.modality == modality]))

    def kept_of_series(self, series_uid: str) -> list[Kept]:
        """Return the kept objects that belong to a series."""
        return self._kept(_KEPT.c.series_uid == series_uid)

    def kept_about_series(self, series_uid: str) -> list[Kept]:
        """Return the kept objects that belong to a series or refer to it."""
        referring = sa.select(_REFERENCES.c.sha256).where(_REFERENCES.c.series_uid == series_uid)
        return self._kept(sa.or_(_KEPT.c.series_uid == series_uid, _KEPT.c.sha256.in_(referring)))

    def _kept(self, *conditions: sa.ColumnElement[bool]) -> list[Kept]:
        query = (
            sa.select(_KEPT)
            .where(*conditions)
            .order_by(_KEPT.c.series_uid, _KEPT.c.sop_uid, _KEPT.c.sha256)
        )
        with self.transaction() as connection:
            rows = connection.execute(query).mappings().all()
            links = connection.execute(
                sa.select(_REFERENCES).join(_KEPT).where(*conditions).order_by(*_REFERENCES.c)
            ).all()
        refers: dict[str, list[str]] = {}
        for sha256, series in links:
            refers.setdefault(sha256, []).append(series)
        return [Kept(**row, refers_to=tuple(refers.get(row["sha256"], ()))) for row in rows]

    def cohort(self, project: str) -> Cohort | None:
        """Return the newest frozen cohort of a project, None before the first."""
        query = (
            sa.select(_COHORTS)
            .where(_COHORTS.c.project == project)
            .order_by(_COHORTS.c.version.desc())
            .limit(1)
        )
        with self.transaction() as connection:
            row = connection.execute(query).mappings().first()
        if row is None:
            return None
        return Cohort(**(dict(row) | {"series": tuple(row["series"])}))

    def cohort_history(self) -> Iterator[Cohort]:
        """Yield all frozen cohorts of all projects, by project and version."""
        keys = [_COHORTS.c.project, _COHORTS.c.version]
        with self.transaction() as connection:
            known = connection.execute(sa.select(*keys).order_by(*keys)).all()
        for project, version in known:
            same = (_COHORTS.c.project == project) & (_COHORTS.c.version == version)
            with self.transaction() as connection:
                row = connection.execute(sa.select(_COHORTS).where(same)).mappings().one()
            yield Cohort(**(dict(row) | {"series": tuple(row["series"])}))

    def add_cohort(self, cohort: Cohort) -> None:
        """Record a new version of a project's cohort."""
        values = dataclasses.asdict(cohort) | {"series": list(cohort.series)}
        with self.transaction() as connection:
            connection.execute(sa.insert(_COHORTS).values(**values))


def _add_missing_columns(connection: sa.Connection) -> None:
    """Bring a catalogue that an earlier release made up to date; nothing is taken away."""
    for table in _METADATA.sorted_tables:
        there = {column["name"] for column in sa.inspect(connection).get_columns(table.name)}
        for column in table.columns:
            if column.name not in there:
                definition = CreateColumn(column).compile(dialect=connection.dialect)
                connection.execute(sa.text(f"ALTER TABLE {table.name} ADD COLUMN {definition}"))


def _note_changes(connection: sa.Connection, series_uids: Iterable[str]) -> None:
    wanted = set(series_uids)
    known = {
        uid
        for start in range(0, len(wanted), _AT_ONCE)
        for uid in connection.scalars(
            sa.select(_CHANGES.c.series_uid).where(
                _CHANGES.c.series_uid.in_(sorted(wanted)[start : start + _AT_ONCE])
            )
        )
    }
    if new := sorted(wanted - known):
        connection.execute(sa.insert(_CHANGES), [{"series_uid": uid} for uid in new])


def _values(row: Series) -> dict[str, Any]:
    values = dataclasses.asdict(row)
    values["flags"] = list(row.flags)
    return values
