"""What a scanner makes of a body: planes in space, blur, noise, table, streaks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kakehashi.store.synthetic.chance import generator
from kakehashi.store.synthetic.render import Planes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from kakehashi.store.synthetic.protocols import SeriesPlan
    from kakehashi.store.synthetic.render import Floats, Metal, Renderer
    from kakehashi.store.synthetic.scanners import Kernel

HU_RANGE = (-1024.0, 3071.0)
"""Values that are stored; what is beyond is cut, as 12 bit scanners do."""

_TILES = 4
_TABLE_HU = -330.0
_TABLE_DEPTH = 24.0
_METAL_HU = 9000.0


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the voxels of a volume are, in patient coordinates (LPS, mm).

    Rows run along x. Slice 0 is the lowest along row x column, so that indices are those of
    :func:`kakehashi.imaging.geometry.grid_of_planes`.

    Attributes
    ----------
    origin : tuple of float
        Centre of the first voxel of slice 0.
    column : tuple of float
        Direction of a column (unit vector), as Image Orientation gives it.
    step : tuple of float
        From one slice to the next.
    spacing : float
        Of pixels, in both directions.
    slices, rows, columns : int
    """

    origin: tuple[float, float, float]
    column: tuple[float, float, float]
    step: tuple[float, float, float]
    spacing: float
    slices: int
    rows: int
    columns: int

    @property
    def affine(self) -> NDArray[np.float64]:
        """(i, j, k, 1) to mm, shape (4, 4)."""
        found = np.eye(4)
        found[:3, 0] = (self.spacing, 0, 0)
        found[:3, 1] = np.array(self.column) * self.spacing
        found[:3, 2] = self.step
        found[:3, 3] = self.origin
        return found

    @property
    def normal(self) -> NDArray[np.float64]:
        """Row direction x column direction."""
        return np.cross((1.0, 0.0, 0.0), self.column)

    def position(self, k: int) -> tuple[float, float, float]:
        """Return Image Position (Patient) of a slice, rounded as it is written."""
        x, y, z = (np.array(self.origin) + k * np.array(self.step)).tolist()
        return round(x, 6), round(y, 6), round(z, 6)

    def planes(self, first: int, count: int, offset: Sequence[float], shift: float = 0.0) -> Planes:
        """Return voxel centres of some slices in phantom coordinates.

        Parameters
        ----------
        first, count : int
        offset : sequence of float
            From phantom to patient coordinates.
        shift : float
            To move them along the normal, mm: for the parts of a thick slice.
        """
        start = np.array(self.origin) - np.asarray(offset) + shift * self.normal
        k = np.arange(first, first + count)[:, None]
        j = np.arange(self.rows)[None, :] * self.spacing
        return Planes(
            x=start[0] + np.arange(self.columns) * self.spacing,
            y=start[1] + k * self.step[1] + j * self.column[1],
            z=start[2] + k * self.step[2] + j * self.column[2],
        )


def grid_of(series: SeriesPlan, size: int, scale: Sequence[float], offset: Sequence[float]) -> Grid:
    """Lay the planes of a series around the body.

    Parameters
    ----------
    series : SeriesPlan
    size : int
        Rows and columns.
    scale : sequence of float
        The person's size over the reference's.
    offset : sequence of float
        From phantom to patient coordinates.

    Notes
    -----
    With a tilted gantry the table moves along z while the planes are turned about x, so that
    the step is not along the normal. MR planes are turned, not sheared.
    """
    spacing = round(series.fov_mm / size, 6)
    low, high = (height * scale[2] + offset[2] for height in series.heights)
    half = (size - 1) / 2 * spacing
    x = round(offset[0] - half, 6)
    if series.kind == "reformat":
        depth = 105 * scale[1]
        slices = round(2 * depth / series.interval)
        rows = math.ceil((high - low) / spacing)
        return Grid(
            (x, round(offset[1] - depth, 6), round(high, 6)),
            (0.0, 0.0, -1.0),
            (0.0, series.interval, 0.0),
            spacing,
            slices,
            rows,
            size,
        )
    angle = math.radians(series.tilt_deg)
    column = (0.0, round(math.cos(angle), 9), round(math.sin(angle), 9))
    step = (0.0, 0.0, series.interval)
    if series.kind == "mr":
        step = (0.0, round(-column[2] * series.interval, 6), round(column[1] * series.interval, 6))
    slices = round((high - low) / series.interval)
    middle = -(slices - 1) / 2
    centre = np.array((offset[0], offset[1], (low + high) / 2)) + middle * np.array(step)
    first = centre - half * np.array(column)
    return Grid(
        (x, round(float(first[1]), 6), round(float(first[2]), 6)),
        column,
        step,
        spacing,
        slices,
        size,
        size,
    )


def draw_thick(
    renderer: Renderer,
    grid: Grid,
    series: SeriesPlan,
    where: tuple[int, int, Sequence[float]],
    values: Mapping[str, float],
    *,
    texture: bool = True,
) -> Floats:
    """Draw slices with their thickness: the mean of planes at most 2 mm apart.

    Parameters
    ----------
    renderer : Renderer
    grid : Grid
    series : SeriesPlan
    where : tuple
        First slice, count of slices, and offset from phantom to patient coordinates.
    values : mapping
    texture : bool
    """
    parts = max(1, round(series.thickness / 1.7))
    total: Floats | None = None
    for part in range(parts):
        shift = ((part + 0.5) / parts - 0.5) * series.thickness
        drawn = renderer.draw(grid.planes(*where, shift), values, texture=texture)
        total = drawn if total is None else total + drawn
    assert total is not None  # noqa: S101 # there is one part at least
    return total / np.float32(parts)


def blurred(field: Floats, spacing: float, blur: float, boost: float = 0.0) -> Floats:
    """Blur within the plane, and enhance edges; the mean stays.

    Parameters
    ----------
    field : ndarray, shape (slices, rows, columns)
    spacing, blur : float
        mm; the blur is the standard deviation of a Gaussian.
    boost : float
        Share of a wider blur that is taken away.
    """
    taps = (1 + boost) * _gauss(blur / spacing, 4) - boost * _gauss(2.2 * blur / spacing, 4)
    return _along(_along(field, taps, 1), taps, 2)


def _gauss(sigma: float, reach: int) -> NDArray[np.float64]:
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(sigma, 0.05)) ** 2)
    return np.asarray(taps / taps.sum())


def _along(field: Floats, taps: NDArray[np.float64], axis: int) -> Floats:
    reach = len(taps) // 2
    width = [(0, 0)] * 3
    width[axis] = (reach, reach)
    padded = np.pad(field, width, mode="edge")
    count = field.shape[axis]

    def moved(by: int) -> Floats:
        cut = [slice(None)] * 3
        cut[axis] = slice(reach + by, reach + by + count)
        return padded[tuple(cut)]

    out = field * np.float32(taps[reach])
    for by in range(1, reach + 1):
        if abs(taps[reach + by]) > 1e-4:
            out += np.float32(taps[reach + by]) * (moved(by) + moved(-by))
    return out


class Noise:
    """Noise with a kernel's power spectrum: the spectrum rises with frequency, then falls.

    Some tiles are made once; each slice is the sum of two, rolled by random amounts. That has
    the same spectrum, and slices are uncorrelated for all that a test can see.

    Parameters
    ----------
    key : str
    shape : tuple of int
        (rows, columns)
    spacing : float
        mm
    peak : float
        Where the noise power is highest, per mm.
    """

    def __init__(self, key: str, shape: tuple[int, int], spacing: float, peak: float) -> None:
        self._key = key
        rows, columns = shape
        frequency = np.hypot(
            np.fft.fftfreq(rows, spacing)[:, None], np.fft.rfftfreq(columns, spacing)[None, :]
        )
        power = frequency * np.exp(-0.5 * (frequency / peak) ** 2) + 1e-4
        amplitude = np.sqrt(power).astype(np.float32)
        white = generator(key, "tiles").standard_normal((_TILES, rows, columns), dtype=np.float32)
        tiles = np.fft.irfft2(np.fft.rfft2(white) * amplitude, s=(rows, columns))
        self._tiles = (tiles / tiles.std()).astype(np.float32)

    def slice(self, index: int) -> Floats:
        """Return noise of standard deviation 1 for a slice, shape (rows, columns)."""
        draw = generator(self._key, "slice", index)
        first, second = draw.permutation(_TILES)[:2]
        _, rows, columns = self._tiles.shape
        found = np.zeros((rows, columns), np.float32)
        for tile in (first, second):
            by = (int(draw.integers(rows)), int(draw.integers(columns)))
            found += np.roll(self._tiles[tile], by, axis=(0, 1))
        found *= np.float32(math.sqrt(0.5))
        return found


def noise_hu(series: SeriesPlan, weight_kg: float) -> float:
    """Return the standard deviation of noise in the middle of the body, HU.

    It goes with the root of the dose and of the thickness, as quantum noise does; the factor
    is made up. 5 mm, 120 kVp, 120 mAs and a standard kernel give 9 HU at 62 kg.
    """
    assert series.kernel is not None  # noqa: S101 # CT has a kernel
    size = min(2.0, max(0.6, weight_kg / 62)) ** 0.6
    dose = math.sqrt(120 / series.mas) * (120 / series.kvp)
    return 9.0 * series.kernel.noise * dose * math.sqrt(5 / series.thickness) * float(size)


def body_map(planes: Planes) -> Floats:
    """Return how noise varies over a slice: most in the middle of the body, least in air."""
    y = _rows(planes)
    r2 = (planes.x[None, None, :] / 170) ** 2 + (y / 120) ** 2
    found = (0.42 + 0.73 * np.exp(-0.5 * r2)).astype(np.float32)
    return np.broadcast_to(found, (*planes.y.shape, len(planes.x)))


def _rows(planes: Planes) -> NDArray[np.float64]:
    """Return y of each row, shape (slices, rows, 1), or of one slice where all are alike."""
    y = planes.y[..., None]
    return y[:1] if (y == y[0]).all() else y


def add_table(field: Floats, planes: Planes, back: float) -> None:
    """Draw the patient's table where there is air.

    Parameters
    ----------
    field : ndarray
        HU, changed in place.
    planes : Planes
    back : float
        Where the body ends behind, phantom mm.
    """
    x = planes.x[None, None, :]
    below = _rows(planes) - (back + 4 - (x / 42) ** 2)
    top = np.abs(below) < 1.8
    bottom = np.abs(below - _TABLE_DEPTH + 2 * (x / 42) ** 2 * 0.6) < 1.8
    inside = np.abs(x) < 205
    air = field < -900
    np.copyto(field, np.float32(_TABLE_HU), where=(top | bottom) & inside & air)


def add_metal(field: Floats, planes: Planes, metal: Sequence[Metal], key: str) -> None:
    """Draw metal and the streaks that it makes.

    Streaks are rays of random brightness that fade with distance. They fill a plane that was
    scanned through metal; a reformatted one shows the rows that such planes gave.
    """
    for number, rod in enumerate(metal):
        cx, cy, cz = rod.centre
        dx = planes.x[None, :] - cx
        for k in range(len(field)):
            y, z = planes.y[k], planes.z[k]
            scanned = y[0] != y[-1]
            height = z[np.abs(y - cy).argmin()] if scanned else z[:, None]
            hit = np.abs(height - cz) <= rod.half_length
            if not hit.any():
                continue
            dy = (y - cy)[:, None]
            distance = np.hypot(dx, dy)
            angle = np.arctan2(dy, dx)
            draw = generator(key, "metal", number, round(float(z[0]), 2))
            rays = np.zeros_like(distance)
            for turns in (3, 7, 12, 19, 31):
                rays += np.sin(turns * angle + draw.uniform(0, 2 * math.pi))
            field[k] += np.where(hit, 85 * rays * np.exp(-distance / 70), 0).astype(np.float32)
            field[k][hit & (distance <= rod.radius)] = _METAL_HU


def ct_slices(
    clean: Floats,
    planes: Planes,
    kernel: Kernel,
    noise: Noise,
    *,
    sigma: float,
    spacing: float,
    first: int,
) -> NDArray[np.int16]:
    """Make HU as a scanner gives them of values without noise.

    Parameters
    ----------
    clean : ndarray, shape (slices, rows, columns)
        HU with table and metal.
    planes : Planes
    kernel : Kernel
    noise : Noise
    sigma : float
        Noise in the middle of the body, HU.
    spacing : float
        Of pixels, mm.
    first : int
        Index of the first slice, for the noise.

    Returns
    -------
    ndarray of int16
    """
    found = blurred(clean, spacing, kernel.blur, kernel.boost)
    weight = body_map(planes) * np.float32(sigma)
    for k in range(len(found)):
        found[k] += weight[k] * noise.slice(first + k)
    return np.clip(np.rint(found), *HU_RANGE).astype(np.int16)
