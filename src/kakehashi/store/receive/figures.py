"""How much came from whom on which day, added up from the journal and kept when that goes."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kakehashi.errors import StoreError
from kakehashi.store.layout import locked, replacing
from kakehashi.store.receive.entry import Receipt
from kakehashi.store.receive.journal import ForeignPositionError

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
            except ForeignPositionError:
                # Written anew from what waits in the inbox; an object counts once all the same.
                rows = journal.rows()
            days: dict[dt.date, tuple[int, dict[str, Day]]] = {}
            for position, row in rows:
                if row["kind"] not in {"in", "held", "again"}:
                    continue
                receipt = Receipt.from_json(row)
                try:
                    date = day_of(receipt.received_at)
                except OverflowError:
                    raise StoreError(
                        f"the journal's row that ends at {position} is damaged: it has no time"
                    ) from None
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
        """Return a day's figures, by hospital.

        Raises
        ------
        StoreError
            Its file is damaged.
        """
        return self._read(date)[1]

    def days(self) -> list[dt.date]:
        """Return the days of which there are figures.

        Raises
        ------
        StoreError
            A file is no day's.
        """
        days = []
        for path in self._folder.glob("*.json"):
            try:
                days.append(dt.date.fromisoformat(path.stem))
            except ValueError:
                raise StoreError(f"{path} is no day's figures") from None
        return sorted(days)

    def _counted(self) -> int:
        try:
            position = int((self._folder / "counted").read_text(encoding="ascii"))
        except FileNotFoundError:
            return 0
        except ValueError:
            position = -1
        if position < 0:
            raise StoreError(f"{self._folder / 'counted'} is damaged: it holds no position")
        return position

    def _read(self, date: dt.date) -> tuple[int, dict[str, Day]]:
        path = self._folder / f"{date}.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return _whole(values["until"]), {
                name: _day(day) for name, day in values["facilities"].items()
            }
        except FileNotFoundError:
            return 0, {}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise StoreError(f"{path} is damaged: these are no figures of a day") from None

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


def _day(values: dict[str, Any]) -> Day:
    studies = {uid: _split(text) for uid, text in values["studies"].items()}
    counts = {name: _whole(value) for name, value in values.items() if name != "studies"}
    return Day(**counts, studies=studies)


def _whole(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(value)
    return value
