"""What a received object is, de-identified: asked of a child, and believed only in part."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kakehashi.store.dicom import UID
from kakehashi.store.intake.child import Child, Ended
from kakehashi.store.service.reports import LONGEST_REPORT

if TYPE_CHECKING:
    from kakehashi.secret import Secret
    from kakehashi.store.intake.channel import Message

MEMORY = 512 << 20
"""Bytes that an object of no size may take while it is parsed."""

COPIES = 6
"""How often an object may lie in memory besides: as it came, taken apart, written, and in between.
"""

SECONDS = 120.0
"""How long an object of no size may take; each megabyte gives one more."""

_ROOM = 16 << 20
_LONGEST_REASON = 400
_PSEUDONYM = re.compile(r"K[A-Z2-7]{16}")


class Unreadable(Exception):  # noqa: N818 - a verdict on an object, not a failure of ours
    """An object cannot be taken; the text is the reason."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """A de-identified object, and what a child says of it.

    Attributes
    ----------
    series, sop, study, patient : str
        De-identified; empty only where it is held.
    tier : int
    held : str
        Why it must not go into the store, empty if it may.
    left : int
        How many kinds of identifiers were found in what was written.
    report : str or None
        Text of a structured report; it may be longer than any that is kept.
    content : bytes
        The file.
    """

    series: str
    sop: str
    study: str
    patient: str
    tier: int
    held: str
    left: int
    report: str | None
    content: bytes


class Parser:
    """De-identifies received objects, in a child that has no rights.

    Parameters
    ----------
    key : Secret
        The key for pseudonyms.
    account : str or None
        Who the child is; see :func:`kakehashi.store.confine.confine`.
    """

    def __init__(self, key: Secret, account: str | None) -> None:
        self._child = Child(
            "parser", "kakehashi.store.intake.parse", account, {"key": key.reveal()}
        )

    def object(self, descriptor: int, facility: str) -> Parsed:
        """De-identify an object.

        Parameters
        ----------
        descriptor : int
            Its file, open for reading; it stays open.
        facility : str
            Where it came from.

        Raises
        ------
        Unreadable
            It cannot be read, or the child ended over it.
        StoreError
            The child does not start.
        """
        size = os.fstat(descriptor).st_size
        try:
            answer = self._child.ask(
                {"facility": facility},
                memory=MEMORY + COPIES * size,
                seconds=SECONDS + size / 1e6,
                longest=2 * size + _ROOM,
                descriptors=[descriptor],
            )
        except Ended as ended:
            raise Unreadable(str(ended)) from ended
        if isinstance(reason := answer.facts.get("refused"), str):
            raise Unreadable(f"cannot be read: {plain(reason)}")
        try:
            return _checked(answer)
        except ValueError as error:
            self._child.end()
            raise Unreadable(f"what its parser says of it makes no sense: {error}") from error

    def close(self) -> None:
        """End the child."""
        self._child.end()


def _checked(answer: Message) -> Parsed:
    facts = answer.facts
    held = plain(_typed(facts, "held", str))
    series, sop, study = (_typed(facts, name, str) for name in ("series", "sop", "study"))
    patient = _typed(facts, "patient", str)
    for name, uid in (("series", series), ("sop", sop), ("study", study)):
        if not UID.fullmatch(uid) and not (held and not uid):
            raise ValueError(name)
    if not _PSEUDONYM.fullmatch(patient) and not (held and not patient):
        raise ValueError("patient")
    tier, left = _typed(facts, "tier", int), _typed(facts, "left", int)
    if not 1 <= tier <= 3 or left < 0:
        raise ValueError("tier")
    report = facts.get("report")
    if report is not None:
        # Longer ones are refused as such; NUL and halves of characters no database takes.
        report = _typed(facts, "report", str)[: 4 * LONGEST_REPORT].replace("\0", "")
        report = report.encode("utf-8", "replace").decode()
    return Parsed(series, sop, study, patient, tier, held, left, report, bytes(answer.content))


def _typed(facts: dict[str, Any], name: str, kind: type[Any]) -> Any:
    value = facts.get(name)
    if type(value) is not kind:
        raise ValueError(name)
    return value


def plain(reason: str) -> str:
    """Return a child's words, short enough and without what could steer a terminal."""
    short = reason[:_LONGEST_REASON]
    return "".join(letter if letter.isprintable() else "?" for letter in short)
