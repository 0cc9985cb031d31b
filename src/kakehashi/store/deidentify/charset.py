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
_ANY_JAPANESE = re.compile(r"[\u3041-\u30ff\u4e00-\u9fff\uff66-\uff9f々]")
_JAPANESE = re.compile(_ANY_JAPANESE.pattern + "{2}")
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
_LATIN = frozenset({"latin_1", "iso8859_1"})
_ANY = _LATIN | {"iso8859", "shift_jis"}


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


def readings(raw: bytes, encodings: tuple[str, ...], *, person: bool = False) -> list[str]:
    """Decode the value of a text element in every way that gives a text, the likeliest first.

    In turn: ASCII; escape sequences of ISO 2022, announced or not; the declared character
    set; UTF-8; Shift-JIS and EUC-JP. Bytes that are Japanese in these are taken for that where
    nothing or a set is declared in which any bytes are a text (many devices do so). They may
    be Japanese in both: half-width kana in one, kanji in the other. What is not declared and
    none of these is no text.

    Parameters
    ----------
    raw : bytes
    encodings : tuple of str
        From :func:`encodings_of`.
    person : bool
        The element is a person's name, in which ``^`` and ``=`` are delimiters too.

    Returns
    -------
    list of str
        Without padding; empty if no way gives a text without errors.
    """
    first = encodings[0]
    if raw.isascii() and b"\x1b" not in raw:
        found = [_clean(raw.decode("ascii"))]
    elif b"\x1b" in raw:
        found = [_escaped(raw, encodings, _PN_DELIMITERS if person else _DELIMITERS)]
    else:
        found = [_certain(raw, first)]
        if found[0] is None:
            found = [*_guesses(raw), _strict(raw, "utf-8")]
        if not any(found) and first in _LATIN:
            found = [_strict(raw, first)]
    return list(dict.fromkeys(text for text in found if text is not None))


def is_guess(raw: bytes, encodings: tuple[str, ...]) -> bool:
    """Say whether the :func:`readings` of bytes are only what they may be.

    So are Shift-JIS and EUC-JP that nobody declared: Korean or Chinese can look like them.
    """
    return (
        not raw.isascii()
        and b"\x1b" not in raw
        and _certain(raw, encodings[0]) is None
        and bool(_guesses(raw))
    )


def decode(raw: bytes, encodings: tuple[str, ...], *, person: bool = False) -> str | None:
    """Return the likeliest of the :func:`readings`, None if there is none."""
    return next(iter(readings(raw, encodings, person=person)), UNREADABLE)


def _certain(raw: bytes, first: str) -> str | None:
    """Read by the declared character set if that proves itself, or by UTF-8, which does."""
    if first == "shift_jis":
        return _strict(raw, "cp932")
    text = _strict(raw, first) if first not in _ANY else None
    if text is None and (text := _strict(raw, "utf-8")) and not _JAPANESE.search(text):
        # Two half-width kana of Shift-JIS can look like an accented letter of UTF-8.
        return None
    return text


def _guesses(raw: bytes) -> list[str]:
    shift, unix = _strict(raw, "cp932"), _strict(raw, "euc_jp")
    # In Shift-JIS an accented letter and a plain one look like a kanji: one proves nothing.
    found = [shift] if shift and _JAPANESE.search(shift) else []
    return [*found, unix] if unix and _ANY_JAPANESE.search(unix) else found


def _escaped(raw: bytes, encodings: tuple[str, ...], delimiters: set[int]) -> str | None:
    # What stands after an unknown escape sequence keeps it, and is found to be no text.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _clean(decode_bytes(raw, (*encodings, *_extensions()), delimiters))
        except (UnicodeError, LookupError):
            return UNREADABLE


def undone(text: str, encodings: tuple[str, ...]) -> bytes | None:
    """Return the bytes that were taken as Latin-1 for want of another set, None if none were."""
    if text.isascii() or encodings[0] not in _ANY:
        return None
    return _latin(text)


def redecode(text: str, encodings: tuple[str, ...]) -> list[str]:
    """Check a text that somebody else decoded; undo it where bytes were taken as Latin-1."""
    if (raw := undone(text, encodings)) is not None:
        return readings(raw, encodings)
    clean = _clean(text)
    return [] if clean is None else [clean]


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
