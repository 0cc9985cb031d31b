"""Reports (所見) by study, and the search for words in them, Japanese and English.

Texts are compared in the form NFKC with case folded, so that full-width letters, half-width
kana and capitals make no difference. Japanese has no spaces between words: what is sought is
found anywhere. SQLite keeps an index of all triples of characters; words of one or two
characters are looked for in each text. On PostgreSQL the extension pg_trgm does the same
where it is installed in the database.
"""

from __future__ import annotations

import hashlib
import unicodedata
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, cast

import sqlalchemy as sa

from kakehashi.errors import StoreError
from kakehashi.store.database import transaction
from kakehashi.store.service.records import open_engine

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from kakehashi.config import StoreHost

LONGEST_REPORT = 1_000_000
"""Characters that a report may have."""

_AROUND = 40
_TRIPLE = 3
_BATCH = 500
_STEPS = 10_000
_LONGEST_MS = 30_000

_METADATA = sa.MetaData()
_REPORTS = sa.Table(
    "reports",
    _METADATA,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    # Pages go by this and not by the number, which would tell how many reports there are.
    sa.Column("key", sa.String(64), nullable=False, unique=True),
    sa.Column("study_uid", sa.String(64), nullable=False, index=True),
    sa.Column("patient_id", sa.String(128), nullable=False, index=True),
    sa.Column("facility", sa.Text, nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("folded", sa.Text, nullable=False),
)
# The index holds no text of its own; the triggers keep it and the table the same.
_SQLITE_INDEX = (
    """CREATE VIRTUAL TABLE IF NOT EXISTS reports_index USING fts5(
         folded, content='reports', content_rowid='number', tokenize='trigram case_sensitive 1')""",
    """CREATE TRIGGER IF NOT EXISTS reports_added AFTER INSERT ON reports BEGIN
         INSERT INTO reports_index (rowid, folded) VALUES (new.number, new.folded);
       END""",
    """CREATE TRIGGER IF NOT EXISTS reports_gone AFTER DELETE ON reports BEGIN
         INSERT INTO reports_index (reports_index, rowid, folded)
         VALUES ('delete', old.number, old.folded);
       END""",
)
_POSTGRESQL_INDEX = (
    "CREATE INDEX IF NOT EXISTS reports_triples ON reports USING gin (folded gin_trgm_ops)"
)


@dataclass(frozen=True, slots=True)
class Report:
    """One report, de-identified.

    Attributes
    ----------
    key : str
        SHA-256 over study and text, hexadecimal.
    text : str
        In the Unicode form NFKC.
    """

    key: str
    study_uid: str
    facility: str
    text: str


class Reports:
    """The texts of reports, on SQLite or PostgreSQL.

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
        self._sqlite = engine.dialect.name == "sqlite"
        with transaction(engine) as connection:
            _METADATA.create_all(connection)
            if self._sqlite:
                indexed = sa.inspect(connection).has_table("reports_index")
                for statement in _SQLITE_INDEX:
                    connection.execute(sa.text(statement))
                if not indexed:
                    # A backup that was put back has texts, and no index of them.
                    connection.execute(
                        sa.text("INSERT INTO reports_index (reports_index) VALUES ('rebuild')")
                    )
            elif connection.execute(
                sa.text("SELECT 1 FROM pg_extension WHERE extname = 'pg_trgm'")
            ).first():
                connection.execute(sa.text(_POSTGRESQL_INDEX))

    @classmethod
    def open(cls, store: StoreHost) -> Self:
        """Open the reports of a configured store."""
        return cls(open_engine(store, "reports"))

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def add(self, study_uid: str, facility: str, text: str, *, patient_id: str) -> bool:
        """Add a de-identified report of a study; False if it is there already.

        Parameters
        ----------
        study_uid, patient_id : str
            The store's own, as the catalogue has them.
        facility : str
        text : str

        Raises
        ------
        StoreError
            It is longer than :data:`LONGEST_REPORT`.
        """
        plain = normalised(text)
        if len(plain) > LONGEST_REPORT:
            raise StoreError(
                f"a report has {len(plain)} characters; at most {LONGEST_REPORT} are kept"
            )
        key = hashlib.sha256(f"{study_uid}\n{plain}".encode()).hexdigest()
        with transaction(self._engine) as connection:
            same = sa.select(_REPORTS.c.number).where(_REPORTS.c.key == key)
            if connection.execute(same).first():
                return False
            connection.execute(
                sa.insert(_REPORTS).values(
                    key=key,
                    study_uid=study_uid,
                    patient_id=patient_id,
                    facility=facility,
                    text=plain,
                    folded=plain.casefold(),
                )
            )
        return True

    def of_study(self, study_uid: str) -> list[Report]:
        """Return the reports of a study, in the order that they came."""
        query = (
            sa.select(*_SHOWN).where(_REPORTS.c.study_uid == study_uid).order_by(_REPORTS.c.number)
        )
        with transaction(self._engine) as connection:
            return [Report(**row) for row in connection.execute(query).mappings()]

    def search(
        self,
        words: Sequence[str],
        facilities: Iterable[str],
        after: str = "",
        *,
        ended: Callable[[], bool] = lambda: False,
    ) -> Iterator[list[Report]]:
        """Yield the reports in which every word stands, in portions, in the order of their keys.

        Parameters
        ----------
        words : sequence of str
            See :func:`words_of`.
        facilities : iterable of str
            Only reports of these.
        after : str
            Only reports with a greater key.
        ended : callable, optional
            Asked now and then; the search ends with an error once it says so.
        """
        condition = sa.and_(self._condition(words), _REPORTS.c.facility.in_(sorted(facilities)))
        # In portions, so that no transaction stays open while the caller looks at them.
        while not ended():
            query = sa.select(*_SHOWN).where(condition, _REPORTS.c.key > after)
            with transaction(self._engine) as connection, self._ending(connection, ended):
                rows = connection.execute(query.order_by(_REPORTS.c.key).limit(_BATCH)).mappings()
                found = [Report(**row) for row in rows]
            if found:
                yield found
            if len(found) < _BATCH:
                return
            after = found[-1].key

    @contextmanager
    def _ending(self, connection: sa.Connection, ended: Callable[[], bool]) -> Iterator[None]:
        """Let a statement end when nobody waits for it any more."""
        if not self._sqlite:
            connection.execute(sa.text(f"SET LOCAL statement_timeout = {_LONGEST_MS}"))
            yield
            return
        database = cast("sqlite3.Connection", connection.connection.driver_connection)
        database.set_progress_handler(ended, _STEPS)
        try:
            yield
        finally:
            database.set_progress_handler(None, 0)

    def _condition(self, words: Sequence[str]) -> sa.ColumnElement[bool]:
        conditions: list[sa.ColumnElement[bool]] = []
        long = [word for word in words if len(word) >= _TRIPLE] if self._sqlite else []
        if long:
            phrases = " AND ".join('"' + word.replace('"', '""') + '"' for word in long)
            matching = sa.text("reports.number IN (SELECT rowid FROM reports_index(:phrases))")
            conditions.append(matching.bindparams(phrases=phrases))  # type: ignore[arg-type]
        conditions += [
            _REPORTS.c.folded.contains(word, autoescape=True) for word in words if word not in long
        ]
        return sa.and_(*conditions) if words else sa.false()

    def withdraw(self, study_uids: Iterable[str], patient_id: str) -> int:
        """Take a person's reports out, from the file, too; return how many there were.

        Parameters
        ----------
        study_uids : iterable of str
            The person's studies.
        patient_id : str
            The person, whose reports may be there without any study.
        """
        conditions = [_REPORTS.c.patient_id == patient_id] if patient_id else []
        conditions += [_REPORTS.c.study_uid == study for study in sorted(set(study_uids))]
        gone = 0
        with transaction(self._engine) as connection:
            for condition in conditions:
                gone += connection.execute(sa.delete(_REPORTS).where(condition)).rowcount
            if gone and self._sqlite:
                # A deleted text's triples stay in the index until its parts are merged.
                connection.execute(
                    sa.text("INSERT INTO reports_index (reports_index) VALUES ('optimize')")
                )
        return gone


_SHOWN = (_REPORTS.c.key, _REPORTS.c.study_uid, _REPORTS.c.facility, _REPORTS.c.text)


def normalised(text: str) -> str:
    """Return a text in NFKC, without the character NUL, which PostgreSQL refuses."""
    return unicodedata.normalize("NFKC", text).replace("\0", "")


def words_of(text: str) -> list[str]:
    """Return what is sought: the words of a text, folded as reports are, each once."""
    return list(dict.fromkeys(normalised(text).casefold().split()))


def snippet(text: str, words: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """Return the surroundings of the first word found, and where words stand in it.

    Parameters
    ----------
    text : str
        A report's text.
    words : sequence of str
        From :func:`words_of`.

    Returns
    -------
    text : str
        One line; an ellipsis where something was cut.
    marks : list of (int, int)
        Begin and end of each word in it, in characters.
    """
    # A character may fold to several: `origin` leads from the folded text back.
    folded, origin = [], []
    for index, character in enumerate(text):
        for part in character.casefold():
            folded.append(part)
            origin.append(index)
    sought = "".join(folded)
    first = min((at for word in words if (at := sought.find(word)) >= 0), default=0)
    where = origin[first] if origin else 0
    begin, end = max(0, where - _AROUND), min(len(text), where + 2 * _AROUND)
    head = "…" if begin else ""
    marks: set[tuple[int, int]] = set()
    for word in words:
        at = sought.find(word)
        while at >= 0:
            left, right = origin[at], origin[at + len(word) - 1] + 1
            if begin <= left and right <= end:
                marks.add((left - begin + len(head), right - begin + len(head)))
            at = sought.find(word, at + len(word))
    shown = "".join(" " if character.isspace() else character for character in text[begin:end])
    return head + shown + ("…" if end < len(text) else ""), sorted(marks)
