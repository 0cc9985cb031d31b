"""What an association asks of the inbox for a whole object, and what it is told."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kakehashi.store.receive.entry import Receipt

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors that say that the disk is full, or as good as full."""


class Verdict(StrEnum):
    """What became of an object that arrived whole."""

    STORED = "stored"
    AGAIN = "again"
    HELD = "held"
    NO_ROOM = "no room"
    CROWDED = "quarantine full"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Offer:
    """A sealed object that asks for its place.

    Attributes
    ----------
    part : str
        Name of its file among those that arrive.
    receipt : Receipt
    reason : str
        Why it belongs into quarantine; empty if it does not.
    """

    part: str
    receipt: Receipt
    reason: str
