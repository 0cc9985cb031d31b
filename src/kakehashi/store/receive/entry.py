"""What is known of a received object, and the file that it lies in.

An object's file begins with a header of ours of constant length, then its data set follows as
it came. The header says all that the journal says of the object, so that a journal that is
lost can be written anew from the files.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import struct
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from kakehashi.errors import StoreError
from kakehashi.store.receive.pdu import IMPLEMENTATION_NAME, IMPLEMENTATION_UID

if TYPE_CHECKING:
    from pathlib import Path

HEADER_SIZE = 2048
"""Bytes before the data set: preamble, prefix and file meta information."""

_PREFIX = bytes(128) + b"DICM"
_PRIVATE = 0x0102
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Receipt:
    """An object, by whom and when it was sent.

    Attributes
    ----------
    received_at : datetime
        When its last byte came; with time zone.
    facility : str
        The hospital.
    calling, address : str
        AE title and network address of the sender.
    sop_class, sop, transfer_syntax : str
        UIDs, as the sender's command and the association say.
    study, series : str
        UIDs in the data set; empty if it has none.
    size : int
        Bytes of the data set.
    sha256 : str
        Of the data set alone, hexadecimal.
    """

    received_at: dt.datetime
    facility: str
    calling: str
    address: str
    sop_class: str
    sop: str
    transfer_syntax: str
    study: str
    series: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """Name of the object's file; nothing of what came over the network stands in it."""
        return hashlib.sha256(self.sop.encode()).hexdigest()[:40] + ".dcm"

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        values = {name: getattr(self, name) for name in _FIELDS}
        return values | {"received_at": self.received_at.isoformat()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Receipt:
        """Return what :meth:`as_json` gave; other keys are left aside.

        Raises
        ------
        StoreError
            A field is missing or is something else.
        """
        try:
            found = {name: values[name] for name in _FIELDS}
            found["received_at"] = dt.datetime.fromisoformat(found["received_at"])
        except (KeyError, TypeError, ValueError):
            raise StoreError(_ODD) from None
        if not isinstance(found["size"], int) or not all(
            isinstance(found[name], str) for name in _FIELDS if name not in {"received_at", "size"}
        ):
            raise StoreError(_ODD)
        return cls(**found)


_FIELDS = tuple(field.name for field in fields(Receipt))
_ODD = "this is not the description of a received object"


@dataclass(frozen=True, slots=True)
class Entry(Receipt):
    """An object that waits in the inbox.

    Attributes
    ----------
    position : int
        Its place in the journal; grows from entry to entry.
    path : Path
        Its file, readable as DICOM.
    """

    position: int
    path: Path


def header(receipt: Receipt) -> bytes:
    """Return the first ``HEADER_SIZE`` bytes of an object's file.

    It is file meta information as PS3.10 asks for, padded within its private element.
    """
    private = json.dumps(receipt.as_json(), ensure_ascii=False).encode()
    before = b"".join(
        (
            _element(0x0001, b"OB", b"\0\1"),
            _element(0x0002, b"UI", receipt.sop_class.encode()),
            _element(0x0003, b"UI", receipt.sop.encode()),
            _element(0x0010, b"UI", receipt.transfer_syntax.encode()),
            _element(0x0012, b"UI", IMPLEMENTATION_UID.encode()),
            _element(0x0013, b"SH", IMPLEMENTATION_NAME.encode()),
            _element(0x0016, b"AE", receipt.calling.encode("ascii", "replace")),
            _element(0x0100, b"UI", IMPLEMENTATION_UID.encode()),
        )
    )
    room = HEADER_SIZE - len(_PREFIX) - 12 - len(before) - 12
    meta = before + _element(_PRIVATE, b"OB", private.ljust(room))
    return _PREFIX + _element(0, b"UL", struct.pack("<I", len(meta))) + meta


def read_receipt(path: Path) -> Receipt:
    """Read the header of an object's file.

    Raises
    ------
    StoreError
        The file does not begin with a header of ours.
    OSError
        It cannot be read.
    """
    with path.open("rb") as file:
        raw = file.read(HEADER_SIZE)
    marker = struct.pack("<HH2sxx", 2, _PRIVATE, b"OB")
    start = raw.find(marker, len(_PREFIX)) + len(marker) + 4
    try:
        values = json.loads(raw[start:])
    except ValueError:
        values = None
    if not raw.startswith(_PREFIX) or not isinstance(values, dict):
        raise StoreError(f"{path} has no header of the receiver")
    return Receipt.from_json(values)


def is_whole(path: Path, receipt: Receipt) -> bool:
    """Say whether the data set in a file is the one that was received."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        file.seek(HEADER_SIZE)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest() == receipt.sha256 and size == receipt.size


def _element(element: int, vr: bytes, value: bytes) -> bytes:
    value += (b"\0" if vr in {b"UI", b"OB"} else b" ") * (len(value) % 2)
    length = struct.pack("<xxI" if vr == b"OB" else "<H", len(value))
    return struct.pack("<HH", 2, element) + vr + length + value
