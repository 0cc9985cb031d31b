"""Says whether the bytes of a numeric element are numbers, or text in their place."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Any

from pydicom.multival import MultiValue

if TYPE_CHECKING:
    from collections.abc import Iterable

_CODES = {
    "US": "H",
    "SS": "h",
    "AT": "H",
    "UL": "I",
    "SL": "i",
    "FL": "f",
    "FD": "d",
    "UV": "Q",
    "SV": "q",
}
SIZES = {vr: 4 if vr == "AT" else struct.calcsize(code) for vr, code in _CODES.items()}
"""Bytes of a value, by VR."""

_PRINTABLE = re.compile(rb"[ -~\n\r]+")
_WRITTEN = re.compile(rb"[A-Za-z ^,.\n\r]+|[0-9 ()+\-./:]+")
_JAPANESE = re.compile(r"[\u3041-\u30ff\u4e00-\u9fff]{2}")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")
_SHORTEST = 6
_LONG = 12
# What is measured in or by an image lies between; text read as a number does as a rule not.
_SMALLEST, _LARGEST = 1e-12, 1e12
_DECIMAL = re.compile(r"[+-]?(?:\d{1,16}(?:\.\d{0,16})?|\.\d{1,16})(?:[eE][+-]?\d{1,3})?")


def unpacked(raw: bytes, vr: str, *, little: bool) -> list[Any]:
    """Return the values of an element; its length must be a multiple of the VR's."""
    size = struct.calcsize(_CODES[vr])
    return list(struct.unpack(f"{'<' if little else '>'}{len(raw) // size}{_CODES[vr]}", raw))


def is_numeric(value: Any, vr: str, *, most: int, little: bool) -> bool:
    """Say whether a value is what its VR says: whole numbers of bytes, and no text.

    Six printable bytes or more are text where they stand for integers; where they stand for
    floating-point numbers, if these are absurd, or the bytes letters or digits only, or twelve,
    since one double in a thousand is printable by chance. So is Japanese in UTF-8.

    Parameters
    ----------
    value : bytes, number or list of numbers
    vr : str
        One of :data:`SIZES`.
    most : int
        Values that there may be; 0 if there is no bound.
    little : bool
        The byte order of bytes.
    """
    if isinstance(value, bytes):
        size = SIZES[vr]
        if len(value) % size or (most and len(value) > most * size):
            return False
        return not _is_text(value, unpacked(value, vr, little=little))
    values = list(value) if isinstance(value, (list, MultiValue)) else [value]
    if not all(isinstance(one, (int, float)) for one in values) or (most and len(values) > most):
        return False
    try:
        # As a file would have it, so that an object made in memory is no exception.
        code = "I" if vr == "AT" else _CODES[vr]  # a tag is one number to pydicom
        return not _is_text(struct.pack(f"<{len(values)}{code}", *values), values)
    except struct.error:
        return False


def _is_text(raw: bytes, values: Iterable[float]) -> bool:
    raw = raw.rstrip(b"\0")
    if len(raw) < _SHORTEST or not looks_like_text(raw):
        return False
    floats = [value for value in values if isinstance(value, float)]
    return (
        not floats
        or len(raw) >= _LONG
        or _WRITTEN.fullmatch(raw) is not None
        or any(value and not _SMALLEST < abs(value) < _LARGEST for value in floats)
    )


def looks_like_text(raw: bytes) -> bool:
    """Say whether bytes are printable as a whole, or Japanese in UTF-8."""
    raw = raw.rstrip(b"\0")
    if raw.isascii():
        return _PRINTABLE.fullmatch(raw) is not None
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return False
    return _JAPANESE.search(text) is not None and not _CONTROL.search(text)


def is_decimal(text: str) -> bool:
    """Say whether a text is one decimal number, or empty."""
    text = text.strip(" \0")
    return not text or _DECIMAL.fullmatch(text) is not None
