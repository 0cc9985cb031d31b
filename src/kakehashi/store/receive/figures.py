"""How much came from whom on which day, added up from the journal and kept when that goes."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kakehashi.store.layout import locked, replacing
from kakehashi.store.receive.entry import Receipt
from kakehashi.store.receive.journal import ForeignPosition

if TYPE_CHECKING:
    from pathlib import Path

    from kakehashi.store.receive.journal import Journal

_HASH_DIGITS = 12


@dataclass
class Day:
    """What came from one hospital on one day.

    Attributes
    ----------
    objects, bytes : int
        Different objects that reached the inbox, and the sum of their data sets.
    again : int
        Objects that came once more.
    quarantined : int
        Objects that were put into quarantine and not released.
    studies : dict of str to set of str
        By StudyInstanceUID, hashes of the SOPInstanceUIDs that came.
    """

    objects: int = 0
    bytes: int = 0
    again: int = 0
    quarantined: int = 0
    studies: dict[str, set[str]] = field(default_factory=dict)

    def add(self, receipt: Receipt, kind: str, *, released: bool) -> None:
        """Count a row of the journal."""
        if kind == "held":
            self.quarantined += 1
        elif kind == "again":
            self.again += 1
        elif kind == "in":
            self.quarantined -= released
            came = self.studies.setdefault(receipt.study, set())
            short = hashlib.sha256(receipt.sop.encode()).hexdigest()[:_HASH_DIGITS]
            if short in came:
                self.again += not released
            else:
                came.add(short)
                self.objects += 1
                self.bytes += receipt.size


class Figures:
    """Files of figures, one a day.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def update(self, journal: Journal) -> None:
        """Count what stands in the journal and was not counted yet."""
        with locked(self._folder / ".lock", wait=True):
            try:
                rows = journal.rows(self._counted())
            except ForeignPosition:
                # Written anew from what waits in the inbox; an object counts once all the same.
                rows = journal.rows()
            days: dict[dt.date, tuple[int, dict[str, Day]]] = {}
            for position, row in rows:
                if row["kind"] not in {"in", "held", "again"}:
                    continue
                receipt = Receipt.from_json(row)
                date = day_of(receipt.received_at)
                if date not in days:
                    days[date] = self._read(date)
                until, facilities = days[date]
                # A run that ended between two files has counted some of it.
                if position > until:
                    day = facilities.setdefault(receipt.facility, Day())
                    day.add(receipt, row["kind"], released=bool(row.get("released")))
            for date, (_, facilities) in sorted(days.items()):
                self._write(date, rows.end, facilities)
            with replacing(self._folder / "counted", mode=0o600) as file:
                file.write(b"%d\n" % rows.end)

    def day(self, date: dt.date) -> dict[str, Day]:
        """Return a day's figures, by hospital."""
        return self._read(date)[1]

    def days(self) -> list[dt.date]:
        """Return the days of which there are figures."""
        return sorted(dt.date.fromisoformat(path.stem) for path in self._folder.glob("*.json"))

    def _counted(self) -> int:
        try:
            return int((self._folder / "counted").read_text(encoding="ascii"))
        except FileNotFoundError:
            return 0

    def _read(self, date: dt.date) -> tuple[int, dict[str, Day]]:
        try:
            raw = (self._folder / f"{date}.json").read_text(encoding="utf-8")
        except FileNotFoundError:
            return 0, {}
        values = json.loads(raw)
        return values["until"], {
            name: Day(**day | {"studies": {uid: _split(t) for uid, t in day["studies"].items()}})
            for name, day in values["facilities"].items()
        }

    def _write(self, date: dt.date, until: int, facilities: dict[str, Day]) -> None:
        values = {
            name: {
                "objects": day.objects,
                "bytes": day.bytes,
                "again": day.again,
                "quarantined": day.quarantined,
                "studies": {uid: "".join(sorted(came)) for uid, came in day.studies.items()},
            }
            for name, day in facilities.items()
        }
        with replacing(self._folder / f"{date}.json", mode=0o600) as file:
            document = {"until": until, "facilities": values}
            file.write(json.dumps(document, ensure_ascii=False).encode() + b"\n")


def day_of(moment: dt.datetime) -> dt.date:
    """Return the day of a moment where the store stands: hospitals count in its days."""
    return moment.astimezone().date()


def _split(text: str) -> set[str]:
    return {text[at : at + _HASH_DIGITS] for at in range(0, len(text), _HASH_DIGITS)}
