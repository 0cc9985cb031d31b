"""Draw an anatomy on the planes of a scan: values without noise, and labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kakehashi.store.synthetic.chance import generator
from kakehashi.store.synthetic.tissue import TISSUES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from kakehashi.store.synthetic.shapes import Anatomy, Organ

    Floats = NDArray[np.float32]
    Labels = NDArray[np.uint8]

_MARGIN = 3.0


@dataclass(frozen=True, slots=True)
class Lesion:
    """An ellipsoid in an organ.

    Attributes
    ----------
    organ : str
        In which it lies, whole.
    tissue : str
    centre : tuple of float
        Phantom mm: this person's size, before the place on the table.
    radii : tuple of float
        (x, y, z), mm.
    """

    organ: str
    tissue: str
    centre: tuple[float, float, float]
    radii: tuple[float, float, float]

    @property
    def volume_ml(self) -> float:
        """Volume, exact."""
        return 4 / 3 * math.pi * math.prod(self.radii) / 1000


@dataclass(frozen=True, slots=True)
class Metal:
    """A rod of metal along z.

    Attributes
    ----------
    centre : tuple of float
        Phantom mm.
    radius, half_length : float
        mm
    """

    centre: tuple[float, float, float]
    radius: float
    half_length: float


@dataclass(frozen=True)
class Body:
    """A person as drawn.

    Attributes
    ----------
    key : str
        What the textures depend on.
    anatomy : Anatomy
    lesions : tuple of Lesion
    metal : tuple of Metal
    shift : mapping
        By how many HU each tissue differs from the table.
    """

    key: str
    anatomy: Anatomy
    lesions: tuple[Lesion, ...]
    metal: tuple[Metal, ...]
    shift: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Planes:
    """Voxel centres in phantom coordinates, with rows along x.

    Attributes
    ----------
    x : ndarray, shape (columns,)
    y, z : ndarray, shape (slices, rows)
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    z: NDArray[np.float64]


class Texture:
    """Smooth random fields fixed to the body: cubic B-splines on coarse random nodes.

    Parameters
    ----------
    key : str
    pitch : float
        Distance of the nodes, phantom mm.
    low, high : sequence of float
        Corners of the box that they fill; beyond it, the field repeats.
    """

    def __init__(self, key: str, pitch: float, low: Sequence[float], high: Sequence[float]) -> None:
        self._pitch = pitch
        self._low = low
        counts = [math.ceil((b - a) / pitch) + 4 for a, b in zip(low, high, strict=True)]
        nodes = generator("texture", key, pitch).standard_normal(counts[::-1], dtype=np.float32)
        # Weights of a cubic B-spline keep 0.479 of the variance along each axis.
        self._nodes = nodes / np.float32(0.479**1.5)

    def sample(self, planes: Planes) -> Floats:
        """Return the field, mean 0 and standard deviation about 1, shape (slices, rows, columns).

        First along y and z for whole lines of nodes, then along x. No matrix product: its
        last bits would depend on the machine, and its threads disturb other work.
        """
        depth, rows, columns = self._nodes.shape
        at_y, weight_y = self._taps(planes.y.ravel(), 1, rows)
        at_z, weight_z = self._taps(planes.z.ravel(), 2, depth)
        lines = np.zeros((planes.y.size, columns), np.float32)
        for a in range(4):
            for b in range(4):
                weight = (weight_z[a] * weight_y[b])[:, None]
                lines += weight * self._nodes[at_z[a], at_y[b]]
        at_x, weight_x = self._taps(planes.x, 0, columns)
        found = lines[:, at_x[0]] * weight_x[0]
        for a in range(1, 4):
            part = lines[:, at_x[a]]
            part *= weight_x[a]
            found += part
        return found.reshape(*planes.y.shape, len(planes.x))

    def _taps(
        self, places: NDArray[np.float64], axis: int, count: int
    ) -> tuple[list[NDArray[np.intp]], list[Floats]]:
        scaled = (places - self._low[axis]) / self._pitch + 1
        whole = np.floor(scaled)
        t = (scaled - whole).astype(np.float32)
        weights: list[Floats] = [
            weight.astype(np.float32)
            for weight in (
                (1 - t) ** 3 / 6,
                (3 * t**3 - 6 * t**2 + 4) / 6,
                (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6,
                t**3 / 6,
            )
        ]
        first = whole.astype(np.intp) - 1
        return [(first + tap) % count for tap in range(4)], weights


class Renderer:
    """Draws one body; keeps its textures.

    Parameters
    ----------
    body : Body
    """

    def __init__(self, body: Body) -> None:
        self._body = body
        (front, back), (bottom, top) = body.anatomy.extent
        scale = body.anatomy.scale
        low = [-220 * scale[0], (front - 60) * scale[1], (bottom - 60) * scale[2]]
        high = [220 * scale[0], (back + 60) * scale[1], (top + 60) * scale[2]]
        self._soft = Texture(f"{body.key}/soft", 5.0, low, high)
        self._vessels = [Texture(f"{body.key}/vessel{n}", 11.0, low, high) for n in (0, 1)]
        self._loops = Texture(f"{body.key}/loops", 17.0, low, high)

    def back(self) -> float:
        """Return how far the body reaches to the back, phantom mm."""
        (_, _), (bottom, top) = self._body.anatomy.extent
        y, z = np.meshgrid(np.arange(0.0, 200), np.arange(bottom, top, 20), indexing="ij")
        for organ, (low, high) in self._body.anatomy.intervals(y, z):
            if organ.name == "body":
                return float(y[low < high].max()) * self._body.anatomy.scale[1]
        raise LookupError("an anatomy without a body")

    def labels(self, planes: Planes) -> Labels:
        """Return the true label of each voxel, by its centre; lesions follow the organs."""
        found = np.zeros((*planes.y.shape, len(planes.x)), np.uint8)
        for organ, low, high in self._organs(planes):
            if box := _box(planes.x, low, high):
                k, j, i = box
                # What has no label of its own takes away that of what it covers.
                label = self._body.anatomy.labels.get(organ.name, 0)
                found[box][_inside(planes.x[i], low[k, j], high[k, j])] = label
        first = len(self._body.anatomy.labels) + 1
        for label, lesion in enumerate(self._body.lesions, first):
            low, high = _ellipsoid(lesion, planes)
            if box := _box(planes.x, low, high):
                k, j, i = box
                found[box][_inside(planes.x[i], low[k, j], high[k, j])] = label
        return found

    def draw(self, planes: Planes, values: Mapping[str, float], *, texture: bool = True) -> Floats:
        """Draw the body.

        Parameters
        ----------
        planes : Planes
        values : mapping
            Value of each tissue.
        texture : bool
            Whether tissues vary within, as HU; without it, lung vessels and bowel are left out.

        Returns
        -------
        ndarray of float32, shape (slices, rows, columns)
        """
        field = np.full((*planes.y.shape, len(planes.x)), values["air"], np.float32)
        soft = self._soft.sample(planes) if texture else np.zeros((1, 1, 1), np.float32)
        edge = max(0.6, 0.8 * abs(float(planes.x[1] - planes.x[0])))
        for organ, low, high in self._organs(planes):
            box = _box(planes.x, low, high)
            if box is None or organ.tissue == "none":
                continue
            k, j, i = box
            part = Planes(planes.x[i], planes.y[k, j], planes.z[k, j])
            wave = soft[box] if texture else soft
            pieces = [(organ.tissue, 0.0)]
            if organ.core:
                pieces.append((organ.core[1], organ.core[0] * self._body.anatomy.scale[0]))
            for tissue, depth in pieces:
                value = self._values(tissue, part, values, wave, texture=texture)
                _paint(
                    field[box],
                    part.x,
                    low[k, j] + depth,
                    high[k, j] - depth,
                    value=value,
                    edge=edge,
                )
        for lesion in self._body.lesions:
            low, high = _ellipsoid(lesion, planes)
            if box := _box(planes.x, low, high):
                k, j, i = box
                wave = soft[box] if texture else soft
                amount = np.float32(TISSUES[lesion.tissue].texture)
                value = np.float32(values[lesion.tissue]) + amount * wave
                _paint(field[box], planes.x[i], low[k, j], high[k, j], value=value, edge=edge)
        return field

    def _organs(
        self, planes: Planes
    ) -> list[tuple[Organ, NDArray[np.float64], NDArray[np.float64]]]:
        sx, sy, sz = self._body.anatomy.scale
        return [
            (organ, low * sx, high * sx)
            for organ, (low, high) in self._body.anatomy.intervals(planes.y / sy, planes.z / sz)
        ]

    def _values(
        self,
        tissue: str,
        part: Planes,
        values: Mapping[str, float],
        soft: Floats,
        *,
        texture: bool,
    ) -> Floats:
        about = TISSUES[tissue]
        value = np.float32(values[tissue]) + np.float32(about.texture) * soft
        if tissue.startswith("vertebra"):
            # Discs between the vertebrae, every 30 mm.
            height = part.z / self._body.anatomy.scale[2] / 30 % 1
            disc = (np.abs(height - 0.5) < 0.14)[..., None]
            value = np.where(disc, np.float32(values["disc"]), value)
        elif tissue == "stomach":
            gas = (part.y < part.y.mean() - 0.55 * np.ptp(part.y) / 2)[..., None]
            value = np.where(gas, np.float32(values["air"]), value)
        elif about.kind == "lung" and texture:
            # Where two smooth fields are both near zero: a net of threads.
            first, second = (field.sample(part) for field in self._vessels)
            thread = np.exp(-(first * first + second * second) * np.float32(24))
            depth = (part.y / (100 * self._body.anatomy.scale[1])).astype(np.float32)
            value = value + np.float32(620) * thread + (depth * 28)[..., None]
        elif about.kind == "bowel" and texture:
            value = self._bowel(part, values, value)
        return np.asarray(value, np.float32)

    def _bowel(self, part: Planes, values: Mapping[str, float], fat: Floats) -> Floats:
        loops = self._loops.sample(part)
        scale = self._body.anatomy.scale
        height = part.z / scale[2]
        free = ((height < -105) & (part.y < 35 * scale[1]))[..., None]
        found = np.where(free & (loops > 0.35), np.float32(values["stool"]), fat)
        return np.where(free & (loops > 1.5), np.float32(values["air"] * 0.9), found)


def _ellipsoid(lesion: Lesion, planes: Planes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    cx, cy, cz = lesion.centre
    rx, ry, rz = lesion.radii
    left = 1 - ((planes.y - cy) / ry) ** 2 - ((planes.z - cz) / rz) ** 2
    half = np.where(left > 0, rx * np.sqrt(np.clip(left, 0, None)), -1e6)
    return cx - half, cx + half


def _box(
    x: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]
) -> tuple[slice, slice, slice] | None:
    """Return the slices, rows and columns that hold an organ, None if there is nothing."""
    hit = low < high
    if not hit.any():
        return None
    k = np.flatnonzero(hit.any(axis=1))
    j = np.flatnonzero(hit.any(axis=0))
    near, far = low[hit].min() - _MARGIN, high[hit].max() + _MARGIN
    i = np.flatnonzero((x >= near) & (x <= far))
    if not len(i):
        return None
    return slice(k[0], k[-1] + 1), slice(j[0], j[-1] + 1), slice(i[0], i[-1] + 1)


def _inside(
    x: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]
) -> NDArray[np.bool_]:
    return (x >= low[..., None]) & (x <= high[..., None])


def _paint(
    target: Floats,
    x: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    *,
    value: Floats,
    edge: float,
) -> None:
    """Blend a value in, with edges one edge wide (mm) along x."""
    middle = ((low + high) / 2).astype(np.float32)[..., None]
    half = ((high - low) / 2 / edge + 0.5).astype(np.float32)[..., None]
    share = np.abs(x.astype(np.float32) - middle)
    share *= np.float32(-1 / edge)
    share += half
    np.clip(share, 0, 1, out=share)
    target += share * (value - target)
