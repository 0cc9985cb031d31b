"""Pack one DICOM series into one file, as docs/architecture.md defines it."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numcodecs  # type: ignore[import-untyped] # has no type information
import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from kakehashi.errors import PackError
from kakehashi.imaging.geometry import Grid, grid_of_planes
from kakehashi.imaging.ozip import (
    HEADERS_MEMBER,
    LEVELS,
    PACK_VERSION,
    PREAMBLE_MEMBER,
    Rescale,
)
from kakehashi.store.describe import describe
from kakehashi.store.dicom import (
    Frames,
    Instance,
    PixelFormat,
    Plane,
    pixel_format_of,
    planes_of,
    read_instance,
    refusal,
    tolerant,
)
from kakehashi.store.layout import PART, block_hashes, blocks_path, replacing
from kakehashi.store.zipwrite import ZipWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
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
class _Volume:
    """Everything but the pixels, in slice order."""

    instances: list[Instance]
    planes: list[Plane]
    grid: Grid
    pixels: PixelFormat
    rescale: Rescale

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.planes), self.pixels.rows, self.pixels.columns


def pack_series(
    paths: Iterable[Path], out: Path, *, on_slice: Callable[[int, int], None] | None = None
) -> PackInfo:
    """Pack the files of one series.

    Parameters
    ----------
    paths : iterable of Path
        The DICOM files of one series, in any order.
    out : Path
        The pack, ``.ozx``; its block hashes go beside it as ``.blocks``. Either both are
        there afterwards, complete, or what was there before.
    on_slice : callable, optional
        Called with (slices done, slices in all).

    Returns
    -------
    PackInfo

    Raises
    ------
    PackError
        The files are not one series that lies on one grid; the message is the reason.
    """
    return pack_instances([read_instance(path) for path in paths], out, on_slice=on_slice)


def pack_instances(
    instances: Sequence[Instance],
    out: Path,
    *,
    on_slice: Callable[[int, int], None] | None = None,
) -> PackInfo:
    """Pack instances that were read already; see :func:`pack_series`."""
    with tolerant():
        volume = _arrange(instances)
        facts = describe(volume.instances[0].dataset, volume.grid, len(volume.planes))
    with replacing(out) as file:
        _write(file, volume, on_slice or (lambda _done, _all: None))
        file.flush()
        # The hashes come first under their final name: a pack without them cannot be seen.
        hashes = block_hashes(out.with_name(out.name + PART))
        with replacing(blocks_path(out)) as blocks:
            blocks.write(hashes)
        size = file.seek(0, 2)
    return PackInfo(
        facts=facts,
        size=size,
        blocks=hashlib.sha256(hashes).hexdigest(),
        sources={instance.sop: instance.sha256 for instance in volume.instances},
    )


def _arrange(instances: Sequence[Instance]) -> _Volume:
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
    formats = {pixel_format_of(instance.dataset) for instance in instances}
    if len(formats) > 1:
        kinds = sorted(f"{f.columns}x{f.rows} {f.dtype} ({f.bits_stored} bits)" for f in formats)
        raise PackError(f"mixed images in one series: {'; '.join(kinds)}")

    planes = [
        plane
        for index, instance in enumerate(instances)
        for plane in planes_of(index, instance.dataset)
    ]
    grid = grid_of_planes(
        [plane.position for plane in planes],
        [plane.orientation for plane in planes],
        [plane.spacing for plane in planes],
        planes[0].thickness,
    )
    planes = [planes[index] for index in grid.order]
    units = {plane.unit for plane in planes}
    if len(units) > 1:
        raise PackError(f"mixed units in one series: {', '.join(sorted(units))}")
    # Instances in the order of their first slice.
    order = list(dict.fromkeys(plane.instance for plane in planes))
    place = {old: new for new, old in enumerate(order)}
    return _Volume(
        instances=[instances[index] for index in order],
        planes=[_renumbered(plane, place[plane.instance]) for plane in planes],
        grid=grid,
        pixels=formats.pop(),
        rescale=_rescale(planes, units.pop()),
    )


def _renumbered(plane: Plane, instance: int) -> Plane:
    return Plane(
        instance=instance,
        frame=plane.frame,
        position=plane.position,
        orientation=plane.orientation,
        spacing=plane.spacing,
        thickness=plane.thickness,
        slope=plane.slope,
        intercept=plane.intercept,
        unit=plane.unit,
    )


def _rescale(planes: list[Plane], unit: str) -> Rescale:
    pairs = [(plane.slope, plane.intercept) for plane in planes]
    if len(set(pairs)) == 1:
        pairs = pairs[:1]
    slope, intercept = np.array(pairs, dtype=np.float64).T
    return Rescale(slope=slope, intercept=intercept, unit=unit)


def _write(file: BinaryIO, volume: _Volume, on_slice: Callable[[int, int], None]) -> None:
    writer = ZipWriter(file, _COMMENT)
    try:
        _write_members(writer, volume, on_slice)
    except BaseException:
        writer.abandon()
        raise
    writer.finish()


def _write_members(
    writer: ZipWriter, volume: _Volume, on_slice: Callable[[int, int], None]
) -> None:
    zarr.create_group(writer, zarr_format=3, attributes=_attributes(volume))
    arrays = [_create(writer, level, volume) for level in range(LEVELS)]
    headers, preamble = _dicom_members(volume.instances)
    writer.put(HEADERS_MEMBER, headers)
    writer.put(PREAMBLE_MEMBER, preamble)

    frames = Frames(volume.instances, volume.pixels)
    smaller = [np.empty(array.shape, dtype=array.dtype) for array in arrays[1:]]
    (depth, *_), _ = _tiles(volume.shape)
    count = len(volume.planes)
    for start in range(0, count, depth):
        stop = min(count, start + depth)
        slab = np.empty((stop - start, *volume.shape[1:]), dtype=volume.pixels.dtype)
        for k in range(start, stop):
            image = slab[k - start]
            image[...] = frames.decode(volume.planes[k])
            for level, target in enumerate(smaller, start=1):
                if k % 2**level == 0:
                    image = _halved(image)
                    target[k // 2**level] = image
            on_slice(k + 1, count)
        _fill(arrays[0], start, slab)
    for array, data in zip(arrays[1:], smaller, strict=True):
        _fill(array, 0, data)


def _create(writer: ZipWriter, level: int, volume: _Volume) -> zarr.Array[Any]:
    shape = tuple(math.ceil(n / 2**level) for n in volume.shape)
    shard, chunk = _tiles(shape)
    dtype = volume.pixels.dtype
    return zarr.create_array(
        writer,
        name=str(level),
        shape=shape,
        dtype=dtype,
        chunks=chunk,
        shards=shard,
        compressors=[
            BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle", typesize=dtype.itemsize),
            Crc32cCodec(),
        ],
        fill_value=0,
        dimension_names=("z", "y", "x"),
        zarr_format=3,
    )


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


def _attributes(volume: _Volume) -> dict[str, Any]:
    first = volume.instances[0].dataset
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
        "ome": {
            "version": "0.5",
            "multiscales": [
                {"name": str(first.SeriesInstanceUID), "axes": axes, "datasets": datasets}
            ],
        },
        "kakehashi": {
            "pack": PACK_VERSION,
            "series": str(first.SeriesInstanceUID),
            "modality": str(first.Modality),
            "affine_lps": volume.grid.affine_lps.tolist(),
            "spacing_mm": [z, y, x],
            "rescale": volume.rescale.to_meta(),
            "volumes": 1,
            "instances": [instance.sop for instance in volume.instances],
        },
    }


def _dicom_members(instances: list[Instance]) -> tuple[bytes, bytes]:
    """Return the headers as DICOM JSON, and as received with an index, both compressed."""
    with tolerant():
        # What the JSON model cannot say is left out of it, and is in the original.
        models = [
            instance.dataset.to_json_dict(suppress_invalid_tags=True) for instance in instances
        ]
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
    return bytes(zstd.encode(model)), bytes(zstd.encode(original))


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
