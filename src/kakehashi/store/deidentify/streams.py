"""Where in compressed images there is something beside the image.

A walk goes through one image of a stream and returns the ranges of bytes that no decoder needs,
and where the image ends. It stops with :class:`NotFollowed` where it does not understand what
it sees: what is behind could be anything.
"""

from __future__ import annotations

import re
import struct

Ranges = list[tuple[int, int]]

# ITU-T T.81 and T.87: markers without a length, with one, and those that hold no image.
_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_ALONE = frozenset((0x01, *range(0xD0, 0xD8)))
_SEGMENTS = frozenset((*range(0xC0, 0xD0), *range(0xDA, 0xE0), 0xF7, 0xF8))
_BESIDE = frozenset((*range(0xE0, 0xF0), 0xFE))  # applications, comment
# In the data of a scan a marker cannot be mistaken: such bytes are stuffed.
_AFTER_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_AFTER_LS_SCAN = re.compile(rb"\xff[\x80-\xcf\xd8-\xfe]")

# ITU-T T.800, T.801 and T.814.
_SOC, _SOT, _SOD, _EOC, _COM = 0x4F, 0x90, 0x93, 0xD9, 0x64
_J2K_SEGMENTS = frozenset((*range(0x50, 0x64), *range(0x72, 0x80)))
_CODESTREAM_END = re.compile(rb"\xff\xd9")


class NotFollowed(Exception):  # noqa: N818 - the end of a walk; the caller says what it means
    """A stream is damaged, cut off, or of a kind that is not known here."""


def jpeg(data: bytes, at: int, *, ls: bool) -> tuple[Ranges, int]:
    """Walk through a JPEG image, or one of JPEG-LS, that begins at an offset."""
    beside: Ranges = []
    if data[at : at + 2] != bytes((0xFF, _START)):
        raise NotFollowed
    at += 2
    while True:
        while data[at : at + 2] == b"\xff\xff":
            at += 1
        marker = _marker(data, at)
        at += 2
        if marker == _END:
            return beside, at
        if marker in _ALONE:
            continue
        end = _segment(data, at)
        if marker in _BESIDE:
            beside.append((at + 2, end))
        elif marker not in _SEGMENTS:
            raise NotFollowed
        at = end
        if marker == _SCAN:
            found = (_AFTER_LS_SCAN if ls else _AFTER_SCAN).search(data, at)
            if not found:
                raise NotFollowed
            at = found.start()


def jpeg2000(data: bytes, at: int) -> tuple[Ranges, int]:
    """Walk through a codestream of JPEG 2000 or HTJ2K; in boxes of a file it is not followed."""
    beside: Ranges = []
    if _marker(data, at) != _SOC:
        raise NotFollowed
    at += 2
    part: int | None = None
    while (marker := _marker(data, at)) != _EOC:
        if marker == _SOD:
            if part is None:
                raise NotFollowed
            at = part
            part = None
            continue
        end = _segment(data, at + 2)
        if marker == _COM:
            beside.append((at + 4, end))
        elif marker == _SOT:
            part = _tile_part(data, at)
        elif marker not in _J2K_SEGMENTS:
            raise NotFollowed
        at = end
    return beside, at + 2


def _tile_part(data: bytes, at: int) -> int:
    """Return where a tile part ends; the last one may leave that to the end of the stream."""
    (length,) = struct.unpack_from(">I", data, at + 6)
    if length:
        if length < 14 or at + length + 2 > len(data):
            raise NotFollowed
        return at + int(length)
    found = _CODESTREAM_END.search(data, at)
    if not found:
        raise NotFollowed
    return found.start()


def rle(data: bytes, at: int, end: int, *, pixels: int) -> tuple[Ranges, int]:
    """Walk through a frame of RLE Lossless (PS3.5 annex G), of so many pixels."""
    if end - at < 64:
        raise NotFollowed
    count, *offsets = struct.unpack_from("<16I", data, at)
    starts = [at + offset for offset in offsets[:count]]
    if not 1 <= count <= 15 or starts[0] != at + 64 or starts != sorted(set(starts)):
        raise NotFollowed
    beside: Ranges = [(at + 4 + 4 * count, at + 64)]
    last = at
    for start, limit in zip(starts, [*starts[1:], end], strict=True):
        last = _runs(data, start, limit, pixels)
        if limit != end:
            beside.append((last, limit))
    return beside, last


def _runs(data: bytes, at: int, limit: int, pixels: int) -> int:
    """Return where the runs end that make up so many bytes."""
    made = 0
    while made < pixels:
        if at >= limit:
            raise NotFollowed
        head = data[at]
        if head < 128:
            at, made = at + head + 2, made + head + 1
        else:
            at, made = (at + 2, made + 257 - head) if head > 128 else (at + 1, made)
    if at > limit:
        raise NotFollowed
    return at


def _marker(data: bytes, at: int) -> int:
    if at + 2 > len(data) or data[at] != 0xFF:
        raise NotFollowed
    return data[at + 1]


def _segment(data: bytes, at: int) -> int:
    """Return where a segment ends whose length is at an offset."""
    if at + 2 > len(data):
        raise NotFollowed
    (length,) = struct.unpack_from(">H", data, at)
    if length < 2 or at + length > len(data):
        raise NotFollowed
    return at + int(length)
