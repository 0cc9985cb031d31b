"""Takes out of pixel data what is no pixel: comments in compressed images, bytes behind the last.

It is blanked where it stands, so that nothing moves and no table of offsets changes, or cut
off. Pixel data of which it cannot be said what is a pixel are a problem: the object is held.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from itertools import pairwise
from typing import TYPE_CHECKING

from pydicom import uid

from kakehashi.store.deidentify import streams
from kakehashi.store.deidentify.actions import tags_of

if TYPE_CHECKING:
    from kakehashi.store.deidentify.tree import Element, Node

PIXELS = tags_of("PixelData FloatPixelData DoubleFloatPixelData")
OFFSETS = tags_of("ExtendedOffsetTable ExtendedOffsetTableLengths")
_BITS = {tag: bits for name, bits in (("FloatPixelData", 32), ("DoubleFloatPixelData", 64))
         for tag in tags_of(name)}  # fmt: skip
(_PIXEL_DATA,) = tags_of("PixelData")
(_ROWS,) = tags_of("Rows")
(_COLUMNS,) = tags_of("Columns")
(_SAMPLES,) = tags_of("SamplesPerPixel")
(_ALLOCATED,) = tags_of("BitsAllocated")
(_FRAMES,) = tags_of("NumberOfFrames")

_JPEG = frozenset(
    {uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1}
)
_JPEG_LS = frozenset({uid.JPEGLSLossless, uid.JPEGLSNearLossless})
_JPEG_2000 = frozenset(
    {
        uid.JPEG2000Lossless,
        uid.JPEG2000,
        uid.JPEG2000MCLossless,
        uid.JPEG2000MC,
        uid.HTJ2KLossless,
        uid.HTJ2KLosslessRPCL,
        uid.HTJ2K,
    }
)
_ITEM = 0xFFFEE000


def only_pixels(element: Element, node: Node, syntax: str, *, little: bool) -> tuple[bytes, str]:
    """Return the value of pixel data with nothing but pixels in it.

    Parameters
    ----------
    element : Element
        Pixel data of the object itself, not of an item.
    node : Node
        The object.
    syntax : str
        Its transfer syntax.
    little : bool
        The byte order of its numbers.

    Returns
    -------
    value : bytes
    problem : str
        Why it cannot be said what is a pixel, empty if it can.
    """
    value = element.source.value
    if not isinstance(value, bytes):
        return b"", "pixel data are not bytes"
    rows, columns, samples, allocated = (
        _integer(node, tag, little=little) for tag in (_ROWS, _COLUMNS, _SAMPLES, _ALLOCATED)
    )
    if uid.UID(syntax).is_encapsulated:
        try:
            return _encapsulated(value, syntax, rows * columns), ""
        except streams.NotFollowed:
            return b"", "compressed pixel data that cannot be followed: text may be among them"
    frames = int(text) if (text := node.text(_FRAMES)).isdigit() else 1
    bits = _BITS.get(element.tag, allocated)
    size = (rows * columns * (samples or 1) * frames * bits + 7) // 8
    if not size:
        return b"", "the size of its pixel data is not said: text may be behind the last pixel"
    if len(value) < size:
        return b"", "pixel data are shorter than its size says: they may be no pixels"
    return (value[:size] + bytes(size % 2) if len(value) > size + size % 2 else value), ""


def fits_pixels(element: Element, node: Node) -> bool:
    """Say whether a table of offsets into pixel data is one."""
    pixels = node.elements.get(_PIXEL_DATA)
    value = element.source.value
    if pixels is None or not isinstance(value, bytes) or len(value) % 8:
        return False
    length = len(pixels.source.value or b"")
    return all(number <= length for (number,) in struct.iter_unpack("<Q", value))


def _integer(node: Node, tag: int, *, little: bool) -> int:
    element = node.elements.get(tag)
    value = element.source.value if element else None
    if isinstance(value, bytes):
        return int.from_bytes(value, "little" if little else "big") if len(value) == 2 else 0
    return value if isinstance(value, int) else 0


def _encapsulated(value: bytes, syntax: str, pixels: int) -> bytes:
    table, fragments = _items(value)
    data = b"".join(fragments)
    starts = [0]
    for fragment in fragments:
        starts.append(starts[-1] + len(fragment))
    clean = bytearray(data)
    at = 0
    while at < len(data):
        following = starts[bisect_left(starts, at + 1)]
        if syntax in _JPEG or syntax in _JPEG_LS:
            beside, end = streams.jpeg(data, at, ls=syntax in _JPEG_LS)
        elif syntax in _JPEG_2000:
            beside, end = streams.jpeg2000(data, at)
        elif syntax == uid.RLELossless and pixels:
            beside, end = streams.rle(data, at, following, pixels=pixels)
        else:
            raise streams.NotFollowed
        # An image begins with a fragment; one byte may fill the last one up.
        at = starts[bisect_left(starts, end)]
        if at - end > 1:
            beside.append((end, at))
        for first, last in beside:
            clean[first:last] = bytes(last - first)
    if clean == data and table is not None:
        return value
    out = [_item(table or b"")]
    out += [_item(bytes(clean[a:b])) for a, b in pairwise(starts)]
    return b"".join(out)


def _item(value: bytes) -> bytes:
    return struct.pack("<HHI", _ITEM >> 16, _ITEM & 0xFFFF, len(value)) + value


def _items(value: bytes) -> tuple[bytes | None, list[bytes]]:
    """Return the table of offsets, None if it is none, and the fragments."""
    items: list[bytes] = []
    places: list[int] = []
    at = 0
    while at + 8 <= len(value):
        group, element, length = struct.unpack_from("<HHI", value, at)
        if group << 16 | element != _ITEM or at + 8 + length > len(value):
            break
        places.append(at)
        items.append(value[at + 8 : at + 8 + length])
        at += 8 + length
    if not items or (at < len(value) and value[at:] != b"\xfe\xff\xdd\xe0\0\0\0\0"):
        raise streams.NotFollowed
    table = items[0]
    offsets = {place - len(table) - 8 for place in places[1:]}
    good = not len(table) % 4 and all(
        number in offsets for (number,) in struct.iter_unpack("<I", table)
    )
    return (table if good else None), items[1:]
