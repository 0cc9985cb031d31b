"""Decode the pixel data of received DICOM files, and refuse what would lose some of them."""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pydicom
from pydicom import uid
from pydicom.pixels.utils import pixel_array

from kakehashi.errors import PackError
from kakehashi.store.dicom import frames_of, positive

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kakehashi.store.dicom import Instance, Plane


@dataclass(frozen=True, slots=True)
class PixelFormat:
    """What must be equal in all frames of a volume."""

    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    signed: bool

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored values."""
        return np.dtype(f"{'i' if self.signed else 'u'}{self.bits_allocated // 8}")


def pixel_format_of(dataset: pydicom.Dataset) -> PixelFormat:
    """Return the shape and type of an instance's frames."""
    return PixelFormat(
        rows=positive(dataset, "Rows"),
        columns=positive(dataset, "Columns"),
        bits_allocated=positive(dataset, "BitsAllocated"),
        bits_stored=positive(dataset, "BitsStored"),
        signed=dataset.get("PixelRepresentation", 0) == 1,
    )


class Frames:
    """Decoded frames of instances. May be used from several threads, within :func:`tolerant`."""

    def __init__(self, instances: Sequence[Instance]) -> None:
        self._instances = instances
        self._multiframe = threading.Lock()
        self._loaded: tuple[int, pydicom.Dataset] | None = None

    def decode(self, plane: Plane, expected: PixelFormat) -> NDArray[Any]:
        """Return the stored values of a plane, shape (rows, columns).

        Raises
        ------
        PackError
            The pixel data cannot be decoded, or hold data in bits that are not theirs.
        """
        instance = self._instances[plane.instance]
        if (known := instance.stored(plane.frame)) is not None:
            if (known.shape, known.dtype) != ((expected.rows, expected.columns), expected.dtype):
                raise PackError(f"the pack in the store holds other frames than {instance.sop} has")
            return known
        if frames_of(instance.dataset) == 1:
            return _decode(pydicom.dcmread(io.BytesIO(instance.raw())), plane, expected)
        # It may be large: it is read once, and decoded by one at a time.
        with self._multiframe:
            if self._loaded is None or self._loaded[0] != plane.instance:
                self._loaded = plane.instance, pydicom.dcmread(io.BytesIO(instance.raw()))
            return _decode(self._loaded[1], plane, expected)


def _decode(dataset: pydicom.Dataset, plane: Plane, expected: PixelFormat) -> NDArray[Any]:
    padded = expected.bits_stored < expected.bits_allocated
    # JPEG streams carry the stored bits only; elsewhere the other bits may hold data.
    compare = padded and not _is_jpeg(dataset)
    try:
        array = pixel_array(dataset, raw=True, index=plane.frame)
        whole = (
            pixel_array(dataset, raw=True, index=plane.frame, correct_unused_bits=False)
            if compare
            else array
        )
    except Exception as error:  # decoders of several packages, each with own exceptions
        syntax = dataset.file_meta.TransferSyntaxUID.name
        raise PackError(f"pixel data cannot be decoded ({syntax}): {error}") from error
    if array.shape != (expected.rows, expected.columns):
        raise PackError(
            f"a frame of {array.shape} came out of the pixel data, "
            f"{(expected.rows, expected.columns)} is announced"
        )
    if not np.array_equal(array, whole):
        raise PackError(
            f"bits above the {expected.bits_stored} stored ones hold data (an overlay?); "
            "packing would lose them"
        )
    if not np.can_cast(array.dtype, expected.dtype, casting="equiv"):
        raise PackError(f"pixel data decode to {array.dtype}, {expected.dtype} is announced")
    return array


def _is_jpeg(dataset: pydicom.Dataset) -> bool:
    syntax = dataset.file_meta.TransferSyntaxUID
    return bool(syntax.is_encapsulated) and syntax != uid.RLELossless
