"""Read a packed series (``.ozx``) over anything that reads bytes at an offset.

The zip's central directory is read once, when the pack is opened; after that each access
is one read of the bytes asked for. zarr's own zip store reads through a stored member to
seek in it, which costs a whole shard for one slice.

Array indices are (slice k, row j, column i). ``affine_lps`` takes (i, j, k, 1) to DICOM
patient coordinates (LPS: x to the left, y to the back, z to the head) in mm.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import struct
import threading
import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import numcodecs  # type: ignore[import-untyped] # has no type information
import numpy as np
import zarr
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from kakehashi.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator
    from pathlib import Path

    import pydicom
    from numpy.typing import DTypeLike, NDArray

_Item = TypeVar("_Item")

PACK_VERSION = 1
VOLUMES_VERSION = 2
"""Format of a pack with several volumes; one with a single volume is of `PACK_VERSION`."""
LEVELS = 3
HEADERS_MEMBER = "dicom/headers.json.zst"
PREAMBLE_MEMBER = "dicom/preamble"

_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
_LOCAL_MAGIC = b"PK\x03\x04"
# The largest zip comment is 64 KiB; with the end records and a directory of some hundred
# members this nearly always holds all that is read on opening. It begins at a block of the
# link, so that no more blocks are fetched than needed.
_TAIL_LEAST = 80 * 1024
_BLOCK = 131072


def volume_path(index: int) -> str:
    """Return the folder of a volume in a pack, with a slash at its end; the first's is the root."""
    return f"volumes/{index}/" if index else ""


class ByteReader(Protocol):
    """Random access to the bytes of one file. Must be safe to call from several threads."""

    @property
    def size(self) -> int:
        """Number of bytes of the file."""

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`."""


class FileReader:
    """A :class:`ByteReader` on a local file.

    Parameters
    ----------
    path : Path
        The file. It stays open until :meth:`close`.

    Raises
    ------
    StoreError
        The file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise StoreError(f"{path}: cannot be opened ({error.strerror})") from error
        self._size = os.fstat(self._file.fileno()).st_size

    @property
    def size(self) -> int:
        """Number of bytes of the file."""
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, fewer only at the end of the file."""
        return os.pread(self._file.fileno(), length, offset)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        # Workers of a torch loader get the pack by pickle and open the file again.
        return type(self), (self.path,)


class _Window(io.RawIOBase):
    """The reader as a seekable file for :mod:`zipfile`, with the tail read once."""

    def __init__(self, reader: ByteReader, most: int | None) -> None:
        self._reader = reader
        self._most = most
        self._position = 0
        self._tail_start = max(0, reader.size - _TAIL_LEAST) // _BLOCK * _BLOCK
        self._tail = _read_exactly(reader, self._tail_start, reader.size - self._tail_start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._reader.size}
        self._position = base[whence] + offset
        if self._position < 0:
            raise OSError("seek before the start of the file")
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._reader.size - self._position)
        size = left if size < 0 else min(size, left)
        if self._most is not None and size > self._most:
            raise StoreError(f"a directory of {size} bytes is larger than it should be")
        start = self._position - self._tail_start
        if start >= 0:
            data = self._tail[start : start + size]
        else:
            data = _read_exactly(self._reader, self._position, size)
        self._position += len(data)
        return data


def _read_exactly(reader: ByteReader, offset: int, length: int) -> bytes:
    data = reader.read(offset, length)
    if len(data) != length:
        raise StoreError(
            f"short read: {len(data)} bytes came where {length} were asked for at offset "
            f"{offset}; the file is cut or the link broke"
        )
    return data


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    header_offset: int
    size: int
    crc32: int


class ZipStore(Store):
    """A read-only zarr store on a zip file whose members are stored uncompressed.

    Parameters
    ----------
    reader : ByteReader
        Where the bytes come from.
    most : int, optional
        Bytes of a directory that is read; by default of any.

    Raises
    ------
    StoreError
        The file is not a zip, its directory is too large, or a member is compressed, encrypted or
        there twice.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, reader: ByteReader, *, most: int | None = None) -> None:
        super().__init__(read_only=True)
        self._reader = reader
        self._members, self.comment = _directory(reader, most)
        self._starts: dict[str, int] = {}
        self._is_open = True

    def __getstate__(self) -> dict[str, object]:
        return {"reader": self._reader}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ZipStore.__init__(self, state["reader"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ZipStore) and self._reader is other._reader

    __hash__ = None  # type: ignore[assignment] # as zarr's own stores: equal by content

    def __repr__(self) -> str:
        return f"ZipStore({len(self._members)} members, {self._reader.size} bytes)"

    def names(self) -> Iterator[str]:
        """Yield the members' names in the order of the directory."""
        yield from self._members

    def size_of(self, name: str) -> int | None:
        """Return a member's bytes, None if there is none of that name."""
        member = self._members.get(name)
        return None if member is None else member.size

    def member(self, name: str) -> bytes:
        """Return a whole member, checked against the zip's CRC-32.

        Raises
        ------
        StoreError
            There is no such member, or its bytes are damaged.
        """
        data = self._read(name, None)
        if data is None:
            raise StoreError(f"the pack has no member {name!r}; it is incomplete or not a pack")
        if zlib.crc32(data) != self._members[name].crc32:
            raise StoreError(f"member {name!r} is damaged: its CRC-32 differs; restore the pack")
        return data

    def _start(self, member: _Member) -> int:
        # The local header may have other extra fields than the directory says, so that
        # only it knows where the data begin. Reading it twice in a race does no harm.
        start = self._starts.get(member.name)
        if start is None:
            raw = _read_exactly(self._reader, member.header_offset, _LOCAL_HEADER.size)
            fields = _LOCAL_HEADER.unpack(raw)
            if fields[0] != _LOCAL_MAGIC:
                raise StoreError(f"member {member.name!r} has no local header where it should be")
            start = member.header_offset + _LOCAL_HEADER.size + fields[9] + fields[10]
            if start + member.size > self._reader.size:
                raise StoreError(f"member {member.name!r} ends beyond the end of the file")
            self._starts[member.name] = start
        return start

    def _read(self, key: str, byte_range: ByteRequest | None) -> bytes | None:
        member = self._members.get(key)
        if member is None:
            return None
        first, last = 0, member.size
        match byte_range:
            case None:
                pass
            case RangeByteRequest(start=start, end=end):
                first, last = start, end
            case OffsetByteRequest(offset=offset):
                first = offset
            case SuffixByteRequest(suffix=suffix):
                first = max(0, member.size - suffix)
        if not 0 <= first <= last <= member.size:
            raise StoreError(
                f"bytes {first} to {last} asked for of member {key!r}, which has {member.size}"
            )
        return _read_exactly(self._reader, self._start(member) + first, last - first)

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """Return a member or a part of it, None if there is none of that name."""
        if key not in self._members:
            return None
        data = await asyncio.to_thread(self._read, key, byte_range)
        if data is None:
            return None
        return (prototype or default_buffer_prototype()).buffer.from_bytes(data)

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        """Return several parts, read at the same time."""
        return list(
            await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges))
        )

    async def exists(self, key: str) -> bool:
        """Say whether there is a member of that name."""
        return key in self._members

    async def set(self, key: str, value: Buffer) -> None:  # noqa: ARG002 - the interface's name
        """Refuse: a pack is never changed."""
        raise StoreError(f"a pack is read-only; {key!r} cannot be written")

    async def delete(self, key: str) -> None:
        """Refuse: a pack is never changed."""
        raise StoreError(f"a pack is read-only; {key!r} cannot be deleted")

    async def list(self) -> AsyncIterator[str]:
        """Yield all names."""
        for name in self._members:
            yield name

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names that begin with `prefix`."""
        for name in self._members:
            if name.startswith(prefix):
                yield name

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield what lies directly under `prefix`."""
        base = prefix.rstrip("/") + "/" if prefix else ""
        heads = (n[len(base) :].split("/")[0] for n in self._members if n.startswith(base))
        for name in dict.fromkeys(heads):
            yield name


def _directory(reader: ByteReader, most: int | None) -> tuple[dict[str, _Member], bytes]:
    try:
        with zipfile.ZipFile(_Window(reader, most)) as archive:
            infos, comment = archive.infolist(), archive.comment
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise StoreError(f"not a readable zip file: {error}") from error
    members: dict[str, _Member] = {}
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise StoreError(f"member {info.filename!r} is compressed; a pack stores its members")
        if info.flag_bits & 0x1:
            raise StoreError(f"member {info.filename!r} is encrypted; a pack is not")
        if info.filename in members:
            raise StoreError(f"member {info.filename!r} is there twice; which one holds is unclear")
        members[info.filename] = _Member(
            info.filename, info.header_offset, info.file_size, info.CRC
        )
    return members, comment


@dataclass(frozen=True, slots=True)
class Rescale:
    """Stored values to real ones: ``value = stored * slope + intercept``.

    Attributes
    ----------
    slope, intercept : ndarray of float64
        Shape (1,) if all slices share them, else (slices,).
    unit : str
        E.g. ``HU``, ``BQML``, ``GML``; empty if the images do not say.
    """

    slope: NDArray[np.float64]
    intercept: NDArray[np.float64]
    unit: str

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> Rescale:
        """Read the form of ``kakehashi.rescale`` in a pack's attributes."""
        values = meta.get("per_slice", meta)
        return cls(
            slope=np.atleast_1d(np.asarray(values["slope"], dtype=np.float64)),
            intercept=np.atleast_1d(np.asarray(values["intercept"], dtype=np.float64)),
            unit=str(meta["unit"]),
        )

    def to_meta(self) -> dict[str, Any]:
        """Return the form that :meth:`from_meta` reads."""
        if self.slope.size == 1:
            return {
                "slope": float(self.slope[0]),
                "intercept": float(self.intercept[0]),
                "unit": self.unit,
            }
        return {
            "per_slice": {"slope": self.slope.tolist(), "intercept": self.intercept.tolist()},
            "unit": self.unit,
        }

    def of_slice(self, k: int) -> tuple[float, float]:
        """Return slope and intercept of slice `k` of level 0."""
        index = 0 if self.slope.size == 1 else k
        return float(self.slope[index]), float(self.intercept[index])


class Pack:
    """One packed series, opened for reading.

    Pixels and geometry are those of its first volume; :meth:`volume` gives each of them.

    Attributes
    ----------
    meta : dict
        The attributes under ``kakehashi``, as docs/architecture.md defines them.
    affine_lps : ndarray of float64, shape (4, 4)
        (i, j, k, 1) to mm in LPS; exact also for a tilted gantry (then it is sheared).
    spacing_mm : tuple of float
        Lengths of one step in (z, y, x) = (slice, row, column), in mm.
    rescale : Rescale
    """

    def __init__(self, store: ZipStore, meta: dict[str, Any] | None = None, path: str = "") -> None:
        self._store = store
        self._path = path
        self._whole = meta is None
        self._lock = threading.Lock()
        try:
            if meta is None:
                meta = json.loads(store.member("zarr.json"))["attributes"]["kakehashi"]
            self.meta: dict[str, Any] = meta
            version = self.meta["pack"]
            if version in (PACK_VERSION, VOLUMES_VERSION):
                self.affine_lps = np.asarray(self.meta["affine_lps"], dtype=np.float64)
                self.affine_lps.reshape(4, 4)
                z, y, x = self.meta["spacing_mm"]
                self.rescale = Rescale.from_meta(self.meta["rescale"])
                self._grids = _grids_of(self.meta)
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"not a packed series: its description is broken ({error})") from error
        if version not in (PACK_VERSION, VOLUMES_VERSION):
            raise StoreError(
                f"the pack has format version {version!r}, this software reads {PACK_VERSION} and "
                f"{VOLUMES_VERSION}; use the software version that the store runs"
            )
        self.affine_lps.flags.writeable = False
        self.spacing_mm = (float(z), float(y), float(x))
        self._levels: dict[int, zarr.Array[Any]] = {}

    @property
    def volumes(self) -> int:
        """Number of volumes, at least 1."""
        return len(self._grids) or 1

    def volume(self, index: int) -> Pack:
        """Return one volume by itself.

        Parameters
        ----------
        index : int
            From 0; volumes are ordered by what tells them apart.

        Returns
        -------
        Pack
            Its ``instances`` and headers are those of this volume alone.

        Raises
        ------
        StoreError
            There is no such volume, or its description is broken.
        """
        if not 0 <= index < self.volumes:
            raise StoreError(f"volume {index} asked for; the pack has {self.volumes}")
        if not self._grids:
            return self
        own = ("affine_lps", "spacing_mm", "rescale", "instances")
        meta = {key: value for key, value in self.meta.items() if key not in (*own, "grids")}
        meta |= {**self._grids[index], "volumes": 1}
        return Pack(self._store, meta, volume_path(index))

    @property
    def label(self) -> tuple[dict[str, Any], ...]:
        """What tells this volume from the others: ``{"by": "b-value", "value": 1000.0}``.

        More than one where it takes several attributes; none in a series of one volume.
        """
        return tuple((self._grids[0] if self._grids else self.meta).get("label", ()))

    @property
    def series(self) -> str:
        """SeriesInstanceUID."""
        return str(self.meta["series"])

    @property
    def modality(self) -> str:
        """Modality as in DICOM, e.g. ``CT``."""
        return str(self.meta["modality"])

    @property
    def unit(self) -> str:
        """Unit of the rescaled values, empty if unknown."""
        return self.rescale.unit

    @property
    def instances(self) -> tuple[str, ...]:
        """SOPInstanceUIDs in the order of the slices (one for a multi-frame image).

        Of a series with several volumes all, one volume after the other; each once.
        """
        return tuple(self.meta["instances"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of (slices, rows, columns)."""
        z, y, x = self.array().shape
        return z, y, x

    @property
    def store(self) -> ZipStore:
        """The store, for readers that want the OME-Zarr group itself."""
        return self._store

    def array(self, level: int = 0) -> zarr.Array[Any]:
        """Return the array of stored values of a level.

        Parameters
        ----------
        level : int
            0 is full resolution. Slice k of level l is slice ``k * 2**l`` of level 0,
            averaged in plane over ``2**l`` x ``2**l`` pixels.

        Returns
        -------
        zarr.Array
            Axes (slice, row, column); a slice of it reads only the chunks that it touches.
        """
        if not 0 <= level < LEVELS:
            raise StoreError(f"level {level} asked for; a pack has levels 0 to {LEVELS - 1}")
        with self._lock:
            if level not in self._levels:
                array = zarr.open_array(
                    self._store, path=f"{self._path}{level}", mode="r", zarr_format=3
                )
                if array.ndim != 3:
                    raise StoreError(f"level {level} has {array.ndim} axes; a volume has 3")
                self._levels[level] = array
            return self._levels[level]

    def slice(self, k: int, level: int = 0) -> NDArray[np.float32]:
        """Return one rescaled slice, e.g. in HU.

        Parameters
        ----------
        k : int
            Index of the slice at that level, from 0.
        level : int
            See :meth:`array`.

        Returns
        -------
        ndarray of float32, shape (rows, columns)
        """
        array = self.array(level)
        if not 0 <= k < array.shape[0]:
            raise StoreError(f"slice {k} asked for; level {level} has {array.shape[0]}")
        slope, intercept = self.rescale.of_slice(k * 2**level)
        stored = _stored(array, k).astype(np.float64)
        return (stored * slope + intercept).astype(np.float32)

    def values(self, dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """Return the whole volume, rescaled.

        Parameters
        ----------
        dtype : dtype
            A float type rounds to it; an integer type (e.g. int16) is refused unless every
            value is exact in it.

        Returns
        -------
        ndarray, shape (slices, rows, columns)

        Raises
        ------
        StoreError
            The type cannot hold the values exactly, or data are damaged.
        """
        array, target = self.array(), np.dtype(dtype)
        if target.kind not in "iuf":
            raise StoreError(f"values asked for as {target}; only numbers are possible")
        out = np.empty(array.shape, dtype=target)
        depth = array.shards[0] if array.shards else array.chunks[0]
        for start in range(0, array.shape[0], depth):
            slab = _stored(array, slice(start, start + depth))
            for offset in range(slab.shape[0]):
                slope, intercept = self.rescale.of_slice(start + offset)
                real = slab[offset].astype(np.float64) * slope + intercept
                if target.kind != "f":
                    _check_exact(real, target)
                out[start + offset] = real
        return out

    def headers(self) -> list[pydicom.Dataset]:
        """Return every instance's attributes, all but the pixel data, in the instances' order.

        They are parsed from the original bytes, so that private tags, encodings and the
        file meta information are those that were received.
        """
        import pydicom  # noqa: PLC0415 - reading pixels alone must not need it

        return [pydicom.dcmread(io.BytesIO(raw)) for _, raw in self.original_headers()]

    def original_headers(self) -> list[tuple[dict[str, Any], bytes]]:
        """Return, per instance in their order, what is known of the file, and its bytes.

        The bytes are the DICOM file as received with the element Pixel Data cut out. The
        dictionary has ``sop``, ``sha256`` and ``size`` of the file as received, ``at``
        (offset of the cut), and ``element``: tag, VR and length of the cut element, hex.
        """
        blob = numcodecs.Zstd().decode(self._store.member(PREAMBLE_MEMBER))
        try:
            (length,) = struct.unpack_from("<Q", blob)
            index = json.loads(bytes(blob[8 : 8 + length]))
            position, result = 8 + length, []
            for entry in index:
                result.append((entry, bytes(blob[position : position + entry["kept"]])))
                position += entry["kept"]
        except (struct.error, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"the pack's DICOM headers are broken: {error}") from error
        return self._own(result, lambda item: item[0]["sop"])

    def json_headers(self) -> list[dict[str, Any]]:
        """Return every instance's attributes in the DICOM JSON model (PS3.18 annex F)."""
        blob = numcodecs.Zstd().decode(self._store.member(HEADERS_MEMBER))
        return self._own(json.loads(bytes(blob)), lambda item: item["00080018"]["Value"][0])

    def _own(self, items: list[_Item], sop: Callable[[_Item], str]) -> list[_Item]:
        """Choose, from those of the series, what belongs to this volume's instances."""
        if self._whole:
            return items
        by_sop = {sop(item): item for item in items}
        try:
            return [by_sop[uid] for uid in self.instances]
        except KeyError as error:
            raise StoreError(f"the pack has no DICOM header of instance {error}") from error


def _grids_of(meta: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the descriptions of all volumes where there are several, as many as are counted."""
    grids = list(meta.get("grids", ()))
    if meta["pack"] == VOLUMES_VERSION and meta["volumes"] != (len(grids) or 1):
        raise ValueError(f"{meta['volumes']} volumes, {len(grids)} described")
    return [dict(grid) for grid in grids]


def _stored(array: zarr.Array[Any], selection: int | slice) -> NDArray[Any]:
    try:
        return np.asarray(array[selection])
    except (ValueError, RuntimeError) as error:  # checksums and codecs
        raise StoreError(f"the pack is damaged: {error}; restore it") from error


def _check_exact(real: NDArray[np.float64], target: np.dtype[Any]) -> None:
    limits = np.iinfo(target)
    if real.size and (real.min() < limits.min or real.max() > limits.max):
        raise StoreError(
            f"values from {real.min():g} to {real.max():g} do not fit in {target}; ask for float32"
        )
    if not np.array_equal(real, np.rint(real)):
        raise StoreError(f"the values are not whole numbers, so not exact in {target}; use float32")


def open_pack(reader: ByteReader) -> Pack:
    """Open a packed series.

    Parameters
    ----------
    reader : ByteReader
        E.g. :class:`FileReader`, or the link's verified reader.

    Returns
    -------
    Pack

    Raises
    ------
    StoreError
        The file is not a pack, is damaged, or is of a format that this version cannot read.
    """
    return Pack(ZipStore(reader))
