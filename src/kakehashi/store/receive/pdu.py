"""Protocol data units of the DICOM upper layer (PS3.8, section 9.3), as bytes and as values."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from kakehashi.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

APPLICATION = "1.2.840.10008.3.1.1.1"
"""The only application context that DICOM has."""

IMPLEMENTATION_UID = "2.25.163916372214566653863648258884340177684"
IMPLEMENTATION_NAME = "KAKEHASHI_1"

_HEAD = struct.Struct(">BxI")
_ITEM = struct.Struct(">BxH")
_FRAGMENT = struct.Struct(">IBB")
_FIXED = 68
_COMMAND, _LAST = 1, 2


class Kind(IntEnum):
    """Types of protocol data units."""

    ASSOCIATE_RQ = 1
    ASSOCIATE_AC = 2
    ASSOCIATE_RJ = 3
    P_DATA = 4
    RELEASE_RQ = 5
    RELEASE_RP = 6
    ABORT = 7


class AbortReason(IntEnum):
    """Reasons that the service provider gives when it aborts (PS3.8, table 9-26)."""

    NONE = 0
    UNRECOGNIZED_PDU = 1
    UNEXPECTED_PDU = 2
    UNEXPECTED_PARAMETER = 5
    INVALID_PARAMETER = 6


class ProtocolError(StoreError):
    """The peer breaks the protocol, and the association is to be aborted.

    Attributes
    ----------
    reason : AbortReason
    """

    def __init__(self, message: str, reason: AbortReason = AbortReason.INVALID_PARAMETER) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Context:
    """A presentation context that is proposed.

    Attributes
    ----------
    number : int
        Its odd number, 1 to 255.
    abstract : str
        SOP class.
    transfers : tuple of str
        Transfer syntaxes, in the order in which the peer prefers them.
    """

    number: int
    abstract: str
    transfers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AssociateRequest:
    """A-ASSOCIATE-RQ.

    Attributes
    ----------
    version : int
        Bits of the protocol versions that the peer speaks.
    called, calling : str
        AE titles without padding.
    application : str
        Application context.
    contexts : tuple of Context
    max_length : int
        Longest P-DATA body that the peer takes, in bytes; 0 if any.
    """

    version: int
    called: str
    calling: str
    application: str
    contexts: tuple[Context, ...]
    max_length: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a presentation context: 0 taken, 3 and 4 class or syntaxes not supported."""

    number: int
    result: int
    transfer: str


def frame(kind: Kind, body: bytes) -> bytes:
    """Return a whole unit."""
    return _HEAD.pack(kind, len(body)) + body


def parse_request(body: bytes) -> AssociateRequest:
    """Read the body of an A-ASSOCIATE-RQ.

    Raises
    ------
    ProtocolError
        It is cut, or an item in it is.
    """
    if len(body) < _FIXED:
        raise ProtocolError("A-ASSOCIATE-RQ is cut in its fixed part")
    application, max_length = "", 0
    contexts: list[Context] = []
    for kind, value in _items(body, _FIXED):
        if kind == 0x10:
            application = _uid(value)
        elif kind == 0x20:
            contexts.append(_context(value))
        elif kind == 0x50:
            for inner, number in _items(value, 0):
                if inner == 0x51 and len(number) == 4:
                    max_length = int.from_bytes(number, "big")
    return AssociateRequest(
        version=int.from_bytes(body[:2], "big"),
        called=_title(body[4:20]),
        calling=_title(body[20:36]),
        application=application,
        contexts=tuple(contexts),
        max_length=max_length,
    )


def build_accept(request: bytes, answers: tuple[Answer, ...], max_length: int) -> bytes:
    """Return an A-ASSOCIATE-AC.

    Parameters
    ----------
    request : bytes
        Body of the A-ASSOCIATE-RQ; both AE titles go back as they came.
    answers : tuple of Answer
    max_length : int
        Longest P-DATA body that we take, in bytes.
    """
    user = (
        _item(0x51, max_length.to_bytes(4, "big"))
        + _item(0x52, IMPLEMENTATION_UID.encode())
        + _item(0x55, IMPLEMENTATION_NAME.encode())
    )
    contexts = b"".join(
        _item(
            0x21,
            bytes([answer.number, 0, answer.result, 0]) + _item(0x40, answer.transfer.encode()),
        )
        for answer in answers
    )
    body = b"\0\1\0\0" + request[4:_FIXED] + _item(0x10, APPLICATION.encode())
    return frame(Kind.ASSOCIATE_AC, body + contexts + _item(0x50, user))


def build_reject(*, transient: bool, source: int, reason: int) -> bytes:
    """Return an A-ASSOCIATE-RJ; source and reason as in PS3.8, table 9-21."""
    return frame(Kind.ASSOCIATE_RJ, bytes([0, 2 if transient else 1, source, reason]))


def build_abort(reason: AbortReason) -> bytes:
    """Return an A-ABORT of the service provider."""
    return frame(Kind.ABORT, bytes([0, 0, 2, reason]))


def build_release_reply() -> bytes:
    """Return an A-RELEASE-RP."""
    return frame(Kind.RELEASE_RP, bytes(4))


def build_command(context: int, command: bytes, max_length: int) -> bytes:
    """Return a command set as P-DATA, in as many units as the peer's limit asks for.

    Parameters
    ----------
    context : int
        Number of the presentation context.
    command : bytes
    max_length : int
        Longest body that the peer takes, in bytes; 0 if any.
    """
    room = max_length - _FRAGMENT.size if max_length else len(command)
    units = []
    for start in range(0, len(command), room):
        piece = command[start : start + room]
        flags = _COMMAND | (_LAST if start + room >= len(command) else 0)
        units.append(frame(Kind.P_DATA, _FRAGMENT.pack(len(piece) + 2, context, flags) + piece))
    return b"".join(units)


def fragments(body: memoryview) -> Iterator[tuple[int, bool, bool, memoryview]]:
    """Yield the fragments of a P-DATA body.

    Yields
    ------
    context : int
        Number of the presentation context.
    command : bool
        Whether it is of a command set, not of a data set.
    last : bool
    piece : memoryview

    Raises
    ------
    ProtocolError
        A length does not fit.
    """
    position, end = 0, len(body)
    while position < end:
        if end - position < _FRAGMENT.size:
            raise ProtocolError("P-DATA is cut within the head of a fragment")
        length, context, flags = _FRAGMENT.unpack_from(body, position)
        after = position + 4 + length
        if length < 2 or after > end:
            raise ProtocolError(f"a fragment of P-DATA has the impossible length {length}")
        yield (
            context,
            bool(flags & _COMMAND),
            bool(flags & _LAST),
            body[position + _FRAGMENT.size : after],
        )
        position = after


def _items(body: bytes, position: int) -> Iterator[tuple[int, bytes]]:
    while position < len(body):
        if len(body) - position < _ITEM.size:
            raise ProtocolError("A-ASSOCIATE-RQ is cut within the head of an item")
        kind, length = _ITEM.unpack_from(body, position)
        position += _ITEM.size
        if position + length > len(body):
            raise ProtocolError(f"item {kind:#x} of A-ASSOCIATE-RQ is longer than what is there")
        yield kind, body[position : position + length]
        position += length


def _item(kind: int, value: bytes) -> bytes:
    return _ITEM.pack(kind, len(value)) + value


def _context(value: bytes) -> Context:
    if len(value) < 4:
        raise ProtocolError("a presentation context is cut")
    abstract = ""
    transfers = []
    for kind, inner in _items(value, 4):
        if kind == 0x30:
            abstract = _uid(inner)
        elif kind == 0x40:
            transfers.append(_uid(inner))
    return Context(value[0], abstract, tuple(transfers))


def _uid(value: bytes) -> str:
    # Some pad to even length here too, where nothing asks for it; with zero or with space.
    return value.rstrip(b"\0 ").decode("ascii", "replace")


def _title(value: bytes) -> str:
    return value.decode("latin-1").strip(" \0")
