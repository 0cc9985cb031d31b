"""Saved cohorts, and the lists of series that were frozen from them.

A frozen list never changes but in one way: when a person withdraws, their series leave it.
A tombstone then stands for each: the hash of the list stays what the paper says, and which
lists held the series is on record.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import sqlalchemy as sa

from kakehashi.errors import StoreError
from kakehashi.store.catalogue import now
from kakehashi.store.database import transaction
from kakehashi.store.service.records import open_engine

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kakehashi.config import StoreHost
    from kakehashi.store.query import Value

MOST_COHORTS = 1000
"""Cohorts that one project may keep."""

MOST_VERSIONS = 100
"""Lists that may be frozen from one cohort."""

MOST_BYTES = 2_000_000_000
"""Bytes that all frozen lists of a project may take up: some 40 million series."""

_BATCH = 500

_METADATA = sa.MetaData()
_SHA256 = sa.String(64)
_ID = sa.String(32)
_TIME = sa.String(32)

_SAVED = sa.Table(
    "saved_cohorts",
    _METADATA,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("project", sa.String(28), nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("query", sa.Text, nullable=False),
    sa.Column("selections", sa.JSON, nullable=False),
    sa.Column("shared", sa.Boolean, nullable=False),
    sa.Column("created_at", _TIME, nullable=False),
    sa.UniqueConstraint("project", "owner", "name"),
)
_VERSIONS = sa.Table(
    "cohort_versions",
    _METADATA,
    sa.Column("cohort", sa.ForeignKey(_SAVED.c.id), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("query", sa.Text, nullable=False),
    sa.Column("selections", sa.JSON, nullable=False),
    sa.Column("sha256", _SHA256, nullable=False),
    sa.Column("members", sa.LargeBinary, nullable=False),
    sa.Column("frozen_by", sa.Text, nullable=False),
    sa.Column("frozen_at", _TIME, nullable=False),
)
_TOMBSTONES = sa.Table(
    "cohort_tombstones",
    _METADATA,
    sa.Column("cohort", _ID, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("entry", _SHA256, primary_key=True, index=True),
    sa.Column("withdrawn_at", _TIME, nullable=False),
    sa.ForeignKeyConstraint(["cohort", "version"], [_VERSIONS.c.cohort, _VERSIONS.c.version]),
)
# One row: how often something was withdrawn. It is also what writers queue at.
_WITHDRAWALS = sa.Table(
    "cohort_withdrawals",
    _METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("number", sa.Integer, nullable=False),
)

_FACTS = [column for column in _VERSIONS.columns if column is not _VERSIONS.c.members]
_COUNT = (
    sa.select(sa.func.count())
    .where(_TOMBSTONES.c.cohort == _VERSIONS.c.cohort, _TOMBSTONES.c.version == _VERSIONS.c.version)
    .scalar_subquery()
    .label("tombstones")
)

Member = tuple[str, str]
"""SeriesInstanceUID and ``blocks`` (SHA-256 of the pack's block hashes) of one series."""


class TooManyCohortsError(StoreError):
    """A project has :data:`MOST_COHORTS` already."""


class TooMuchFrozenError(StoreError):
    """A cohort has :data:`MOST_VERSIONS` lists, or a project's take up :data:`MOST_BYTES`."""


class WithdrawnMeanwhileError(StoreError):
    """Somebody withdrew while a list was being made; make the list again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedCohort:
    """A query under a name.

    Attributes
    ----------
    id : str
        32 hexadecimal digits.
    project, owner : str
        It belongs to the project; a cohort that is not shared is its owner's alone.
    query : str
        In the catalogue's query language, in its canonical form.
    selections : dict of str to list
        Values chosen of facets, sorted; None first.
    """

    id: str
    project: str
    owner: str
    name: str
    query: str
    selections: dict[str, list[Value]]
    shared: bool
    created_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """What is known of a fixed list, but the list.

    Attributes
    ----------
    version : int
        From 1; grows when the list changes.
    query, selections
        As the cohort had them when it was frozen.
    sha256 : str
        Over the list of (series, blocks) as it was frozen.
    tombstones : int
        How many series were withdrawn since.
    """

    cohort: str
    version: int
    query: str
    selections: dict[str, list[Value]]
    sha256: str
    tombstones: int
    frozen_by: str
    frozen_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen(Version):
    """A fixed list.

    Attributes
    ----------
    members : tuple of Member
        Sorted by UID; without what was withdrawn.
    """

    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Affected:
    """A frozen list that held withdrawn series.

    Attributes
    ----------
    withdrawn : int
        How many of them.
    """

    cohort: str
    project: str
    name: str
    version: int
    withdrawn: int


def list_sha256(members: Iterable[Member]) -> str:
    """Return the hash of a list of series, as the view of a project hashes its own.

    Parameters
    ----------
    members : iterable of Member
        In the order of the UIDs.
    """
    return hashlib.sha256(_canonical([list(member) for member in members])).hexdigest()


class Cohorts:
    """The record of cohorts, on SQLite or PostgreSQL.

    Parameters
    ----------
    engine : sqlalchemy.Engine
        Missing tables are made.

    Raises
    ------
    StoreError
        The database cannot be reached or used; so do all methods.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        with transaction(engine) as connection:
            _METADATA.create_all(connection)
            if connection.execute(sa.select(_WITHDRAWALS.c.id)).first() is None:
                connection.execute(sa.insert(_WITHDRAWALS).values(id=1, number=0))

    @classmethod
    def open(cls, store: StoreHost) -> Self:
        """Open the record of a configured store."""
        return cls(open_engine(store, "cohorts"))

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def save(
        self,
        *,
        project: str,
        owner: str,
        name: str,
        query: str,
        selections: Mapping[str, Iterable[Value]],
    ) -> SavedCohort:
        """Save a query under a name, in place of what the owner had under it.

        What was frozen of it stays as it is.

        Raises
        ------
        TooManyCohortsError
            The project has :data:`MOST_COHORTS` already.
        """
        chosen = {
            column: sorted(set(values), key=lambda value: (value is not None, value))
            for column, values in sorted(selections.items())
        }
        same = (_SAVED.c.project == project) & (_SAVED.c.owner == owner) & (_SAVED.c.name == name)
        with transaction(self._engine) as connection:
            _queue(connection)
            found = connection.execute(sa.select(_SAVED.c.id).where(same)).scalar()
            if found is not None:
                connection.execute(
                    sa.update(_SAVED)
                    .where(_SAVED.c.id == found)
                    .values(query=query, selections=chosen)
                )
            else:
                count = sa.select(sa.func.count()).where(_SAVED.c.project == project)
                if (connection.execute(count).scalar() or 0) >= MOST_COHORTS:
                    raise TooManyCohortsError(
                        f"the project has {MOST_COHORTS} cohorts already; use an existing name"
                    )
                found = secrets.token_hex(16)
                connection.execute(
                    sa.insert(_SAVED).values(
                        id=found,
                        project=project,
                        owner=owner,
                        name=name,
                        query=query,
                        selections=chosen,
                        shared=False,
                        created_at=now(),
                    )
                )
            row = connection.execute(sa.select(_SAVED).where(_SAVED.c.id == found)).mappings().one()
        return SavedCohort(**row)

    def visible(self, project: str, person: str) -> list[SavedCohort]:
        """Return the cohorts of a project that a person may see, by name."""
        query = (
            sa.select(_SAVED).where(_visible(project, person)).order_by(_SAVED.c.name, _SAVED.c.id)
        )
        with transaction(self._engine) as connection:
            return [SavedCohort(**row) for row in connection.execute(query).mappings()]

    def find(self, cohort: str, project: str, person: str) -> SavedCohort | None:
        """Return a cohort, None if there is none or the person may not see it."""
        query = sa.select(_SAVED).where(_visible(project, person), _SAVED.c.id == cohort)
        with transaction(self._engine) as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else SavedCohort(**row)

    def share(self, cohort: str, owner: str) -> bool:
        """Let the whole project see a cohort; False if it is not the owner's."""
        change = (
            sa.update(_SAVED)
            .where(_SAVED.c.id == cohort, _SAVED.c.owner == owner)
            .values(shared=True)
        )
        with transaction(self._engine) as connection:
            return connection.execute(change).rowcount == 1

    def withdrawals(self) -> int:
        """Return how often something was withdrawn; see :meth:`freeze`."""
        with transaction(self._engine) as connection:
            return int(connection.execute(sa.select(_WITHDRAWALS.c.number)).scalar_one())

    def freeze(
        self, cohort: SavedCohort, members: Sequence[Member], *, by: str, withdrawals: int
    ) -> Frozen:
        """Record the list that a cohort gives now; the newest version if it is the same list.

        Parameters
        ----------
        cohort : SavedCohort
        members : sequence of Member
            Sorted by UID.
        by : str
            Who freezes it.
        withdrawals : int
            What :meth:`withdrawals` said before the list was made.

        Raises
        ------
        WithdrawnMeanwhileError
            Something was withdrawn since, and may stand in the list.
        TooMuchFrozenError
            It is another list, and there is no room for one more.
        """
        sha256 = list_sha256(members)
        with transaction(self._engine) as connection:
            if _queue(connection) != withdrawals:
                raise WithdrawnMeanwhileError("a person withdrew meanwhile; freeze again")
            newest = (
                sa.select(_VERSIONS.c.version, _VERSIONS.c.sha256)
                .where(_VERSIONS.c.cohort == cohort.id)
                .order_by(_VERSIONS.c.version.desc())
                .limit(1)
            )
            before = connection.execute(newest).first()
            if before is not None and before.sha256 == sha256:
                version = before.version
            else:
                version = before.version + 1 if before else 1
                packed = _pack(members)
                _check_room(connection, cohort, version, len(packed))
                connection.execute(
                    sa.insert(_VERSIONS).values(
                        cohort=cohort.id,
                        version=version,
                        query=cohort.query,
                        selections=cohort.selections,
                        sha256=sha256,
                        members=packed,
                        frozen_by=by,
                        frozen_at=now(),
                    )
                )
            row = connection.execute(_version(cohort.id, version)).mappings().one()
        return _frozen(row)

    def frozen(self, cohort: str, version: int) -> Frozen | None:
        """Return one version, None if there is none."""
        with transaction(self._engine) as connection:
            row = connection.execute(_version(cohort, version)).mappings().first()
        return None if row is None else _frozen(row)

    def versions(self, cohort: str) -> list[Version]:
        """Return all versions of a cohort, the oldest first."""
        query = sa.select(*_FACTS, _COUNT).where(_VERSIONS.c.cohort == cohort)
        with transaction(self._engine) as connection:
            rows = connection.execute(query.order_by(_VERSIONS.c.version)).mappings().all()
        return [Version(**row) for row in rows]

    def withdraw(self, series_uids: Iterable[str]) -> list[Affected]:
        """Take series out of every frozen list, and leave a tombstone for each.

        Call it after they have left the catalogue and its index: a list that is being made
        meanwhile is refused then.

        Parameters
        ----------
        series_uids : iterable of str

        Returns
        -------
        list of Affected
            The lists that held any of them, also where they have left it before: so it can
            be repeated.
        """
        gone = frozenset(series_uids)
        with transaction(self._engine) as connection:
            _queue(connection)
            connection.execute(sa.update(_WITHDRAWALS).values(number=_WITHDRAWALS.c.number + 1))
            keys = sa.select(_VERSIONS.c.cohort, _VERSIONS.c.version)
            for cohort, version in connection.execute(keys).all():
                _bury(connection, cohort, version, gone)
            return _affected(connection, sorted(map(_entry, gone)))


def _bury(connection: sa.Connection, cohort: str, version: int, gone: frozenset[str]) -> None:
    """Take series out of one list."""
    same = (_VERSIONS.c.cohort == cohort) & (_VERSIONS.c.version == version)
    blob = connection.execute(sa.select(_VERSIONS.c.members).where(same)).scalar_one()
    members = _unpack(blob)
    left = [member for member in members if member[0] not in gone]
    if len(left) == len(members):
        return
    connection.execute(sa.update(_VERSIONS).where(same).values(members=_pack(left)))
    at = now()
    connection.execute(
        sa.insert(_TOMBSTONES),
        [
            {"cohort": cohort, "version": version, "entry": _entry(uid), "withdrawn_at": at}
            for uid, _ in members
            if uid in gone
        ],
    )


def _affected(connection: sa.Connection, entries: list[str]) -> list[Affected]:
    counts: Counter[tuple[str, str, str, int]] = Counter()
    for start in range(0, len(entries), _BATCH):
        found = connection.execute(
            sa.select(
                _SAVED.c.id, _SAVED.c.project, _SAVED.c.name, _TOMBSTONES.c.version, sa.func.count()
            )
            .join(_TOMBSTONES, _TOMBSTONES.c.cohort == _SAVED.c.id)
            .where(_TOMBSTONES.c.entry.in_(entries[start : start + _BATCH]))
            .group_by(_SAVED.c.id, _SAVED.c.project, _SAVED.c.name, _TOMBSTONES.c.version)
        )
        for cohort, project, name, version, count in found:
            counts[cohort, project, name, version] += count
    return [
        Affected(cohort=cohort, project=project, name=name, version=version, withdrawn=count)
        for (cohort, project, name, version), count in sorted(counts.items())
    ]


def _entry(uid: str) -> str:
    """Return what a tombstone keeps of a series: enough to find it again by its UID alone."""
    return hashlib.sha256(uid.encode()).hexdigest()


def _queue(connection: sa.Connection) -> int:
    """Let one writer in at a time, on either database; return the number of withdrawals."""
    # A write, so that SQLite takes its lock before anything is read, and PostgreSQL the row's.
    connection.execute(sa.update(_WITHDRAWALS).values(number=_WITHDRAWALS.c.number))
    return int(connection.execute(sa.select(_WITHDRAWALS.c.number)).scalar_one())


def _check_room(connection: sa.Connection, cohort: SavedCohort, version: int, size: int) -> None:
    # Versions are counted from 1, and none is ever removed.
    if version > MOST_VERSIONS:
        raise TooMuchFrozenError(
            f"the cohort {cohort.name!r} was frozen {MOST_VERSIONS} times already; save its query "
            "under another name and freeze that"
        )
    taken = (
        sa.select(sa.func.sum(sa.func.length(_VERSIONS.c.members)))
        .join(_SAVED, _SAVED.c.id == _VERSIONS.c.cohort)
        .where(_SAVED.c.project == cohort.project)
    )
    if int(connection.execute(taken).scalar() or 0) + size > MOST_BYTES:
        raise TooMuchFrozenError(
            f"the frozen lists of the project {cohort.project!r} take up all of their "
            f"{MOST_BYTES // 10**6} MB; freeze smaller ones, or ask the data managers"
        )


def _visible(project: str, person: str) -> sa.ColumnElement[bool]:
    return (_SAVED.c.project == project) & (_SAVED.c.shared | (_SAVED.c.owner == person))


def _version(cohort: str, version: int) -> sa.Select[Any]:
    return sa.select(_VERSIONS, _COUNT).where(
        _VERSIONS.c.cohort == cohort, _VERSIONS.c.version == version
    )


def _frozen(row: sa.RowMapping) -> Frozen:
    return Frozen(**(dict(row) | {"members": _unpack(row["members"])}))


def _pack(members: Iterable[Member]) -> bytes:
    return zlib.compress(_canonical([list(member) for member in members]))


def _unpack(blob: bytes) -> tuple[Member, ...]:
    return tuple((uid, blocks) for uid, blocks in json.loads(zlib.decompress(blob)))


def _canonical(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
