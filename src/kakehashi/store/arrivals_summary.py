"""What came from whom, in figures that may leave the closed folder of the receiver.

The store's intake writes it, the authority hands it to hubs, and the portal shows it. Hub and
authority have neither pydicom nor numpy, so this imports none of the receiver's own modules.
"""

from __future__ import annotations

import datetime as dt
import re
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from kakehashi.errors import StoreError
from kakehashi.store.receive.settings import Facility

if TYPE_CHECKING:
    from pathlib import Path

LONGEST_REASON = 200
"""Characters of a reason."""

_LEFT_OUT = "…"
_LOOKED_AT = 1000
# What a parser says after its own name may quote the object.
_PARSER = re.compile(r"^cannot be read:\s*(\w*(?:Error|Exception)\b)?.*$", re.DOTALL)
_QUOTED = re.compile(r"(?<!\w)(['\"`]).*?(?:\1(?!\w)|\Z)", re.DOTALL)
_ASIDE = re.compile(r"\((?!s\))[^()]*(?:\)|\Z)")
# Names in DICOM's form or in kanji, UIDs, dates, numbers of people and of positions in a file.
_VALUE = re.compile(r"\S*(?:\^|[^\x00-\x7f]|\d\D{0,2}\d\D{0,2}\d)\S*")


def public_reason(reason: str) -> str:
    """Return the reason for a quarantine without what it may quote of the object.

    Left out are what a parser says beyond the name of its error, quotations, parentheses, words
    with three digits or more, with ``^`` or outside of ASCII, and what cannot be printed. So
    reasons that differ in these alone become one, and can be counted together.

    Parameters
    ----------
    reason : str
        As the quarantine has it.

    Returns
    -------
    str
        At most ``LONGEST_REASON`` printable characters on one line.
    """
    text = reason[:_LOOKED_AT]
    text = _PARSER.sub(lambda found: f"cannot be read: {found[1] or _LEFT_OUT}", text)
    text, more = _QUOTED.sub(_LEFT_OUT, text), 1
    while more:
        text, more = _ASIDE.subn(_LEFT_OUT, text)
    text = " ".join(_VALUE.sub(_LEFT_OUT, text).split())
    text = "".join(character for character in text if character.isprintable())
    return text[:LONGEST_REASON].rstrip() or _LEFT_OUT


def _without_values(value: object) -> object:
    return public_reason(value) if isinstance(value, str) else value


Count = Annotated[int, Field(ge=0)]
Reason = Annotated[str, BeforeValidator(_without_values)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ArrivalDay(_Model):
    """One hospital's day, in days of the place where the store stands."""

    day: dt.date
    expected: Count | None = Field(description="Objects of its list; none where it sent no list.")
    received: Count = Field(description="Objects that came on that day.")
    missing: Count | None = Field(
        description="Objects of that day's list that have not come on any day."
    )
    studies_missing: Count | None = Field(description="Studies of which objects are missing.")
    quarantined: Count
    bytes: Count

    @model_validator(mode="after")
    def _list_is_whole(self) -> Self:
        if self.expected is None or self.missing is None or self.studies_missing is None:
            if not self.expected is self.missing is self.studies_missing is None:
                raise ValueError("expected, missing and studies_missing go together")
        elif self.missing > self.expected:
            raise ValueError("more is missing than was expected")
        return self


class FacilityArrivals(_Model):
    """One hospital's days; a day on which nothing was expected and nothing came may lack."""

    facility: Facility
    days: tuple[ArrivalDay, ...]

    @model_validator(mode="after")
    def _each_day_once(self) -> Self:
        if len({day.day for day in self.days}) < len(self.days):
            raise ValueError(f"a day of {self.facility!r} stands there twice")
        return self


class Quarantined(_Model):
    """Objects of one hospital that do not go on, for one reason."""

    facility: Facility
    reason: Reason = Field(description="Without what it may quote; see public_reason.")
    held_back: bool = Field(description="Held by the de-identification, not for being damaged.")
    count: Count
    oldest: dt.date


class Waiting(_Model):
    """What was de-identified and waits until its series is complete."""

    objects: Count
    series: Count


class Arrivals(_Model):
    """The whole summary: counts and reasons, nothing that names a person or an object."""

    kakehashi_arrivals: Literal[1] = 1
    written_at: AwareDatetime
    facilities: tuple[FacilityArrivals, ...]
    quarantine: tuple[Quarantined, ...]
    waiting: Waiting

    @model_validator(mode="after")
    def _each_hospital_once(self) -> Self:
        if len({one.facility for one in self.facilities}) < len(self.facilities):
            raise ValueError("a hospital stands there twice")
        return self

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        """Read a summary from JSON.

        Raises
        ------
        StoreError
            It is none; the message says where, and quotes no value of it.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "(document)"
            raise StoreError(
                f"this is no summary of arrivals: {where[:80]}: {first['msg']}"
            ) from None

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Read the file of a summary.

        Returns
        -------
        Arrivals or None
            None where none was written yet.

        Raises
        ------
        StoreError
            The file cannot be read, or is no summary.
        """
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error.strerror})") from error
        try:
            return cls.parse(text)
        except StoreError as error:
            raise StoreError(
                f"{path} is damaged ({error}); remove it, and the intake writes a new one"
            ) from None

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all, for everybody to read.

        Raises
        ------
        StoreError
            It cannot be written.
        """
        from kakehashi.store.layout import replacing  # noqa: PLC0415 - brings numpy and pydicom

        try:
            with replacing(path, mode=0o644) as file:
                file.write(self.model_dump_json(indent=1).encode() + b"\n")
        except OSError as error:
            raise StoreError(f"{path}: cannot be written ({error.strerror})") from error
