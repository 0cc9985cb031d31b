"""The book: sessions, tickets, leases and connections, in one SQLite file.

SQLite through the standard library, because the program that sshd runs at each
authentication reads the same file and must start in milliseconds. Every statement that
changes a session stands here; the program and the guard touch connections only.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kakehashi.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

State = Literal["created", "granted", "ended"]
Witness = Literal["wrapper", "site"]
BlockKind = Literal["person", "site", "all"]

SCHEMA_VERSION = 3
_SCHEMA = """
CREATE TABLE sessions (
    id TEXT PRIMARY KEY,
    hub TEXT NOT NULL,
    person TEXT NOT NULL,
    groups TEXT NOT NULL,
    project TEXT NOT NULL,
    site TEXT NOT NULL,
    kind TEXT NOT NULL,
    hours REAL NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('created', 'granted', 'ended')),
    created_at REAL NOT NULL,
    ticket_sha256 TEXT NOT NULL,
    ticket_expires_at REAL NOT NULL,
    redeemed_at REAL,
    replays INTEGER NOT NULL DEFAULT 0,
    public_key TEXT,
    fingerprint TEXT,
    host TEXT,
    address TEXT,
    job TEXT,
    walls TEXT,
    view_account TEXT NOT NULL,
    work_account TEXT NOT NULL,
    counter INTEGER NOT NULL DEFAULT 0,
    lease_expires_at REAL,
    ends_at REAL NOT NULL,
    ended_at REAL,
    end_reason TEXT,
    scheduler TEXT,
    receipt_revision INTEGER NOT NULL DEFAULT 0,
    receipt_evidence TEXT,
    receipt_state TEXT,
    CHECK ((state = 'ended') = (ended_at IS NOT NULL)),
    CHECK (state != 'granted' OR (redeemed_at IS NOT NULL AND lease_expires_at IS NOT NULL))
) STRICT;
CREATE INDEX sessions_by_state ON sessions (state);
CREATE INDEX sessions_by_job ON sessions (site, job);

CREATE TABLE certificates (
    serial INTEGER PRIMARY KEY,
    session TEXT NOT NULL REFERENCES sessions (id),
    fingerprint TEXT NOT NULL,
    issued_at REAL NOT NULL,
    expires_at REAL NOT NULL
) STRICT;
CREATE INDEX certificates_by_session ON certificates (session);

CREATE TABLE connections (
    id INTEGER PRIMARY KEY,
    session TEXT NOT NULL REFERENCES sessions (id),
    serial INTEGER NOT NULL,
    account TEXT NOT NULL,
    pid INTEGER NOT NULL,
    start_time INTEGER NOT NULL,
    opened_at REAL NOT NULL,
    cut_at REAL,
    cut_reason TEXT,
    closed_at REAL,
    UNIQUE (pid, start_time, session)
) STRICT;
CREATE INDEX connections_by_session ON connections (session);
CREATE INDEX connections_open ON connections (closed_at) WHERE closed_at IS NULL;

CREATE TABLE denials (
    id INTEGER PRIMARY KEY,
    time REAL NOT NULL,
    session TEXT NOT NULL,
    account TEXT NOT NULL,
    reason TEXT NOT NULL
) STRICT;

CREATE TABLE reports (
    id INTEGER PRIMARY KEY,
    session TEXT NOT NULL REFERENCES sessions (id),
    time REAL NOT NULL,
    witness TEXT NOT NULL CHECK (witness IN ('wrapper', 'site')),
    items TEXT NOT NULL
) STRICT;
CREATE INDEX reports_by_session ON reports (session);
"""
_BLOCKS = """
CREATE TABLE blocks (
    kind TEXT NOT NULL CHECK (kind IN ('person', 'site', 'all')),
    name TEXT NOT NULL,
    time REAL NOT NULL,
    by TEXT NOT NULL,
    reason TEXT NOT NULL,
    PRIMARY KEY (kind, name)
) STRICT;
"""
# What leads from each earlier version to the next.
_STEPS = {
    1: "CREATE INDEX sessions_by_job ON sessions (site, job);" + _BLOCKS,
    2: "ALTER TABLE sessions ADD COLUMN walls TEXT;",
}


@dataclass(frozen=True)
class Session:
    """One session as the book has it; times in seconds since 1970."""

    id: str
    hub: str
    person: str
    groups: frozenset[str]
    project: str
    site: str
    kind: str
    hours: float
    state: State
    created_at: float
    ticket_sha256: str
    ticket_expires_at: float
    redeemed_at: float | None
    replays: int
    public_key: str | None
    fingerprint: str | None
    host: str | None
    address: str | None
    job: str | None
    walls: str | None
    view_account: str
    work_account: str
    counter: int
    lease_expires_at: float | None
    ends_at: float
    ended_at: float | None
    end_reason: str | None
    scheduler: dict[str, Any] | None
    receipt_revision: int
    receipt_evidence: str | None
    receipt_state: str | None


@dataclass(frozen=True)
class Connection:
    """One connection to the store's sshd, known by its monitor process."""

    id: int
    session: str
    serial: int
    account: str
    pid: int
    start_time: int
    opened_at: float
    cut_at: float | None
    cut_reason: str | None
    closed_at: float | None


@dataclass(frozen=True)
class ConnectionCounts:
    """A session's connections in numbers; times in seconds since 1970."""

    opened: int
    closed: int
    last_closed_at: float | None


@dataclass(frozen=True)
class Certificates:
    """What was signed for one session."""

    issued: int
    last_expires_at: float | None


@dataclass(frozen=True)
class Leases:
    """Sessions with a lease of some kind, and when the last of those leases is over."""

    sessions: int
    last_expires_at: float | None


@dataclass(frozen=True)
class Denial:
    """An authentication that the store refused although the certificate was genuine."""

    id: int
    time: float
    session: str
    account: str
    reason: str


@dataclass(frozen=True)
class Block:
    """An operator's word that a person, a site or everybody gets nothing.

    ``kind`` is ``person``, ``site`` or ``all``; ``name`` is empty for ``all``.
    """

    kind: BlockKind
    name: str
    time: float
    by: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What somebody other than the store said about a session."""

    time: float
    witness: Witness
    items: list[dict[str, str]]


class Book:
    """The open book.

    Parameters
    ----------
    path : Path
        The SQLite file, made by :meth:`create`.

    Raises
    ------
    StoreError
        The file is missing, is not a book, or was made by another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise StoreError(f"{path}: there is no book; run `kakehashi store init` as root")
        try:
            self._db = _connect(path)
            version = self._db.execute("PRAGMA user_version").fetchone()["user_version"]
        except sqlite3.Error as error:
            raise StoreError(f"{path}: cannot be opened as a book ({error})") from error
        if version != SCHEMA_VERSION:
            self._db.close()
            raise StoreError(
                f"{path}: is a book of version {version}, expected {SCHEMA_VERSION}; run "
                "`kakehashi store init` for an older one, use newer software for a newer one"
            )

    @classmethod
    def create(cls, path: Path) -> Book:
        """Open a book, and make it, readable by its owner only, unless it is there."""
        path.touch(mode=0o600)
        with contextlib.closing(_connect(path)) as database:
            version = int(database.execute("PRAGMA user_version").fetchone()["user_version"])
            # An empty file is what a creation that was interrupted leaves.
            if version == 0:
                database.execute("PRAGMA journal_mode = WAL")
            script = (
                _SCHEMA + _BLOCKS
                if version == 0
                else "".join(_STEPS[step] for step in range(version, SCHEMA_VERSION))
            )
            if version < SCHEMA_VERSION:
                database.executescript(
                    f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
                )
        return cls(path)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, with nobody else writing meanwhile."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # Sessions

    def add_session(
        self,
        session: str,
        *,
        hub: str,
        person: str,
        groups: frozenset[str],
        project: str,
        site: str,
        kind: str,
        hours: float,
        created_at: float,
        ticket_sha256: str,
        ticket_expires_at: float,
        view_account: str,
        work_account: str,
        ends_at: float,
    ) -> None:
        """Write a new session, state ``created``."""
        self._db.execute(
            "INSERT INTO sessions (id, hub, person, groups, project, site, kind, hours, state,"
            " created_at, ticket_sha256, ticket_expires_at, view_account, work_account, ends_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'created', ?, ?, ?, ?, ?, ?)",
            (
                session,
                hub,
                person,
                json.dumps(sorted(groups)),
                project,
                site,
                kind,
                hours,
                created_at,
                ticket_sha256,
                ticket_expires_at,
                view_account,
                work_account,
                ends_at,
            ),
        )

    def session(self, session: str) -> Session | None:
        """Return a session, or ``None``."""
        found = self._sessions("id = ?", (session,))
        return found[0] if found else None

    def running(self, person: str) -> int:
        """Return how many sessions of a person have not ended."""
        row = self._db.execute(
            "SELECT count(*) AS n FROM sessions WHERE person = ? AND state != 'ended'", (person,)
        ).fetchone()
        return int(row["n"])

    def live(self) -> list[Session]:
        """Return the sessions that have not ended."""
        return self._sessions("state != 'ended'", ())

    def states(self, hub: str, sessions: Iterable[str]) -> dict[str, tuple[State, str | None]]:
        """Return state and reason of the end of those of a hub's sessions that there are."""
        rows = self._db.execute(
            "SELECT id, state, end_reason FROM sessions"
            " WHERE hub = ? AND id IN (SELECT value FROM json_each(?))",
            (hub, json.dumps(sorted(sessions))),
        )
        return {row["id"]: (row["state"], row["end_reason"]) for row in rows}

    def session_of_job(self, site: str, job: str) -> Session | None:
        """Return the latest session that ran as a site's job."""
        found = self._sessions(
            "site = ? AND job = ? ORDER BY redeemed_at DESC LIMIT 1", (site, job)
        )
        return found[0] if found else None

    def unseen_by_site(self, site: str, host: str) -> list[Session]:
        """Return the ended sessions of a host whose receipts wait for the site's root."""
        return self._sessions(
            "state = 'ended' AND site = ? AND host = ?"
            " AND receipt_state IS NOT 'complete' AND NOT EXISTS (SELECT 1 FROM reports"
            " WHERE reports.session = sessions.id AND witness = 'site') ORDER BY redeemed_at",
            (site, host),
        )

    def overdue(self, now: float) -> list[Session]:
        """Return the sessions whose time, or whose unused ticket's time, is over."""
        return self._sessions(
            "(state = 'granted' AND ends_at <= ?)"
            " OR (state = 'created' AND ticket_expires_at <= ?)",
            (now, now),
        )

    def without_final_receipt(self) -> list[Session]:
        """Return the ended sessions whose receipt is missing or pending."""
        return self._sessions("state = 'ended' AND receipt_state IS NOT 'complete'", ())

    def redeem(
        self,
        session: str,
        *,
        now: float,
        public_key: str,
        fingerprint: str,
        host: str,
        address: str | None,
        job: str,
        walls: str,
        ends_at: float,
        lease_expires_at: float,
    ) -> bool:
        """Spend the ticket; False if it was spent or the session is over."""
        cursor = self._db.execute(
            "UPDATE sessions SET state = 'granted', redeemed_at = ?, public_key = ?,"
            " fingerprint = ?, host = ?, address = ?, job = ?, walls = ?, ends_at = ?,"
            " lease_expires_at = ?"
            " WHERE id = ? AND state = 'created' AND redeemed_at IS NULL AND ticket_expires_at > ?",
            (
                now,
                public_key,
                fingerprint,
                host,
                address,
                job,
                walls,
                ends_at,
                lease_expires_at,
                session,
                now,
            ),
        )
        return cursor.rowcount == 1

    def count_replay(self, session: str) -> None:
        """Note that a spent ticket was shown again."""
        self._db.execute("UPDATE sessions SET replays = replays + 1 WHERE id = ?", (session,))

    def renew(self, session: str, counter: int, lease_expires_at: float) -> bool:
        """Move the lease on; False unless the session is granted and the counter rises."""
        cursor = self._db.execute(
            "UPDATE sessions SET counter = ?, lease_expires_at = ?"
            " WHERE id = ? AND state = 'granted' AND counter < ?",
            (counter, lease_expires_at, session, counter),
        )
        return cursor.rowcount == 1

    def end(self, session: str, reason: str, now: float) -> bool:
        """End a session; False if it had ended."""
        cursor = self._db.execute(
            "UPDATE sessions SET state = 'ended', ended_at = ?, end_reason = ?"
            " WHERE id = ? AND state != 'ended'",
            (now, reason, session),
        )
        return cursor.rowcount == 1

    def announce_end(self, session: str, reason: str, at: float) -> bool:
        """Bring a session's end forward; False if it has ended."""
        cursor = self._db.execute(
            "UPDATE sessions SET ends_at = min(ends_at, ?), end_reason = coalesce(end_reason, ?),"
            " lease_expires_at = min(lease_expires_at, ?),"
            " ticket_expires_at = min(ticket_expires_at, ?) WHERE id = ? AND state != 'ended'",
            (at, reason, at, at, session),
        )
        return cursor.rowcount == 1

    def set_scheduler(self, session: str, scheduler: Mapping[str, Any]) -> None:
        """Keep what the scheduler said; the first word stays."""
        self._db.execute(
            "UPDATE sessions SET scheduler = ? WHERE id = ? AND scheduler IS NULL",
            (json.dumps(scheduler), session),
        )

    def set_receipt(self, session: str, *, revision: int, evidence: str, state: str) -> None:
        """Note which receipt stands for a session."""
        self._db.execute(
            "UPDATE sessions SET receipt_revision = ?, receipt_evidence = ?, receipt_state = ?"
            " WHERE id = ?",
            (revision, evidence, state, session),
        )

    # Certificates and reports

    def add_certificate(
        self, serial: int, *, session: str, fingerprint: str, issued_at: float, expires_at: float
    ) -> None:
        """Write down a certificate; sshd accepts none that does not stand here."""
        self._db.execute(
            "INSERT INTO certificates (serial, session, fingerprint, issued_at, expires_at)"
            " VALUES (?, ?, ?, ?, ?)",
            (serial, session, fingerprint, issued_at, expires_at),
        )

    def certificates(self, session: str) -> Certificates:
        """Return how many certificates a session got, and when the last one expires."""
        row = self._db.execute(
            "SELECT count(*) AS n, max(expires_at) AS last FROM certificates WHERE session = ?",
            (session,),
        ).fetchone()
        return Certificates(int(row["n"]), row["last"])

    def holder(self, serial: int) -> str | None:
        """Return the session that a certificate was given to, or ``None``."""
        row = self._db.execute(
            "SELECT session FROM certificates WHERE serial = ?", (serial,)
        ).fetchone()
        return str(row["session"]) if row else None

    def leases_given_until(self, time: float, now: float) -> Leases:
        """Return the leases that were given until a time, and live at ``now``."""
        row = self._db.execute(
            "SELECT count(DISTINCT s.id) AS n, max(c.expires_at) AS last FROM certificates c"
            " JOIN sessions s ON s.id = c.session"
            " WHERE s.state = 'granted' AND c.issued_at <= ? AND c.expires_at > ?",
            (time, now),
        ).fetchone()
        return Leases(int(row["n"]), row["last"])

    def add_report(
        self, session: str, witness: Witness, items: Sequence[Mapping[str, str]], now: float
    ) -> None:
        """Keep what a witness said."""
        self._db.execute(
            "INSERT INTO reports (session, time, witness, items) VALUES (?, ?, ?, ?)",
            (session, now, witness, json.dumps(list(items))),
        )

    def reports(self, session: str) -> list[Report]:
        """Return what witnesses said about a session, in the order that they came."""
        rows = self._db.execute(
            "SELECT time, witness, items FROM reports WHERE session = ? ORDER BY id", (session,)
        )
        return [Report(row["time"], row["witness"], json.loads(row["items"])) for row in rows]

    # Blocks

    def block(self, kind: BlockKind, name: str, by: str, reason: str, now: float) -> None:
        """Write a block, or its new reason."""
        self._db.execute(
            "INSERT OR REPLACE INTO blocks (kind, name, time, by, reason) VALUES (?, ?, ?, ?, ?)",
            (kind, name, now, by, reason),
        )

    def unblock(self, kind: BlockKind, name: str) -> bool:
        """Take a block away; False if there was none."""
        cursor = self._db.execute("DELETE FROM blocks WHERE kind = ? AND name = ?", (kind, name))
        return cursor.rowcount == 1

    def blocks(self) -> list[Block]:
        """Return all blocks."""
        rows = self._db.execute("SELECT * FROM blocks ORDER BY kind, name")
        return [Block(**row) for row in rows]

    # Connections

    def connections(self, session: str, most: int) -> list[Connection]:
        """Return connections of a session, those that still stand first."""
        rows = self._db.execute(
            "SELECT * FROM connections WHERE session = ?"
            " ORDER BY closed_at IS NOT NULL, id LIMIT ?",
            (session, most),
        )
        return [Connection(**row) for row in rows]

    def connection_counts(self, session: str) -> ConnectionCounts:
        """Return how many connections a session ever had, and how many were seen closed."""
        row = self._db.execute(
            "SELECT count(*) AS opened, count(closed_at) AS closed,"
            " max(closed_at) AS last_closed_at FROM connections WHERE session = ?",
            (session,),
        ).fetchone()
        return ConnectionCounts(**row)

    def connections_left(self, session: str) -> int:
        """Return how many connections of a session were not seen closed.

        This is asked again and again, and a payload may have opened any number, one after the
        other: so only those that still stand are gone through.
        """
        row = self._db.execute(
            "SELECT count(*) AS n FROM connections INDEXED BY connections_open"
            " WHERE closed_at IS NULL AND session = ?",
            (session,),
        ).fetchone()
        return int(row["n"])

    def open_connections(self) -> list[Connection]:
        """Return all connections that were not seen closed."""
        rows = self._db.execute("SELECT * FROM connections WHERE closed_at IS NULL ORDER BY id")
        return [Connection(**row) for row in rows]

    def unleased(self, now: float) -> dict[int, str]:
        """Return the open connections that must be closed, with the reason of each."""
        rows = self._db.execute(
            "SELECT c.id, s.state, s.end_reason FROM connections c JOIN sessions s"
            " ON s.id = c.session WHERE c.closed_at IS NULL"
            " AND NOT (s.state = 'granted' AND s.lease_expires_at > ? AND s.ends_at > ?)",
            (now, now),
        )
        return {
            row["id"]: row["end_reason"] if row["state"] == "ended" else "lease lapsed"
            for row in rows
        }

    def mark_cut(self, connection: int, reason: str, now: float) -> None:
        """Note that the store is closing a connection; the first reason stays."""
        self._db.execute(
            "UPDATE connections SET cut_at = ?, cut_reason = ? WHERE id = ? AND cut_at IS NULL",
            (now, reason, connection),
        )

    def mark_closed(self, connection: int, now: float) -> bool:
        """Note that a connection's processes are gone; False if that was known."""
        cursor = self._db.execute(
            "UPDATE connections SET closed_at = ? WHERE id = ? AND closed_at IS NULL",
            (now, connection),
        )
        return cursor.rowcount == 1

    def close_all(self, now: float) -> None:
        """Note that no connection of earlier processes lives: the store was started anew."""
        self._db.execute(
            "UPDATE connections SET closed_at = ?, cut_at = coalesce(cut_at, ?),"
            " cut_reason = coalesce(cut_reason, 'the store was stopped') WHERE closed_at IS NULL",
            (now, now),
        )

    def has_denials(self) -> bool:
        """Return whether there are denials that were not yet recorded."""
        return self._db.execute("SELECT 1 AS one FROM denials LIMIT 1").fetchone() is not None

    def take_denials(self) -> list[Denial]:
        """Return the denials that were not yet recorded, and take them out."""
        rows = self._db.execute("SELECT * FROM denials ORDER BY id").fetchall()
        if rows:
            self._db.execute("DELETE FROM denials WHERE id <= ?", (rows[-1]["id"],))
        return [Denial(**row) for row in rows]

    def _sessions(self, where: str, values: tuple[object, ...]) -> list[Session]:
        # The condition is one of this module's constants; values are always bound.
        rows = self._db.execute(f"SELECT * FROM sessions WHERE {where}", values)  # noqa: S608 - constant
        return [
            Session(
                **{
                    **row,
                    "groups": frozenset(json.loads(row["groups"])),
                    "scheduler": json.loads(row["scheduler"]) if row["scheduler"] else None,
                }
            )
            for row in rows
        ]


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
    database.row_factory = _as_dict
    database.execute("PRAGMA synchronous = FULL")
    database.execute("PRAGMA foreign_keys = ON")
    return database


def _as_dict(cursor: sqlite3.Cursor, row: tuple[Any, ...]) -> dict[str, Any]:
    return {column[0]: value for column, value in zip(cursor.description, row, strict=True)}
