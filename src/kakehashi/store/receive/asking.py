"""What an association's process asks of the listener, and what it is told.

The process speaks with the network, so the listener believes nothing of what it says that it
can check.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from kakehashi.errors import StoreError
from kakehashi.store.receive.entry import Receipt
from kakehashi.store.receive.offer import Offer, Verdict

if TYPE_CHECKING:
    import socket

MESSAGE = 1 << 16
"""Bytes of the longest message."""

WELCOME, FULL = b"welcome", b"full"

_PART = re.compile(r"([0-9]+)-[0-9]+\.part")


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


def understand(message: bytes, pid: int, facilities: frozenset[str]) -> str | Offer:
    """Return the hospital that wants to enter, or the object that wants its place.

    Parameters
    ----------
    message : bytes
    pid : int
        Of the process that sent it.
    facilities : frozenset of str
        The hospitals of which it may be.

    Raises
    ------
    StoreError
        It is neither, or it is about what is not that process's own.
    ValueError
        It cannot be read.
    """
    question = json.loads(message)
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
    return offer


def _check(facility: str, facilities: frozenset[str]) -> None:
    if facility not in facilities:
        raise StoreError("it speaks for a hospital that is not its own")
