"""Dates of DICOM, moved by a person's number of days."""

from __future__ import annotations

import datetime as dt
import re

_DATE = re.compile(r"(\d{4})([.\-/]?)(\d{2})\2(\d{2})")
_DATETIME = re.compile(
    r"(\d{8})((?:[01]\d|2[0-3])(?:[0-5]\d(?:[0-6]\d(?:\.\d{1,6})?)?)?)?([+-]\d{4})?"
)
_TIME = re.compile(
    r"(?:[01]\d|2[0-3])(?::?[0-5]\d(?::?[0-6]\d(?:\.\d{1,6})?)?)?"
)  # hours, or with minutes, or with seconds
_AGE = re.compile(r"(\d{3})([DWMY])")
_OLDEST = 89
_DAYS = {"D": 1.0, "W": 7.0, "M": 30.4375, "Y": 365.25}


def shifted_day(day: dt.date, days: int) -> dt.date | None:
    """Return the day moved, None where the calendar ends."""
    try:
        return day + dt.timedelta(days=days)
    except OverflowError:
        return None


def day_of(text: str) -> dt.date | None:
    """Return the day of a value of VR DA, also in the old form with dots; None if invalid."""
    found = _DATE.fullmatch(text.strip(" \0"))
    if not found:
        return None
    try:
        return dt.date(int(found[1]), int(found[3]), int(found[4]))
    except ValueError:
        return None


def shift_date(text: str, days: int) -> str:
    """Move a value of VR DA; what is no date becomes empty."""
    day = day_of(text)
    moved = shifted_day(day, days) if day else None
    return f"{moved:%Y%m%d}".rjust(8, "0") if moved else ""


def shift_datetime(text: str, days: int) -> str:
    """Move the day of a value of VR DT; time and zone stay as they are.

    A value without a day (year or month only) cannot be moved by days and becomes empty.
    """
    found = _DATETIME.fullmatch(text.strip(" \0"))
    if not found:
        return ""
    day = shift_date(found[1], days)
    return day and f"{day}{found[2] or ''}{found[3] or ''}"


def time_of(text: str) -> str:
    """Return a value of VR TM unchanged, empty if it is none."""
    text = text.strip(" \0")
    return text if _TIME.fullmatch(text) else ""


def age_of(text: str) -> str:
    """Return a value of VR AS, over 89 years as ``090Y``; empty if it is none."""
    found = _AGE.fullmatch(text.strip(" \0"))
    if not found:
        return ""
    return "090Y" if int(found[1]) * _DAYS[found[2]] >= (_OLDEST + 1) * 365 else found[0]


def age_between(birth: dt.date, day: dt.date) -> str:
    """Return the age at a day as a value of VR AS: days, months under two years, years."""
    months = (day.year - birth.year) * 12 + day.month - birth.month - (day.day < birth.day)
    if day < birth:
        return ""
    if months < 1:
        return f"{(day - birth).days:03d}D"
    return age_of(f"{months:03d}M" if months < 24 else f"{min(months // 12, 999):03d}Y")
