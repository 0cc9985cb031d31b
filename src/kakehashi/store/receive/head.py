"""What an object says that it is, read from the first bytes of its data set.

Every object passes here on its way in, so only what lies before the series' UID is walked
through, and nothing is converted.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from kakehashi.errors import StoreError

IMPLICIT = "1.2.840.10008.1.2"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"

_SOP_CLASS, _SOP, _STUDY, _SERIES = 0x00080016, 0x00080018, 0x0020000D, 0x0020000E
_WANTED = frozenset({_SOP_CLASS, _SOP, _STUDY, _SERIES})
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_DEEPEST = 32
_LONG_FORM = frozenset(
    {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
)
_SHORT_FORM = frozenset((b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US").split())


class ShortError(StoreError):
    """The bytes end before the series' UID."""


class HeadError(StoreError):
    """The bytes are no data set; the message is the reason that is kept."""


@dataclass(frozen=True, slots=True)
class Head:
    """UIDs of a data set as they stand there, without padding; empty if missing."""

    sop_class: str = ""
    sop: str = ""
    study: str = ""
    series: str = ""


def inflate(data: bytes, limit: int) -> bytes:
    """Return the beginning of a deflated data set.

    Parameters
    ----------
    data : bytes
        The beginning of what was received.
    limit : int
        Bytes to give at most: a few received ones may stand for very many.

    Raises
    ------
    HeadError
        They are not deflated.
    """
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, limit)
    except zlib.error as error:
        raise HeadError(f"the data set is not deflated, as its syntax says ({error})") from None


def read_head(data: bytes, syntax: str) -> Head:
    """Walk through a data set up to the series' UID.

    Parameters
    ----------
    data : bytes
        The beginning of the data set; inflated, where the syntax is the deflated one.
    syntax : str
        Transfer syntax.

    Returns
    -------
    Head

    Raises
    ------
    ShortError
        The bytes end before the place of the series' UID.
    HeadError
        They are no data set of that syntax.
    """
    walk = _Walk(data, explicit=syntax != IMPLICIT, big=syntax == BIG_ENDIAN)
    found: dict[int, str] = {}
    position = 0
    while True:
        tag, value, length = walk.element(position)
        if tag > _SERIES:
            break
        if length == _UNDEFINED:
            position = walk.after_undefined(position, value, 0)
            continue
        position = value + length
        if tag in _WANTED:
            raw = walk.data[value:position]
            if len(raw) < length:
                raise ShortError("a UID is cut")
            found[tag] = raw.rstrip(b"\0 ").decode("ascii", "replace")
        if tag == _SERIES:
            break
    return Head(*(found.get(tag, "") for tag in (_SOP_CLASS, _SOP, _STUDY, _SERIES)))


class _Walk:
    """Steps over the elements of a data set.

    Parameters
    ----------
    data : bytes
    explicit : bool
        Whether value representations stand there.
    big : bool
        Whether numbers are big endian.
    """

    def __init__(self, data: bytes, *, explicit: bool, big: bool) -> None:
        order = ">" if big else "<"
        self.data = data
        self._explicit = explicit
        self._short = struct.Struct(order + "HH2sH").unpack_from
        self._long = struct.Struct(order + "I").unpack_from
        self._implicit = struct.Struct(order + "HHI").unpack_from

    def element(self, position: int) -> tuple[int, int, int]:
        """Return tag, offset of the value and its length at an offset."""
        try:
            if not self._explicit:
                group, element, length = self._implicit(self.data, position)
                return group << 16 | element, position + 8, length
            group, element, vr, length = self._short(self.data, position)
            tag = group << 16 | element
            if vr in _SHORT_FORM:
                return tag, position + 8, length
            if vr in _LONG_FORM:
                return tag, position + 12, self._long(self.data, position + 8)[0]
            if group == _ITEM >> 16:
                return tag, position + 8, self._long(self.data, position + 4)[0]
        except struct.error:
            raise ShortError("an element is cut") from None
        raise HeadError(f"the data set cannot be read: no value representation at byte {position}")

    def after_undefined(self, position: int, value: int, depth: int) -> int:
        """Return the offset behind an element of undefined length, given its own and its value's.

        What it holds is a sequence; in one of unknown representation no representations stand
        (PS3.5, section 6.2.2).
        """
        if self._explicit and self.data[position + 4 : position + 6] == b"UN":
            return _Walk(self.data, explicit=False, big=False)._after_sequence(value, depth)
        return self._after_sequence(value, depth)

    def _after_sequence(self, position: int, depth: int) -> int:
        while True:
            tag, position, length = self.element(position)
            if tag == _SEQUENCE_END:
                return position
            if tag != _ITEM:
                raise HeadError(f"the data set cannot be read: no item at byte {position}")
            position = (
                self._after_item(position, depth + 1) if length == _UNDEFINED else position + length
            )

    def _after_item(self, position: int, depth: int) -> int:
        if depth > _DEEPEST:
            raise HeadError(f"the data set cannot be read: more than {_DEEPEST} levels deep")
        while True:
            tag, value, length = self.element(position)
            if tag == _ITEM_END:
                return value
            position = (
                self.after_undefined(position, value, depth)
                if length == _UNDEFINED
                else value + length
            )
