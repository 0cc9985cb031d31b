"""Pack one DICOM series into one file, as docs/architecture.md defines it."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numcodecs  # type: ignore[import-untyped] # has no type information
import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from kakehashi.errors import PackError
from kakehashi.imaging.ozip import (
    HEADERS_MEMBER,
    LEVELS,
    PACK_VERSION,
    PREAMBLE_MEMBER,
    VOLUMES_VERSION,
    Rescale,
    volume_path,
)
from kakehashi.store.describe import describe
from kakehashi.store.dicom import Instance, read_instance, refusal, tolerant
from kakehashi.store.frames import Frames
from kakehashi.store.layout import PART, block_hashes, blocks_path, replacing
from kakehashi.store.volumes import Volume, divide
from kakehashi.store.zipwrite import ZipWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Executor, Future
    from pathlib import Path
    from typing import BinaryIO

    from numpy.typing import NDArray

    from kakehashi.store.catalogue import SeriesFacts

# A slice of 512x512 costs 5 reads and 3 MB, a cube of 96^3 not much more (measured).
_CHUNK = (16, 256, 256)
_SHARD = (64, 512, 512)
_COMMENT = json.dumps(
    {"ome": {"version": "0.5", "zipFile": {"centralDirectory": {"jsonFirst": True}}}},
    separators=(",", ":"),
).encode()
_ZSTD_LEVEL = 9

REPEATED = "repeated-volume"
"""Flag of a series of which two volumes have the same pixels."""


@dataclass(frozen=True, slots=True)
class PackInfo:
    """A packed series.

    Attributes
    ----------
    facts : SeriesFacts
        What the catalogue says about it.
    size : int
        Bytes of the pack.
    blocks : str
        SHA-256 of the ``.blocks`` file, hexadecimal.
    sources : dict
        SOPInstanceUID to SHA-256 of the file it came in.
    """

    facts: SeriesFacts
    size: int
    blocks: str
    sources: dict[str, str]


@dataclass(frozen=True, slots=True)
class Arranged:
    """A series of which everything is known but the pixels.

    Attributes
    ----------
    volumes : list of Volume
    instances : list of Instance
        What the planes of the volumes count.
    frames : Frames
    """

    volumes: list[Volume]
    instances: list[Instance]
    frames: Frames

    @property
    def in_order(self) -> list[Instance]:
        """Instances in the order of their first slice, volume after volume."""
        return [self.instances[index] for index in _used(*self.volumes)]

    def of(self, volume: Volume) -> list[str]:
        """Return the SOPInstanceUIDs of a volume, in the order of their first slice."""
        return [self.instances[index].sop for index in _used(volume)]


@dataclass(frozen=True, slots=True)
class Described:
    """All that a pack says besides the pixels.

    Attributes
    ----------
    series : Arranged
    facts : SeriesFacts
        All but the flag ``repeated-volume``, for which the pixels are needed.
    members : dict of str to bytes
        The headers, in both forms, by their name.
    """

    series: Arranged
    facts: SeriesFacts
    members: dict[str, bytes]

    def information(self, size: int, blocks: str, *, repeated: bool) -> PackInfo:
        """Return what is known of the pack, of so many bytes and with such block hashes."""
        flags = (*self.facts.flags, REPEATED) if repeated else self.facts.flags
        sources = {instance.sop: instance.sha256 for instance in self.series.in_order}
        return PackInfo(replace(self.facts, flags=flags), size, blocks, sources)

    def documents(self) -> dict[str, bytes]:
        """Return the descriptions of the pack's groups and arrays, by their name."""
        writer = ZipWriter(io.BytesIO(), _COMMENT)
        _lay_out(writer, self.series)
        return writer.documents

    def shards(self) -> dict[str, tuple[int, ...]]:
        """Return into how many shards each array is cut, by what their names begin with."""
        found = {}
        for index, volume in enumerate(self.series.volumes):
            for level in range(LEVELS):
                shape = _shape(volume, level)
                shard, _ = _tiles(shape)
                counts = tuple(math.ceil(n / s) for n, s in zip(shape, shard, strict=True))
                found[f"{volume_path(index)}{level}/c/"] = counts
        return found

    def pixel_bytes(self) -> int:
        """Return the bytes of the pixels, as they are without compression, of the first level."""
        return sum(
            math.prod(volume.shape) * volume.pixels.dtype.itemsize for volume in self.series.volumes
        )


def _used(*volumes: Volume) -> list[int]:
    return list(dict.fromkeys(plane.instance for volume in volumes for plane in volume.planes))


def pack_series(
    paths: Iterable[Path], out: Path, *, on_slice: Callable[[int, int], None] | None = None
) -> PackInfo:
    """Pack the files of one series, with each of its volumes on a grid of its own.

    Parameters
    ----------
    paths : iterable of Path
        The DICOM files of one series, in any order.
    out : Path
        The pack, ``.ozx``; its block hashes go beside it as ``.blocks``. Either both are
        there afterwards, complete, or what was there before.
    on_slice : callable, optional
        Called with (slices done, slices in all volumes).

    Returns
    -------
    PackInfo

    Raises
    ------
    PackError
        The files are not one series, or it is not volumes of one grid each; the message is the
        reason.
    """
    return pack_instances([read_instance(path) for path in paths], out, on_slice=on_slice)


def pack_instances(
    instances: Sequence[Instance],
    out: Path,
    *,
    on_slice: Callable[[int, int], None] | None = None,
) -> PackInfo:
    """Pack instances that were read already; see :func:`pack_series`."""
    known = described(instances)
    with tolerant(), replacing(out) as file:
        repeated = _write(file, known.series, known.members, on_slice or (lambda _done, _all: None))
        file.flush()
        # The hashes come first under their final name: a pack without them cannot be seen.
        hashes = block_hashes(out.with_name(out.name + PART))
        with replacing(blocks_path(out)) as blocks:
            blocks.write(hashes)
        size = file.seek(0, 2)
    return known.information(size, hashlib.sha256(hashes).hexdigest(), repeated=repeated)


def described(instances: Sequence[Instance]) -> Described:
    """Find what a pack says besides the pixels, by the headers alone.

    Raises
    ------
    PackError
        As :func:`pack_series`.
    """
    with tolerant(), _damage_refused():
        series = arrange(instances)
        first = series.in_order[0].dataset
        facts = describe(first, [volume.grid for volume in series.volumes])
        return Described(series, facts, _dicom_members(series.in_order))


@contextmanager
def _damage_refused() -> Iterator[None]:
    """Make every error of headers a refusal: what comes from outside may be damaged anywhere."""
    try:
        yield
    except (PackError, OSError):
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise PackError(
            f"the attributes of an image are damaged, send it again: {reason}"
        ) from error


def arrange(instances: Sequence[Instance]) -> Arranged:
    """Find the volumes of a series; the order of its instances decides nothing.

    Raises
    ------
    PackError
        They are not one series, or not volumes of one grid each.
    """
    if not instances:
        raise PackError("no images")
    for instance in instances:
        if reason := refusal(instance.dataset):
            raise PackError(reason)
    for name in (
        "SeriesInstanceUID",
        "StudyInstanceUID",
        "PatientID",
        "Modality",
        "FrameOfReferenceUID",
    ):
        values = {str(instance.dataset.get(name, "")) for instance in instances}
        if len(values) > 1:
            raise PackError(f"{name} differs within the series: {', '.join(sorted(values))}")
    if len({instance.sop for instance in instances}) < len(instances):
        raise PackError("two files have the same SOPInstanceUID and other content")
    # In an order of their own, so that the order in which they came decides nothing.
    ordered = sorted(instances, key=lambda instance: instance.sop)
    return Arranged(volumes=divide(ordered), instances=ordered, frames=Frames(ordered))


def _rescale(volume: Volume) -> Rescale:
    pairs = [(plane.slope, plane.intercept) for plane in volume.planes]
    if len(set(pairs)) == 1:
        pairs = pairs[:1]
    slope, intercept = np.array(pairs, dtype=np.float64).T
    return Rescale(slope=slope, intercept=intercept, unit=volume.unit)


def _write(
    file: BinaryIO,
    series: Arranged,
    members: dict[str, bytes],
    on_slice: Callable[[int, int], None],
) -> bool:
    """Write the pack; say whether two volumes have the same pixels."""
    writer = ZipWriter(file, _COMMENT)
    try:
        equal = _write_members(writer, series, members, on_slice)
    except BaseException:
        writer.abandon()
        raise
    writer.finish()
    return equal


def _write_members(
    writer: ZipWriter,
    series: Arranged,
    members: dict[str, bytes],
    on_slice: Callable[[int, int], None],
) -> bool:
    arrays = _lay_out(writer, series)
    for name, packed in members.items():
        writer.put(name, packed)

    total, before = sum(len(volume.planes) for volume in series.volumes), 0
    contents = set()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for volume, levels in zip(series.volumes, arrays, strict=True):
            content = hashlib.sha256()
            smaller = [np.empty(array.shape, dtype=array.dtype) for array in levels[1:]]
            for start, slab in _slabs(series.frames, volume, pool):
                for k, full in enumerate(slab, start=start):
                    image = full
                    for level, target in enumerate(smaller, start=1):
                        if k % 2**level == 0:
                            image = _halved(image)
                            target[k // 2**level] = image
                    on_slice(before + k + 1, total)
                if len(series.volumes) > 1:
                    content.update(slab.data)
                _fill(levels[0], start, slab)
            for array, data in zip(levels[1:], smaller, strict=True):
                _fill(array, 0, data)
            before += len(volume.planes)
            contents.add((volume.shape, content.digest()))
    return len(contents) < len(series.volumes)


def _lay_out(writer: ZipWriter, series: Arranged) -> list[list[zarr.Array[Any]]]:
    """Write the descriptions of groups and arrays; return each volume's arrays."""
    arrays = []
    zarr.create_group(writer, zarr_format=3, attributes=attributes_of(series))
    for index, volume in enumerate(series.volumes):
        path = volume_path(index)
        if index == 1:
            zarr.create_group(writer, path=path.split("/", 1)[0], zarr_format=3)
        if index:
            ome = _multiscales(f"{_uid(series)} {index}", volume)
            zarr.create_group(writer, path=path, zarr_format=3, attributes={"ome": ome})
        arrays.append([_create(writer, path, level, volume) for level in range(LEVELS)])
    return arrays


def _slabs(frames: Frames, volume: Volume, pool: Executor) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield (first slice, slices of one row of shards); the next one is decoded meanwhile."""
    (depth, *_), _ = _tiles(volume.shape)

    def begin(start: int) -> list[Future[NDArray[Any]]]:
        planes = volume.planes[start : start + depth]
        return [pool.submit(frames.decode, plane, volume.pixels) for plane in planes]

    coming = begin(0)
    try:
        for start in range(0, len(volume.planes), depth):
            slab = np.empty((len(coming), *volume.shape[1:]), dtype=volume.pixels.dtype)
            for image, future in zip(slab, coming, strict=True):
                image[...] = future.result()
            coming = begin(start + depth)
            yield start, slab
    finally:
        for future in coming:
            future.cancel()


def _create(writer: ZipWriter, path: str, level: int, volume: Volume) -> zarr.Array[Any]:
    shape = _shape(volume, level)
    shard, chunk = _tiles(shape)
    dtype = volume.pixels.dtype
    codec = BloscCodec(
        cname="zstd",
        clevel=3,
        shuffle="bitshuffle",
        typesize=dtype.itemsize,
        # A chunk is read as a whole: in one block it is up to 5 % smaller (measured).
        blocksize=math.prod(chunk) * dtype.itemsize,
    )
    return zarr.create_array(
        writer,
        name=f"{path}{level}",
        shape=shape,
        dtype=dtype,
        chunks=chunk,
        shards=shard,
        compressors=[codec, Crc32cCodec()],
        fill_value=0,
        dimension_names=("z", "y", "x"),
        zarr_format=3,
    )


def _shape(volume: Volume, level: int) -> tuple[int, ...]:
    return tuple(math.ceil(n / 2**level) for n in volume.shape)


def _tiles(shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of shards and of the chunks in them."""
    chunk = tuple(min(c, n) for c, n in zip(_CHUNK, shape, strict=True))
    shard = tuple(
        c * math.ceil(min(s, n) / c) for c, s, n in zip(chunk, _SHARD, shape, strict=True)
    )
    return shard, chunk


def _fill(array: zarr.Array[Any], start: int, data: NDArray[Any]) -> None:
    """Write slices from `start` on, one shard after another.

    zarr would write several at a time, in an order that is another one each time.
    """
    (depth, height, width), _ = _tiles(array.shape)
    for z in range(0, data.shape[0], depth):
        for y in range(0, data.shape[1], height):
            for x in range(0, data.shape[2], width):
                tile = data[z : z + depth, y : y + height, x : x + width]
                end = (start + z + tile.shape[0], y + tile.shape[1], x + tile.shape[2])
                array[start + z : end[0], y : end[1], x : end[2]] = tile


def _halved(image: NDArray[Any]) -> NDArray[Any]:
    """Average 2x2 pixels; the last row and column of an odd size count twice.

    Slices are left out rather than averaged, since each may have its own rescale.
    """
    rows, columns = image.shape
    even = np.pad(image, ((0, rows % 2), (0, columns % 2)), mode="edge").astype(np.float64)
    mean = (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / 4
    return np.rint(mean).astype(image.dtype)


def attributes_of(series: Arranged) -> dict[str, Any]:
    """Return the attributes of a pack's root group; they say where each instance's slices are."""
    first, *others = series.volumes
    attributes = {
        "pack": VOLUMES_VERSION if others else PACK_VERSION,
        "series": _uid(series),
        "modality": str(series.in_order[0].dataset.Modality),
        **_geometry(first),
        "volumes": len(series.volumes),
        "instances": [instance.sop for instance in series.in_order],
    }
    if others:
        attributes["grids"] = [
            {
                "label": [asdict(label) for label in volume.label],
                **_geometry(volume),
                "instances": series.of(volume),
            }
            for volume in series.volumes
        ]
    return {"ome": _multiscales(_uid(series), first), "kakehashi": attributes}


def _uid(series: Arranged) -> str:
    return str(series.in_order[0].dataset.SeriesInstanceUID)


def _geometry(volume: Volume) -> dict[str, Any]:
    return {
        "affine_lps": volume.grid.affine_lps.tolist(),
        "spacing_mm": list(volume.grid.spacing_mm),
        "rescale": _rescale(volume).to_meta(),
    }


def _multiscales(name: str, volume: Volume) -> dict[str, Any]:
    z, y, x = volume.grid.spacing_mm
    datasets = []
    for level in range(LEVELS):
        factor = 2**level
        shift = (factor - 1) / 2
        datasets.append(
            {
                "path": str(level),
                "coordinateTransformations": [
                    {"type": "scale", "scale": [z * factor, y * factor, x * factor]},
                    {"type": "translation", "translation": [0.0, y * shift, x * shift]},
                ],
            }
        )
    axes = [{"name": name, "type": "space", "unit": "millimeter"} for name in ("z", "y", "x")]
    return {
        "version": "0.5",
        "multiscales": [{"name": name, "axes": axes, "datasets": datasets}],
    }


def _dicom_members(instances: list[Instance]) -> dict[str, bytes]:
    """Return the headers as DICOM JSON, and as received with an index, both compressed."""
    # What the JSON model cannot say is left out of it, and is in the original.
    models = [instance.dataset.to_json_dict(suppress_invalid_tags=True) for instance in instances]
    index = [
        {
            "sop": instance.sop,
            "sha256": instance.sha256,
            "size": instance.size,
            "at": instance.cut_at,
            "element": instance.cut_element.hex(),
            "kept": len(instance.header),
        }
        for instance in instances
    ]
    text = json.dumps(index, separators=(",", ":")).encode()
    original = struct.pack("<Q", len(text)) + text + b"".join(i.header for i in instances)
    model = json.dumps(_finite(models), ensure_ascii=False, separators=(",", ":")).encode()
    zstd = numcodecs.Zstd(level=_ZSTD_LEVEL)
    return {
        HEADERS_MEMBER: bytes(zstd.encode(model)),
        PREAMBLE_MEMBER: bytes(zstd.encode(original)),
    }


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON has not, by null (an empty value in the model)."""
    match value:
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list():
            return [_finite(inner) for inner in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value
