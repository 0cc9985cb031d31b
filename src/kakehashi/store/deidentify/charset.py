"""Text of DICOM elements, decoded without errors or not at all."""

from __future__ import annotations

import re
import warnings
from functools import lru_cache

from pydicom import charset as pydicom_charset
from pydicom.charset import convert_encodings, decode_bytes

UNREADABLE = None
"""What stands for a text that could not be decoded."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufffd\ud800-\udfff]")
_JAPANESE = re.compile(r"[\u3041-\u30ff\u4e00-\u9fff\uff66-\uff9f々]{2}")
# Escape sequences of these are understood also where nobody announced them.
_EXTENSIONS = (
    "ISO 2022 IR 13",
    "ISO 2022 IR 87",
    "ISO 2022 IR 159",
    "ISO 2022 IR 149",
    "ISO 2022 IR 58",
)
_DELIMITERS = {0x0A, 0x0C, 0x0D, 0x5C}
_PN_DELIMITERS = _DELIMITERS | {0x5E, 0x3D}
# Character sets in which nearly any bytes are a text, so that one of them proves nothing.
_ANY = frozenset({"iso8859", "latin_1", "iso8859_1", "shift_jis"})


@lru_cache(maxsize=256)
def encodings_of(declared: tuple[str, ...]) -> tuple[str, ...]:
    """Return Python's names of what Specific Character Set declares.

    A name that is not known counts as the default repertoire: its text is then readable
    where it is ASCII, UTF-8 or Shift-JIS.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [
            name if name in pydicom_charset.python_encoding else _corrected(name)
            for name in declared or ("",)
        ]
        return tuple(convert_encodings(names))


def _corrected(name: str) -> str:
    # What pydicom takes beyond DICOM's names are all codecs of Python, of which some (base64,
    # rot13, unicode_escape) would hide a text from a search.
    return name if re.fullmatch(r"ISO.(?:IR|2022.IR).\d{1,3}", name) else "ISO_IR 6"


def decode(raw: bytes, encodings: tuple[str, ...], *, person: bool = False) -> str | None:
    """Decode the value of a text element.

    In turn: ASCII; escape sequences of ISO 2022, announced or not; the declared character
    set; UTF-8; Shift-JIS. Bytes that are Japanese in Shift-JIS are taken for that where
    nothing or a set is declared in which any bytes are a text (many devices do so).

    Parameters
    ----------
    raw : bytes
    encodings : tuple of str
        From :func:`encodings_of`.
    person : bool
        The element is a person's name, in which ``^`` and ``=`` are delimiters too.

    Returns
    -------
    str or None
        The text without padding, None if no way gives one without errors.
    """
    if raw.isascii() and b"\x1b" not in raw:
        return _clean(raw.decode("ascii"))
    if b"\x1b" in raw:
        return _escaped(raw, encodings, _PN_DELIMITERS if person else _DELIMITERS)
    first = encodings[0]
    text = _strict(raw, first) if first not in _ANY else None
    if text is None:
        text = _strict(raw, "utf-8")
    if text is None:
        text = _strict(raw, "cp932")
        if text is None or (first != "shift_jis" and not _JAPANESE.search(text)):
            text = _strict(raw, first) if first in _ANY else UNREADABLE
    return text


def _escaped(raw: bytes, encodings: tuple[str, ...], delimiters: set[int]) -> str | None:
    # What stands after an unknown escape sequence keeps it, and is found to be no text.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _clean(decode_bytes(raw, (*encodings, *_extensions()), delimiters))
        except (UnicodeError, LookupError):
            return UNREADABLE


def redecode(text: str, encodings: tuple[str, ...]) -> str | None:
    """Check a text that somebody else decoded; undo it where bytes were taken as Latin-1."""
    if text.isascii():
        return _clean(text)
    if encodings[0] in _ANY and (raw := _latin(text)) is not None:
        return decode(raw, encodings)
    return _clean(text)


@lru_cache(maxsize=1)
def _extensions() -> tuple[str, ...]:
    return tuple(convert_encodings(["ISO 2022 IR 6", *_EXTENSIONS]))[1:]


def _latin(text: str) -> bytes | None:
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        return None


def _strict(raw: bytes, encoding: str) -> str | None:
    try:
        return _clean(raw.decode(encoding))
    except (UnicodeError, LookupError):
        return UNREADABLE


def _clean(text: str) -> str | None:
    """Strip padding; None where control characters show that this was no text."""
    text = text.rstrip("\0 ").lstrip(" ") if "\n" not in text else text.rstrip("\0 ")
    return UNREADABLE if _CONTROL.search(text) else text
