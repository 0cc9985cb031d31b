"""Command sets of DIMSE (PS3.7, section 9.3 and annex E), as bytes and as values."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from kakehashi.store.receive.pdu import ProtocolError

C_STORE, C_ECHO, C_CANCEL = 0x0001, 0x0030, 0x0FFF
RESPONSE = 0x8000
"""Bit that makes a command field that of a response."""

_ELEMENT = struct.Struct("<HHI")
_SHORT = struct.Struct("<H")
_NO_DATA_SET = 0x0101
_CLASS, _FIELD, _MESSAGE, _DATA_SET = 0x0002, 0x0100, 0x0110, 0x0800
_ANSWERED, _STATUS, _COMMENT, _INSTANCE = 0x0120, 0x0900, 0x0902, 0x1000
_LONGEST_COMMENT = 64


class Status(IntEnum):
    """What is answered to a request (PS3.7, annex C; PS3.4, table B.2-1)."""

    SUCCESS = 0x0000
    PROCESSING_FAILURE = 0x0110
    SOP_CLASS_NOT_SUPPORTED = 0x0122
    UNRECOGNIZED_OPERATION = 0x0211
    OUT_OF_RESOURCES = 0xA700
    CANNOT_UNDERSTAND = 0xC000


@dataclass(frozen=True, slots=True)
class Request:
    """A command of the peer.

    Attributes
    ----------
    context : int
        Number of the presentation context on which it came.
    field : int
        Command Field: what is asked.
    message : int
        Message ID, which the response names.
    sop_class, sop : str
        Affected SOP Class and Instance UID, without padding; empty if there is none.
    data_set : bool
        Whether a data set follows.
    """

    context: int
    field: int
    message: int
    sop_class: str
    sop: str
    data_set: bool


def parse(context: int, command: bytes) -> Request:
    """Read a command set.

    Raises
    ------
    ProtocolError
        It is cut, holds other elements than commands do, or lacks what every command has.
    """
    values: dict[int, bytes] = {}
    position = 0
    while position < len(command):
        if len(command) - position < _ELEMENT.size:
            raise ProtocolError("a command set is cut within the head of an element")
        group, element, length = _ELEMENT.unpack_from(command, position)
        position += _ELEMENT.size
        if group != 0 or position + length > len(command):
            raise ProtocolError("a command set holds what no command set holds")
        values[element] = command[position : position + length]
        position += length
    return Request(
        context=context,
        field=_number(values, _FIELD),
        message=_number(values, _MESSAGE) if _MESSAGE in values else 0,
        sop_class=_uid(values.get(_CLASS, b"")),
        sop=_uid(values.get(_INSTANCE, b"")),
        data_set=_number(values, _DATA_SET) != _NO_DATA_SET,
    )


def build_response(request: Request, status: Status, comment: str = "") -> bytes:
    """Return the command set that answers a request.

    Parameters
    ----------
    request : Request
    status : Status
    comment : str, optional
        What went wrong, for the log of the sender; ASCII, cut to 64 characters.
    """
    body = b"".join(
        (
            _text(_CLASS, request.sop_class),
            _short(_FIELD, request.field | RESPONSE),
            _short(_ANSWERED, request.message),
            _short(_DATA_SET, _NO_DATA_SET),
            _short(_STATUS, status),
            _text(_COMMENT, comment[:_LONGEST_COMMENT], b" "),
            _text(_INSTANCE, request.sop),
        )
    )
    return _ELEMENT.pack(0, 0, 4) + struct.pack("<I", len(body)) + body


def _number(values: dict[int, bytes], element: int) -> int:
    value = values.get(element, b"")
    if len(value) != _SHORT.size:
        raise ProtocolError(f"a command set lacks its element (0000,{element:04x})")
    return int(_SHORT.unpack(value)[0])


def _uid(value: bytes) -> str:
    return value.rstrip(b"\0 ").decode("ascii", "replace")


def _short(element: int, value: int) -> bytes:
    return _ELEMENT.pack(0, element, 2) + _SHORT.pack(value)


def _text(element: int, value: str, pad: bytes = b"\0") -> bytes:
    if not value:
        return b""
    raw = value.encode("ascii", "replace")
    raw += pad * (len(raw) % 2)
    return _ELEMENT.pack(0, element, len(raw)) + raw
