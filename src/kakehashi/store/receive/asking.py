"""What an association's process asks of the listener, and what it is told.

The process speaks with the network, so the listener believes nothing of what it says that it
can check.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import stat
from typing import TYPE_CHECKING, Any

from kakehashi.errors import StoreError
from kakehashi.store.dicom import UID
from kakehashi.store.receive.entry import HEADER_SIZE, Receipt
from kakehashi.store.receive.offer import Offer, Verdict

if TYPE_CHECKING:
    import socket
    from pathlib import Path

MESSAGE = 1 << 16
"""Bytes of the longest message."""

WELCOME, FULL = b"welcome", b"full"

_PART = re.compile(r"([0-9]+)-[0-9]+\.part")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LONGEST_WAIT = dt.timedelta(hours=1)
"""Time from an object's last byte to the question; a clock may be set in between."""


class Asker:
    """The end of an association's process.

    Parameters
    ----------
    channel : socket
        Keeps messages apart.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel

    def enter(self, facility: str) -> bool:
        """Ask whether one more association of a hospital may go on."""
        return self._ask(facility) == WELCOME

    def place(self, offer: Offer) -> Verdict:
        """Ask for an object's place; all is durable on return."""
        answer = self._ask([offer.part, offer.receipt.as_json(), offer.reason])
        return Verdict(answer.decode())

    def _ask(self, question: Any) -> bytes:
        self._channel.send(json.dumps(question).encode())
        # Nothing comes where the listener is gone; then this process goes too.
        return self._channel.recv(MESSAGE)


def understand(message: bytes, pid: int, facilities: frozenset[str], incoming: Path) -> str | Offer:
    """Return the hospital that wants to enter, or the object that wants its place.

    Parameters
    ----------
    message : bytes
    pid : int
        Of the process that sent it.
    facilities : frozenset of str
        The hospitals of which it may be.
    incoming : Path
        Folder for what arrives.

    Raises
    ------
    StoreError
        It is neither, or it is about what is not that process's own, or not so.
    ValueError
        It cannot be read.
    OSError
        There is no such object.
    """
    try:
        question = json.loads(message)
    except RecursionError:
        raise StoreError("it cannot be read to its depth") from None
    # Half of a pair is text in JSON, and in no file: the journal could not be written.
    json.dumps(question, ensure_ascii=False).encode()
    if isinstance(question, str):
        _check(question, facilities)
        return question
    part, receipt, reason = question
    if not isinstance(part, str) or not isinstance(reason, str) or not isinstance(receipt, dict):
        raise StoreError("this is no question")
    name = _PART.fullmatch(part)
    if name is None or int(name[1]) != pid:
        raise StoreError(f"{part!r} is no name of an object of its own that arrives")
    offer = Offer(part, Receipt.from_json(receipt), reason)
    _check(offer.receipt.facility, facilities)
    _doubt(offer.receipt, incoming / part)
    return offer


def _check(facility: str, facilities: frozenset[str]) -> None:
    if facility not in facilities:
        raise StoreError("it speaks for a hospital that is not its own")


def _doubt(receipt: Receipt, path: Path) -> None:
    """See that what is said of an object can be so."""
    uids = (receipt.sop_class, receipt.sop, receipt.transfer_syntax)
    inside = filter(None, (receipt.study, receipt.series))
    if not all(UID.fullmatch(uid) for uid in (*uids, *inside)):
        raise StoreError("it names an object by what is no UID")
    if not _SHA256.fullmatch(receipt.sha256):
        raise StoreError("its hash is none")
    at = receipt.received_at
    if at.tzinfo is None or abs(dt.datetime.now(dt.UTC) - at) > _LONGEST_WAIT:
        raise StoreError("it came at another time")
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size != HEADER_SIZE + receipt.size:
        raise StoreError("its file is another")
