"""What hospitals say that they sent, against what came."""

from __future__ import annotations

import csv
import datetime as dt
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kakehashi.errors import StoreError
from kakehashi.store.dicom import UID
from kakehashi.store.layout import locked, replacing
from kakehashi.store.receive.figures import Day, Figures, day_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from kakehashi.store.receive.inbox import Inbox

_COLUMNS = ("date", "study_uid", "instances")

Expected = dict[str, dict[str, int]]
"""By hospital, by StudyInstanceUID, the number of objects."""


@dataclass(frozen=True, slots=True)
class Missing:
    """A study of which not all came.

    Attributes
    ----------
    study : str
        StudyInstanceUID.
    expected, received : int
        Objects.
    """

    study: str
    expected: int
    received: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """A hospital's day.

    Attributes
    ----------
    date : date
    facility : str
    expected_studies, expected : int
        Studies, and objects in them, that the hospital says it sent on that day; none where
        it gave no list.
    received_studies, received, bytes : int
        What reached the inbox on that day.
    again : int
        Objects that came once more.
    quarantined : int
        Objects of that day in quarantine, or discarded there.
    missing : tuple of Missing
        Studies of the list of which objects are missing, whichever day the others came.
    """

    date: dt.date
    facility: str
    expected_studies: int
    expected: int
    received_studies: int
    received: int
    bytes: int
    again: int
    quarantined: int
    missing: tuple[Missing, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return asdict(self) | {"date": self.date.isoformat()}


def expect(folder: Path, facility: str, days: Mapping[dt.date, Mapping[str, int]]) -> int:
    """Take a hospital's list of what it sent.

    Parameters
    ----------
    folder : Path
        Where lists are kept.
    facility : str
    days : mapping
        From :func:`read_list`. A study that was in an earlier list of that day has the new
        number.

    Returns
    -------
    int
        Number of studies in the list.
    """
    with locked(folder / ".lock", wait=True):
        for date, studies in days.items():
            known = _expected(folder, date)
            known.setdefault(facility, {}).update(studies)
            with replacing(folder / f"{date}.json", mode=0o600) as file:
                file.write(json.dumps(known, ensure_ascii=False).encode() + b"\n")
    return sum(map(len, days.values()))


def arrivals(inbox: Inbox, days: int) -> list[Arrival]:
    """Compare lists and figures.

    Parameters
    ----------
    inbox : Inbox
    days : int
        How many, today the last of them.

    Returns
    -------
    list of Arrival
        By day, the newest first, and hospital; where something was expected or came.
    """
    inbox.figures.update(inbox.journal)
    today = day_of(dt.datetime.now(dt.UTC))
    wanted = [today - dt.timedelta(days=back) for back in range(days)]
    figures = {date: inbox.figures.day(date) for date in wanted}
    came = _came(inbox.figures, wanted[-1] - dt.timedelta(days=1))
    found = []
    for date in wanted:
        expected = _expected(inbox.folders.expected, date)
        for facility in sorted(expected.keys() | figures[date].keys()):
            day = figures[date].get(facility, Day())
            studies = expected.get(facility, {})
            counts = [
                Missing(uid, number, len(came.get((facility, uid), ())))
                for uid, number in sorted(studies.items())
            ]
            found.append(
                Arrival(
                    date=date,
                    facility=facility,
                    expected_studies=len(studies),
                    expected=sum(studies.values()),
                    received_studies=len(day.studies),
                    received=day.objects,
                    bytes=day.bytes,
                    again=day.again,
                    quarantined=day.quarantined,
                    missing=tuple(one for one in counts if one.received < one.expected),
                )
            )
    return found


@dataclass(frozen=True, slots=True)
class Listed:
    """A study, by the list that it stands in and by what came of it.

    Attributes
    ----------
    expected : int or None
        Objects by the hospital's list; None where it stands in none.
    received : int
        Objects that reached the inbox.
    """

    expected: int | None
    received: int


def listed(inbox: Inbox, days: int) -> dict[tuple[str, str], Listed]:
    """Compare lists and figures by study.

    Parameters
    ----------
    inbox : Inbox
    days : int
        How many, today the last of them.

    Returns
    -------
    dict of (str, str) to Listed
        By hospital and StudyInstanceUID. Of a study in the lists of several days the largest
        number counts, as :func:`arrivals` then calls it missing in none.
    """
    inbox.figures.update(inbox.journal)
    today = day_of(dt.datetime.now(dt.UTC))
    first = today - dt.timedelta(days=days - 1)
    expected: dict[tuple[str, str], int] = {}
    for back in range(days):
        lists = _expected(inbox.folders.expected, today - dt.timedelta(days=back))
        for facility, studies in lists.items():
            for uid, number in studies.items():
                key = facility, uid
                expected[key] = max(number, expected.get(key, 0))
    came = _came(inbox.figures, first)
    return {
        key: Listed(expected.get(key), len(came.get(key, ())))
        for key in expected.keys() | came.keys()
    }


def _came(figures: Figures, since: dt.date) -> dict[tuple[str, str], set[str]]:
    """Return hashes of the objects that came, by hospital and study.

    A study may be sent around midnight, so the day before the first counts too.
    """
    came: dict[tuple[str, str], set[str]] = {}
    for date in figures.days():
        if date >= since:
            for facility, day in figures.day(date).items():
                for uid, hashes in day.studies.items():
                    came.setdefault((facility, uid), set()).update(hashes)
    return came


def _expected(folder: Path, date: dt.date) -> Expected:
    path = folder / f"{date}.json"
    try:
        values: Expected = json.loads(path.read_text(encoding="utf-8"))
        numbers = [number for studies in values.values() for number in studies.values()]
        sound = all(isinstance(number, int) for number in numbers)
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise StoreError(f"{path} is damaged: this is no list of what a hospital sent")
    return values


def read_list(table: Path) -> dict[dt.date, dict[str, int]]:
    """Read a hospital's list: by day and StudyInstanceUID the number of objects.

    Parameters
    ----------
    table : Path
        CSV with the columns ``date`` (2026-04-01 or 20260401), ``study_uid`` and
        ``instances``.

    Raises
    ------
    StoreError
        The list cannot be read, or a line of it is wrong.
    """
    days: dict[dt.date, dict[str, int]] = {}
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if missing := set(_COLUMNS) - set(reader.fieldnames or ()):
                raise StoreError(
                    f"{table}: lacks the column(s) {', '.join(sorted(missing))}; it needs "
                    f"{', '.join(_COLUMNS)}"
                )
            for row in reader:
                date, study, instances = _line(table, reader.line_num, row)
                days.setdefault(date, {})[study] = instances
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise StoreError(f"{table}: cannot be read as CSV in UTF-8 ({error})") from error
    return days


def _line(table: Path, number: int, row: dict[str, str | None]) -> tuple[dt.date, str, int]:
    try:
        date = dt.date.fromisoformat((row["date"] or "").strip())
        study, instances = (row["study_uid"] or "").strip(), int(row["instances"] or "")
    except ValueError as error:
        raise StoreError(f"{table}, line {number}: {error}") from None
    if not UID.fullmatch(study) or instances < 1:
        raise StoreError(
            f"{table}, line {number}: needs a StudyInstanceUID and a number of at least 1"
        )
    return date, study, instances
