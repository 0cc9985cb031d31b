"""Which rows of a record concern some people, told by the columns' names and foreign keys.

A row with a patient's id is theirs or not by that alone. One without belongs to them if it names
one of their series or studies, or a row that is theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kakehashi.store.catalogue import TOMBSTONE

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

WITHDRAWN = "withdrawn"
"""Table of those who withdrew: it says who must not come back, so that it stays."""

_PATIENT, _UIDS = "patient_id", ("series_uid", "study_uid")


class LeftOut:
    """The rows to leave out of some tables.

    Parameters
    ----------
    patients : collection of str
        Values of ``patient_id``.
    tables : list of dict
        As :func:`kakehashi.store.portable.describe` gives them.
    rows : callable
        Gives the rows of a table.
    """

    def __init__(
        self,
        patients: Collection[str],
        tables: list[dict[str, Any]],
        rows: Callable[[dict[str, Any]], Iterable[list[Any]]],
    ) -> None:
        self._patients = frozenset(patients)
        self._uids: dict[str, set[Any]] = {name: set() for name in _UIDS}
        # Of each foreign key what it refers to, and the keys of rows there that are left out.
        self._gone: dict[tuple[str, tuple[str, ...]], set[tuple[Any, ...]]] = {
            (key["table"], tuple(key["referred"])): set()
            for table in tables
            for key in table["foreign_keys"]
        }
        self._at = {
            table["name"]: {column["name"]: n for n, column in enumerate(table["columns"])}
            for table in tables
        }
        concerned = [table for table in tables if patients and self._may_concern(table)]
        # What names a patient comes first, so that the second round seldom finds more.
        concerned.sort(key=lambda table: _PATIENT not in self._at[table["name"]])
        size = -1
        while size != (size := self._size()):
            for table in concerned:
                for row in rows(table):
                    if self.drops(table, row):
                        self._note(table["name"], row)

    def drops(self, table: dict[str, Any], row: list[Any]) -> bool:
        """Say whether a row is to be left out."""
        name = table["name"]
        at = self._at[name]
        if not self._patients or name == WITHDRAWN:
            return False
        if _PATIENT in at and row[at[_PATIENT]] is not None:
            return row[at[_PATIENT]] in self._patients
        if any(uid in at and row[at[uid]] in self._uids[uid] for uid in _UIDS):
            return True
        return any(
            tuple(row[at[column]] for column in key["columns"])
            in self._gone[key["table"], tuple(key["referred"])]
            for key in table["foreign_keys"]
        )

    @property
    def series(self) -> frozenset[str]:
        """SeriesInstanceUIDs that are theirs."""
        return frozenset(self._uids["series_uid"])

    def rest(self, table: dict[str, Any], rows: Iterable[list[Any]]) -> Iterator[list[Any]]:
        """Yield the rows that stay; in lists of series a tombstone stands where theirs were."""
        lists = [n for n, column in enumerate(table["columns"]) if column["type"] == "JSON"]
        gone = self._uids["series_uid"]
        for row in rows:
            if self.drops(table, row):
                continue
            for n in lists:
                if gone and isinstance(row[n], list):
                    row[n] = [
                        TOMBSTONE if isinstance(one, str) and one in gone else one for one in row[n]
                    ]
            yield row

    def _may_concern(self, table: dict[str, Any]) -> bool:
        names = {column["name"] for column in table["columns"]}
        return table["name"] != WITHDRAWN and bool(
            names & {_PATIENT, *_UIDS} or table["foreign_keys"]
        )

    def _note(self, name: str, row: list[Any]) -> None:
        at = self._at[name]
        for (table, columns), keys in self._gone.items():
            if table == name:
                keys.add(tuple(row[at[column]] for column in columns))
        # Without a study or patient of its own it only refers to a series.
        if _PATIENT in at or "study_uid" in at:
            for uid in _UIDS:
                if uid in at and row[at[uid]] is not None:
                    self._uids[uid].add(row[at[uid]])

    def _size(self) -> int:
        return sum(map(len, [*self._uids.values(), *self._gone.values()]))
