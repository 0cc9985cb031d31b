"""A packed series beside NIfTI.gz, HDF5 and plain zarr: bytes, writing, and reading a part.

A real CT of the test data, and a phantom of usual size with noise (also in the air) that is
correlated in the slice, as a reconstruction's is. All are written from the same DICOM files and
hold the same values; the pack also has two smaller levels for viewing, every DICOM header,
checksums of its chunks and hashes of its blocks, and is flushed to disk. Its share of bytes is told
for the whole file and for what the others hold too, the voxels. Each read opens the file anew, as a
loader's worker does.

Needs h5py 3.16.0, for this comparison alone.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import nibabel
import numpy as np
import pydicom
import zarr
from numpy.typing import NDArray
from rich.console import Console

# Run as a script, this folder is on the path but not its parent.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.figures import Goal, Series, Table, arguments, at_least, at_most, interleaved, report
from kakehashi.imaging.ozip import FileReader, open_pack
from kakehashi.store.layout import blocks_path
from kakehashi.store.pack import pack_series
from tests.store.made import Slice, write

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
ROUNDS, QUICK_ROUNDS = 9, 1
DEPTH, SIDE = 300, 512
NOISE_HU = 20
CROP = 96
READS = 3
TITLE = "A packed series beside other formats"

Part = tuple[slice | int, slice, slice]
Voxels = NDArray[Any]


def phantom() -> list[NDArray[np.int16]]:
    """Return the slices of a chest-like phantom in HU, the same ones each time."""
    chance = np.random.default_rng(1)
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    weights = np.array([1, 2, 1])
    image = []
    for k in range(DEPTH):
        z = 2 * k / DEPTH - 1
        width = 1 - 0.2 * z * z
        values = np.full((SIDE, SIDE), -1000.0)
        values[(x / (0.85 * width)) ** 2 + (y / 0.6) ** 2 < 1] = 40
        for left, top, radius, density in (
            (-0.38, 0.0, 0.27, -820),
            (0.38, 0.0, 0.27, -820),
            (0.0, 0.4, 0.1, 600),
            (0.05, -0.1, 0.15, 150),
        ):
            values[(x - left) ** 2 + (y - top) ** 2 < (radius * width) ** 2] = density
        noise = chance.normal(size=(SIDE + 2, SIDE + 2))
        noise = sum(w * noise[i : i + SIDE] for i, w in enumerate(weights))
        noise = sum(w * noise[:, i : i + SIDE] for i, w in enumerate(weights))
        values += noise * (NOISE_HU / noise.std())
        image.append(np.clip(np.rint(values), -1024, 3071).astype(np.int16))
    return image


class Format(NamedTuple):
    """How one format is written from DICOM files and how a part of it is read."""

    name: str
    suffix: str
    write: Callable[[Sequence[Path], Path], object]
    read: Callable[[Path, Part], Voxels]


def decoded(files: Sequence[Path]) -> tuple[Voxels, Voxels]:
    """Return what pydicom makes of the files, in slice order, and an affine for NIfTI."""
    images = sorted(map(pydicom.dcmread, files), key=lambda one: float(one.ImagePositionPatient[2]))
    y, x = (float(one) for one in images[0].PixelSpacing)
    z = float(images[1].ImagePositionPatient[2] - images[0].ImagePositionPatient[2])
    return np.stack([one.pixel_array for one in images]), np.diag([-x, -y, z, 1])


def write_nifti(files: Sequence[Path], out: Path) -> None:
    values, affine = decoded(files)
    image: Any = nibabel.nifti1.Nifti1Image
    image(values.transpose(2, 1, 0), affine).to_filename(out)


def read_nifti(path: Path, part: Part) -> Voxels:
    z, y, x = part
    image: Any = nibabel.loadsave.load(path)
    return np.asarray(image.dataobj[x, y, z]).T


def write_hdf5(files: Sequence[Path], out: Path) -> None:
    with h5py.File(out, "w") as file:
        file.create_dataset("values", data=decoded(files)[0], compression="gzip", shuffle=True)


def read_hdf5(path: Path, part: Part) -> Voxels:
    with h5py.File(path) as file:
        return np.asarray(file["values"][part])


def write_zarr(files: Sequence[Path], out: Path) -> None:
    zarr.create_array(out, data=decoded(files)[0], overwrite=True)


def read_zarr(path: Path, part: Part) -> Voxels:
    return np.asarray(zarr.open_array(path, mode="r")[part])


def read_pack(path: Path, part: Part) -> Voxels:
    with FileReader(path) as reader:
        return np.asarray(open_pack(reader).array()[part])


PACK = Format("pack", "ozx", pack_series, read_pack)
NIFTI = Format("NIfTI.gz (nibabel)", "nii.gz", write_nifti, read_nifti)
FORMATS = (
    PACK,
    NIFTI,
    Format("HDF5, gzip and shuffle", "h5", write_hdf5, read_hdf5),
    Format("zarr, as it comes", "zarr", write_zarr, read_zarr),
)


def size_of(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    beside = blocks_path(path).stat().st_size if path.suffix == ".ozx" else 0
    return path.stat().st_size + beside


def voxels_of(path: Path) -> int:
    """Bytes of a pack's full resolution alone."""
    with FileReader(path) as reader:
        store = open_pack(reader).store
        return sum(store.size_of(name) or 0 for name in store.names() if name.startswith("0/"))


@dataclass
class Volume:
    """One volume in every format, and what each act on it cost."""

    name: str
    files: list[Path]
    folder: Path
    cpu: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self._values = decoded(self.files)[0]
        self.megabytes = self._values.nbytes / 1e6
        for kind in FORMATS:
            kind.write(self.files, self.path(kind))
            for part in (self._whole(), self._crops()[0], self._slices()[0]):
                if not np.array_equal(kind.read(self.path(kind), part), self._values[part]):
                    raise SystemExit(f"{kind.name} gave other values back")

    def path(self, kind: Format) -> Path:
        return self.folder / f"volume.{kind.suffix}"

    def _whole(self) -> Part:
        return slice(None), slice(None), slice(None)

    def _crops(self) -> list[Part]:
        chance = np.random.default_rng(2)

        def anywhere(length: int) -> slice:
            start = int(chance.integers(max(1, length - CROP + 1)))
            return slice(start, start + CROP)

        z, y, x = self._values.shape
        return [(anywhere(z), anywhere(y), anywhere(x)) for _ in range(READS)]

    def _slices(self) -> list[Part]:
        every = slice(None)
        # NIfTI.gz is read from its beginning to the slice: on the average to its middle.
        places = [(2 * n + 1) * len(self._values) // (2 * READS) for n in range(READS)]
        return [(k, every, every) for k in places]

    def acts(self) -> dict[str, Callable[[Format], float]]:
        crop = min(CROP, len(self._values))
        return {
            "write": lambda kind: self._timed(
                kind, "write", [functools.partial(kind.write, self.files, self.path(kind))]
            ),
            "read": functools.partial(self._read, "read", [self._whole()]),
            f"crop {crop}x{CROP}x{CROP}": functools.partial(self._read, "crop", self._crops()),
            "slice": functools.partial(self._read, "slice", self._slices()),
        }

    def _read(self, act: str, parts: list[Part], kind: Format) -> float:
        path = self.path(kind)
        return self._timed(kind, act, [functools.partial(kind.read, path, part) for part in parts])

    def _timed(self, kind: Format, act: str, calls: Sequence[Callable[[], object]]) -> float:
        gc.collect()
        cpu, started = time.process_time(), time.perf_counter()
        for call in calls:
            call()
        took = (time.perf_counter() - started) / len(calls)
        spent = (time.process_time() - cpu) / len(calls)
        self.cpu.setdefault((kind.name, act), []).append(spent * 1000)
        return took * 1000


def main() -> None:
    """Measure and report."""
    options = arguments("a packed series beside other formats")
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    console = Console(stderr=True)
    series: list[Series] = []
    goals: list[Goal] = []
    tables: list[Table] = []
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-pack-")))
        slices = [Slice(k, image=image, size=image.shape) for k, image in enumerate(phantom())]
        volumes = [
            Volume("real CT", sorted((DATA / "ct_chest").glob("*.dcm")), base / "real"),
            Volume("noisy phantom", write(base / "in", slices, "CT"), base / "phantom"),
        ]
        for volume in volumes:
            acts = volume.acts()
            values = interleaved(
                {
                    f"{volume.name}: {act}, {kind.name}": functools.partial(run, kind)
                    for act, run in acts.items()
                    for kind in FORMATS
                },
                rounds,
                console,
            )
            series += [Series(name, "ms", found) for name, found in values.items()]
            sizes = {kind.name: size_of(volume.path(kind)) / 1e6 for kind in FORMATS}
            sizes["pack, its voxels alone"] = voxels_of(volume.path(PACK)) / 1e6
            series += [
                Series(f"{volume.name}: size, {name}", "MB", (size,))
                for name, size in sizes.items()
            ]
            tables.append(table_of(volume, list(acts), values, sizes))
            share = sizes["pack, its voxels alone"] / sizes[NIFTI.name]
            name = f"{volume.name}: bytes of the voxels of NIfTI.gz's"
            goals.append(at_most(name, (share,), 0.85, ""))
            # A dozen slices lie in one row of chunks: there is little to leave out.
            for act, least in ((list(acts)[2], 10), (list(acts)[3], 15)):
                ours, theirs = (
                    values[f"{volume.name}: {act}, {kind.name}"] for kind in (PACK, NIFTI)
                )
                ratios = [one / other for one, other in zip(theirs, ours, strict=True)]
                goals.append(at_least(f"{volume.name}: {act}, times as fast", ratios, least))
    report(TITLE, series, goals, tables=tables, quick=options.quick, path=options.json)


def table_of(
    volume: Volume, acts: list[str], values: dict[str, tuple[float, ...]], sizes: dict[str, float]
) -> Table:
    """Lay a volume's figures out: times, CPU time behind the stroke, and ratios to NIfTI.gz."""
    nifti = sizes[NIFTI.name]
    rows = []
    for kind in FORMATS:
        row = [kind.name, f"{sizes[kind.name]:.2f} MB ({sizes[kind.name] / nifti:.2f})"]
        for act in acts:
            found = values[f"{volume.name}: {act}, {kind.name}"]
            other = values[f"{volume.name}: {act}, {NIFTI.name}"]
            ratio = statistics.median(o / f for o, f in zip(other, found, strict=True))
            cpu = statistics.median(volume.cpu[kind.name, act.split()[0]])
            row.append(f"{statistics.median(found):.3g} / {cpu:.3g} ms ({ratio:.3g}x)")
        rows.append(tuple(row))
    voxels = sizes["pack, its voxels alone"]
    rows.insert(
        1,
        ("pack, its voxels alone", f"{voxels:.2f} MB ({voxels / nifti:.2f})", *[""] * len(acts)),
    )
    return Table(
        f"{volume.name}, {volume.megabytes:.0f} MB of voxels: time / CPU time",
        ("format", "size (of NIfTI.gz)", *acts),
        tuple(rows),
    )


if __name__ == "__main__":
    main()
