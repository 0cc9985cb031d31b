"""A small picture of a series: its middle slice, as grey values in a PNG."""

from __future__ import annotations

import hashlib
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

from kakehashi.errors import RefusedError, StoreError
from kakehashi.imaging.ozip import LEVELS, FileReader, Pack, open_pack
from kakehashi.store.layout import blocks_path

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from kakehashi.store.catalogue import Series

SMALLEST, LARGEST = 16, 512
"""Pixels of a picture's longer side."""

_SOFT_TISSUE = (40.0, 400.0)
# Centre and width, HU, in the order in which they are looked for in the body part's name.
_WINDOWS = (
    (("SPINE", "BONE", "SKULL", "EXTREMITY", "KNEE", "ANKLE", "SHOULDER", "HIP"), (400.0, 1800.0)),
    (("HEAD", "BRAIN"), (40.0, 80.0)),
    (("CHEST", "LUNG", "THORAX"), (-600.0, 1500.0)),
)


def thumbnail(path: Path, row: Series, size: int) -> bytes:
    """Return a picture of a packed series.

    Parameters
    ----------
    path : Path
        The pack.
    row : Series
        What the pack has to be. Its body part chooses the window of a CT.
    size : int
        Pixels of the longer side; the shorter one follows from the size of a pixel in mm.

    Returns
    -------
    bytes
        A PNG, 8 bits grey: the middle slice of the pack, first row at the top.

    Raises
    ------
    RefusedError
        Another pack lies there than the row says, as its row comes after it; the code is
        ``packing``.
    StoreError
        The pack is missing or damaged.
    """
    with FileReader(path) as reader:
        _expect(row, path, reader)
        pack = open_pack(reader)
        level = _level(pack, size)
        image = pack.slice(pack.array(level).shape[0] // 2, level)
    _, step_y, step_x = pack.spacing_mm
    height, width = image.shape[0] * step_y, image.shape[1] * step_x
    scale = size / max(height, width)
    shape = max(1, round(height * scale)), max(1, round(width * scale))
    low, high = window(pack.modality, row.body_part, image)
    grey = np.clip((_resampled(image, shape) - low) / (high - low), 0, 1)
    if pack.modality == "PT":
        grey = 1 - grey  # uptake is read dark on white
    return png(np.rint(grey * 255).astype(np.uint8))


def window(modality: str, body_part: str | None, image: NDArray[np.float32]) -> tuple[float, float]:
    """Return the values that are shown black and white.

    Parameters
    ----------
    modality : str
    body_part : str or None
    image : ndarray of float32, shape (rows, columns)
        HU for a CT; for others the 1st and 99th percentile of it count.
    """
    if modality != "CT":
        low, high = (float(value) for value in np.percentile(image, (1, 99)))
        return low, max(high, low + 1e-6 * max(1.0, abs(low)))
    name = (body_part or "").upper()
    centre, width = next(
        (values for words, values in _WINDOWS if any(word in name for word in words)),
        _SOFT_TISSUE,
    )
    return centre - width / 2, centre + width / 2


def png(grey: NDArray[np.uint8]) -> bytes:
    """Return an image as PNG (ISO/IEC 15948), 8 bits grey, without filters.

    Parameters
    ----------
    grey : ndarray of uint8, shape (rows, columns)
    """
    rows, columns = grey.shape
    lines = np.zeros((rows, columns + 1), np.uint8)  # each line begins with its filter, 0
    lines[:, 1:] = grey
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(kind, data)
        for kind, data in (
            (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0)),
            (b"IDAT", zlib.compress(lines.tobytes(), 6)),
            (b"IEND", b""),
        )
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _expect(row: Series, path: Path, opened: FileReader) -> None:
    """Refuse a pack that is not the one of its row, once it is open.

    A pack comes into place after its hashes: with those of the row, what was opened before is it.
    """
    hashes = blocks_path(path)
    try:
        found = hashlib.sha256(hashes.read_bytes()).hexdigest()
    except OSError as error:
        raise StoreError(f"{hashes}: cannot be read ({error.strerror})") from error
    if opened.size != row.size or found != row.blocks:
        raise RefusedError("packing", "the series is being packed anew; ask again in a moment")


def _level(pack: Pack, size: int) -> int:
    """Return the smallest level that has as many pixels as the picture, else the full one."""
    for level in range(LEVELS - 1, 0, -1):
        if max(pack.array(level).shape[1:]) >= size:
            return level
    return 0


def _resampled(image: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float64]:
    """Return an image of another shape, linear between the centres of pixels."""
    out = image.astype(np.float64)
    for axis, count in enumerate(shape):
        there = out.shape[axis]
        at = np.clip((np.arange(count) + 0.5) * there / count - 0.5, 0, there - 1)
        first = np.floor(at).astype(np.intp)
        share = np.expand_dims(at - first, 1 - axis)
        low = np.take(out, first, axis)
        high = np.take(out, np.minimum(first + 1, there - 1), axis)
        out = low * (1 - share) + high * share
    return out
