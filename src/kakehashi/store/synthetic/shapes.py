"""Bodies whose every line along x is one interval, so that volumes are sums over a plane.

A shape gives, for any (y, z), where a line along x enters and leaves it. That makes shapes easy
to cut where they meet (the lung yields to the heart), quick to draw, and their volume a plain
integral over y and z that needs no image grid. Reference coordinates are those of an average
adult in mm, LPS: x to the left, y to the back, z to the head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    Plane = NDArray[np.float64]
    Interval = tuple[Plane, Plane]

FAR = 1e6
"""Where a line that misses a shape enters it; it leaves at minus this."""


class Shape(Protocol):
    """Something that a line along x crosses at most once."""

    def interval(self, y: Plane, z: Plane) -> Interval:
        """Return where lines along x enter and leave; ``FAR, -FAR`` for those that miss."""


@dataclass(frozen=True, slots=True)
class Blob:
    """A superellipsoid that leans, bends and ripples.

    Attributes
    ----------
    centre, radii : tuple of float
        (x, y, z), mm. An infinite radius in z is a column.
    powers : tuple of float
        Exponents of (x, y, z): 2 is an ellipsoid, more is boxier.
    lean : tuple of float
        How much x moves per y, x per z, and y per z.
    bend : tuple of float
        The same by the square of the distance from the centre, per mm.
    ripple : tuple of float
        Part by which the width changes along y and z, and the wavelength in mm.
    bottom, top : float
        Where a column ends.
    """

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    powers: tuple[float, float, float] = (2.0, 2.0, 2.0)
    lean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    bend: tuple[float, float, float] = (0.0, 0.0, 0.0)
    ripple: tuple[float, float] = (0.0, 40.0)
    bottom: float = -math.inf
    top: float = math.inf

    def interval(self, y: Plane, z: Plane) -> Interval:
        """Return where lines along x enter and leave."""
        cx, cy, cz = self.centre
        rx, ry, rz = self.radii
        a, b, c = self.powers
        up = z - cz
        back = y - cy - self.lean[2] * up - self.bend[2] * up**2
        used = np.abs(back / ry) ** b
        if math.isfinite(rz):
            used = used + np.abs(up / rz) ** c
        half = rx * np.clip(1 - used, 0, None) ** (1 / a)
        amount, wave = self.ripple
        if amount:
            turn = 2 * math.pi / wave
            half = half * (1 + amount * np.sin(turn * up + cx) * np.cos(turn * back + cz))
        middle = (
            cx
            + self.lean[0] * back
            + self.lean[1] * up
            + self.bend[0] * back**2
            + self.bend[1] * up**2
        )
        hit = (used < 1) & (z >= self.bottom) & (z <= self.top)
        return np.where(hit, middle - half, FAR), np.where(hit, middle + half, -FAR)


@dataclass(frozen=True, slots=True)
class Outline:
    """An upright body whose width and depth change along z, less a layer.

    Attributes
    ----------
    z, width, depth : tuple of float
        Half width and half depth at heights, mm; straight lines in between.
    layer : tuple of float
        Thickness to take off at the same heights, mm (negative: to add).
    power : float
        Exponent of the cross-section.
    top : float
    """

    z: tuple[float, ...]
    width: tuple[float, ...]
    depth: tuple[float, ...]
    layer: tuple[float, ...]
    power: float = 2.5
    top: float = math.inf

    def interval(self, y: Plane, z: Plane) -> Interval:
        """Return where lines along x enter and leave."""
        layer = np.interp(z, self.z, self.layer)
        width = np.interp(z, self.z, self.width) - layer
        depth = np.interp(z, self.z, self.depth) - layer
        used = np.abs(y / depth) ** self.power
        half = width * np.clip(1 - used, 0, None) ** (1 / self.power)
        hit = (used < 1) & (z <= self.top)
        return np.where(hit, -half, FAR), np.where(hit, half, -FAR)


@dataclass(frozen=True, slots=True)
class Ribs:
    """One side's ribs: what lies between two outlines, every so many mm, sloping down in front.

    Attributes
    ----------
    outer, inner : Outline
    side : int
        -1 for the patient's right, 1 for the left.
    bottom, top : float
    """

    outer: Outline
    inner: Outline
    side: int
    bottom: float
    top: float

    def interval(self, y: Plane, z: Plane) -> Interval:
        """Return where lines along x enter and leave."""
        _, outer = self.outer.interval(y, z)
        _, inner = self.inner.interval(y, z)
        place = (z - 0.45 * y) / 26 % 1
        rib = (np.abs(place - 0.5) < 0.19) & (z > self.bottom) & (z < self.top) & (outer > 0)
        near = np.where(inner > 0, inner, 0.0)
        low, high = (near, outer) if self.side > 0 else (-outer, -near)
        # Behind, ribs end at the spine; in front, at the cartilage.
        free = np.maximum(np.abs(near), 14.0) < outer
        hit = rib & free
        return np.where(hit, low, FAR), np.where(hit, high, -FAR)


@dataclass(frozen=True, slots=True)
class Organ:
    """A part of the body.

    Attributes
    ----------
    name : str
    shapes : tuple of Shape
        Their union, where a line's intervals are joined.
    tissue : str
        Name in the tables of HU and MR signal.
    counted : bool
        It has a label and a known volume.
    yields_to : tuple of str
        Organs earlier in the list that cut it off.
    within : str, optional
        An organ earlier in the list that it does not leave.
    gap : float
        Distance kept from those, mm.
    core : tuple of float and str, optional
        Depth along x (mm) under which another tissue begins, and that tissue.
    side : int
        -1 for only what lies to the patient's right of the midline, 1 to the left, 0 for all.
    """

    name: str
    shapes: tuple[Shape, ...]
    tissue: str
    counted: bool = False
    yields_to: tuple[str, ...] = ()
    within: str | None = None
    gap: float = 2.0
    core: tuple[float, str] | None = None
    side: int = 0


@dataclass(frozen=True)
class Anatomy:
    """Organs in the order in which they are drawn.

    Attributes
    ----------
    organs : tuple of Organ
    scale : tuple of float
        This person's size over the reference's in (x, y, z).
    extent : tuple of tuple of float
        (lowest, highest) y and z that hold all counted organs, reference mm.
    """

    organs: tuple[Organ, ...]
    scale: tuple[float, float, float]
    extent: tuple[tuple[float, float], tuple[float, float]]
    _labels: dict[str, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        counted = [organ.name for organ in self.organs if organ.counted]
        self._labels.update({name: index for index, name in enumerate(counted, 1)})

    @property
    def labels(self) -> Mapping[str, int]:
        """Label of each counted organ, from 1."""
        return self._labels

    def intervals(self, y: Plane, z: Plane) -> Iterator[tuple[Organ, Interval]]:
        """Give each organ with where lines along x enter and leave it.

        Parameters
        ----------
        y, z : ndarray, the same shape
            Reference mm.
        """
        done: dict[str, Interval] = {}
        for organ in self.organs:
            low, high = _union(organ, y, z)
            if organ.within:
                outer = done[organ.within]
                low = np.maximum(low, outer[0] + organ.gap)
                high = np.minimum(high, outer[1] - organ.gap)
            if organ.side < 0:
                high = np.minimum(high, -organ.gap)
            elif organ.side > 0:
                low = np.maximum(low, organ.gap)
            for name in organ.yields_to:
                low, high = _cut(low, high, *done[name], organ.gap)
            # What is thinner than a sheet of paper is nothing.
            gone = high - low < 0.2
            low, high = np.where(gone, FAR, low), np.where(gone, -FAR, high)
            done[organ.name] = low, high
            yield organ, (low, high)

    def volumes_ml(self, step: float = 1.0) -> dict[str, float]:
        """Integrate each counted organ over y and z, less what is drawn over it.

        Parameters
        ----------
        step : float
            Distance of the sampled lines, reference mm; halving it changes organs of 100 ml
            by less than 0.1 %.
        """
        (front, back), (bottom, top) = self.extent
        y = np.arange(front + step / 2, back, step)
        z = np.arange(bottom + step / 2, top, step)
        plane_z, plane_y = np.meshgrid(z, y, indexing="ij")
        factor = step * step * math.prod(self.scale) / 1000
        drawn = list(self.intervals(plane_y, plane_z))
        return {
            organ.name: float(_uncovered(interval, [i for _, i in drawn[place + 1 :]])) * factor
            for place, (organ, interval) in enumerate(drawn)
            if organ.counted
        }


def _uncovered(own: Interval, later: list[Interval]) -> float:
    """Return the summed length of intervals, less what later ones cover of them."""
    rows = np.flatnonzero((own[0] < own[1]).any(axis=1))
    if not len(rows):
        return 0.0
    box = slice(rows[0], rows[-1] + 1)
    low, high = own[0][box], own[1][box]
    whole = np.clip(high - low, 0, None)
    over = [(np.maximum(a[box], low), np.minimum(b[box], high)) for a, b in later]
    over = [(a, b) for a, b in over if (a < b).any()]
    if not over:
        return float(whole.sum())
    starts = np.stack([np.where(a < b, a, FAR) for a, b in over])
    ends = np.stack([np.where(a < b, b, FAR) for a, b in over])
    order = np.argsort(starts, axis=0)
    starts = np.take_along_axis(starts, order, axis=0)
    ends = np.maximum.accumulate(np.take_along_axis(ends, order, axis=0), axis=0)
    # Each covers what begins after the end of all before it.
    starts[1:] = np.maximum(starts[1:], ends[:-1])
    return float(whole.sum() - np.clip(ends - starts, 0, None).sum())


def _union(organ: Organ, y: Plane, z: Plane) -> Interval:
    low, high = organ.shapes[0].interval(y, z)
    for shape in organ.shapes[1:]:
        other_low, other_high = shape.interval(y, z)
        low, high = np.minimum(low, other_low), np.maximum(high, other_high)
    return low, high


def _cut(low: Plane, high: Plane, other_low: Plane, other_high: Plane, gap: float) -> Interval:
    """Take an interval's part on one side of another, the larger one."""
    meets = (low < other_high + gap) & (high > other_low - gap) & (other_low < other_high)
    before = np.minimum(high, other_low - gap)
    after = np.maximum(low, other_high + gap)
    left = before - low > high - after
    return (
        np.where(meets & ~left, after, low),
        np.where(meets & left, before, high),
    )
