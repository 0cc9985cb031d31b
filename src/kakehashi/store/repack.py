"""The instances of a packed series, taken from its pack: to pack it anew with what came late.

A pack has all that packing reads: each file's header as received, with its SHA-256 and size, and
the stored values of each frame without loss. Only the compressed form of compressed pixel data
is gone, and nothing asks for it. So what is packed anew from a pack and further files is, byte for
byte, what packing all files at once gives.
"""

from __future__ import annotations

import io
import json
import threading
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pydicom

from kakehashi.errors import PackError, StoreError
from kakehashi.imaging.ozip import FileReader, Pack, open_pack
from kakehashi.store.dicom import Instance, frames_of, tolerant
from kakehashi.store.pack import arrange, attributes_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

_SLABS = 2
"""Rows of chunks that are kept decoded: frames are asked for in their order, by several threads."""


@dataclass(frozen=True, slots=True)
class PackedInstance(Instance):
    """An instance whose pixel data are in a pack.

    Attributes
    ----------
    path : Path
        Of the pack.
    voxels : Voxels
    """

    voxels: Voxels

    def stored(self, frame: int) -> NDArray[Any]:
        """Return the stored values of a frame, shape (rows, columns)."""
        return self.voxels.frame(self.sop, frame)

    def pixel_bytes(self) -> bytes:
        """Return the stored values of all frames: what the pixel data are without compression."""
        return b"".join(self.stored(frame).tobytes() for frame in range(frames_of(self.dataset)))


class Voxels:
    """The stored values of a pack, by instance and frame. May be used from several threads.

    Parameters
    ----------
    reader : FileReader
        On the pack.
    places : mapping
        Of (SOPInstanceUID, frame) to volume and slice.
    """

    def __init__(self, reader: FileReader, places: Mapping[tuple[str, int], tuple[int, int]]):
        self._reader, self._places = reader, places
        self._pack = open_pack(reader)
        self._lock = threading.Lock()
        self._slabs: OrderedDict[tuple[int, int], NDArray[Any]] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        # Who packs in another process opens the pack there.
        return type(self), (self._reader, self._places)

    def frame(self, sop: str, frame: int) -> NDArray[Any]:
        """Return a frame's stored values.

        Raises
        ------
        PackError
            The pack is damaged there.
        """
        volume, k = self._places[sop, frame]
        with self._lock:
            array = self._pack.volume(volume).array()
            depth = array.chunks[0]
            key = volume, k // depth
            if key not in self._slabs:
                if len(self._slabs) >= _SLABS:
                    self._slabs.popitem(last=False)
                start = key[1] * depth
                try:
                    self._slabs[key] = np.asarray(array[start : start + depth])
                except (ValueError, RuntimeError) as error:  # checksums and codecs
                    raise PackError(f"the pack in the store is damaged: {error}") from error
            self._slabs.move_to_end(key)
            slab: NDArray[Any] = self._slabs[key]
            found: NDArray[Any] = slab[k % depth]
            return found


@contextmanager
def packed_instances(path: Path) -> Iterator[list[PackedInstance]]:
    """Give the instances of a packed series, for as long as the context lasts.

    Parameters
    ----------
    path : Path
        The pack. It may be replaced meanwhile.

    Raises
    ------
    PackError
        The series would be divided in another way today than it was in the pack.
    StoreError
        The file is not a pack, or damaged.
    """
    with FileReader(path) as reader:
        pack = open_pack(reader)
        with tolerant():
            bare = [_bare(path, entry, header) for entry, header in pack.original_headers()]
            voxels = Voxels(reader, _places(pack, bare))
        yield [
            PackedInstance(**{one.name: getattr(i, one.name) for one in fields(i)}, voxels=voxels)
            for i in bare
        ]


def _bare(path: Path, entry: dict[str, Any], header: bytes) -> Instance:
    try:
        return Instance(
            path=path,
            sha256=str(entry["sha256"]),
            size=int(entry["size"]),
            dataset=pydicom.dcmread(io.BytesIO(header)),
            header=header,
            cut_at=int(entry["at"]),
            cut_element=bytes.fromhex(entry["element"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"the pack's DICOM headers are broken: {error}") from error


def _places(pack: Pack, bare: list[Instance]) -> dict[tuple[str, int], tuple[int, int]]:
    """Find each frame's place, the way in which it was found when the pack was made."""
    series = arrange(bare)
    found = json.loads(json.dumps(attributes_of(series)))["kakehashi"]
    # Only if all that is said of volumes, grids and instances is the same, frames are too.
    if found != pack.meta:
        raise PackError("the series would not be divided as it is in its pack; add all of it anew")
    return {
        (series.instances[plane.instance].sop, plane.frame): (number, k)
        for number, volume in enumerate(series.volumes)
        for k, plane in enumerate(volume.planes)
    }
