"""Keep the volumes of one series apart: phases, b-values, echoes, each on a grid of its own.

A series whose slices lie on one grid is one volume, whatever else differs. Otherwise slices of
other matrices, pixel spacings and orientations are parted first. Where positions still repeat,
the attributes of :mod:`kakehashi.store.traits` are tried in their order, then two of them at a
time, then three. A division holds if each part is one regular grid, there are just as many parts
as there are slices at the position that has most of them, and none is a lone slice beside larger
parts. So an attribute that happens to differ from slice to slice never makes volumes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kakehashi.errors import PackError
from kakehashi.imaging.geometry import (
    ORIENTATION_TOLERANCE,
    PIXEL_SPACING_TOLERANCE,
    Grid,
    grid_of_planes,
    places_of,
)
from kakehashi.store.dicom import planes_of, scopes_of
from kakehashi.store.frames import PixelFormat, pixel_format_of
from kakehashi.store.traits import TRAITS, Trait, dimensions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from kakehashi.store.dicom import Instance, Plane

_MOST_TRAITS = 3


@dataclass(frozen=True, slots=True)
class Label:
    """What makes a volume another one than the rest of its series.

    Attributes
    ----------
    by : str
        E.g. ``b-value``.
    value : object
        A number, a text, a list of numbers, or None where the slices have no such attribute.
    """

    by: str
    value: Any


@dataclass(frozen=True, slots=True)
class Volume:
    """Slices that lie on one grid.

    Attributes
    ----------
    label : tuple of Label
        Empty if the series is one volume.
    planes : tuple of Plane
        In slice order.
    grid : Grid
    pixels : PixelFormat
    """

    label: tuple[Label, ...]
    planes: tuple[Plane, ...]
    grid: Grid
    pixels: PixelFormat

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of (slices, rows, columns)."""
        return len(self.planes), self.pixels.rows, self.pixels.columns

    @property
    def unit(self) -> str:
        """Unit of the rescaled values."""
        return self.planes[0].unit


def divide(instances: Sequence[Instance]) -> list[Volume]:
    """Find the volumes of a series.

    Parameters
    ----------
    instances : sequence of Instance
        All images of one series. Their order may decide nothing but which of two equal ones
        comes first; give them in an order of their own.

    Returns
    -------
    list of Volume
        At least one, ordered by the values that tell them apart.

    Raises
    ------
    PackError
        They are not one grid, and no attribute makes them several; the message says why.
    """
    series = _Series(instances)
    try:
        return [series.one(series.planes, ())]
    except PackError as error:
        whole = str(error)
    kinds = list(series.by_shape())
    volumes = []
    for label, members in kinds:
        try:
            volumes += series.apart(members, label)
        except PackError as error:
            if len(kinds) == 1:
                raise
            raise PackError(f"{whole}; of those that go together by {_said(label)}: {error}") from (
                error
            )
    if lone := _lone(volumes):
        raise PackError(f"{whole}; {lone}")
    return volumes


class _Series:
    """The planes of a series and what is known of them."""

    def __init__(self, instances: Sequence[Instance]) -> None:
        self._instances = instances
        self._formats = [pixel_format_of(instance.dataset) for instance in instances]
        self.planes = [
            plane
            for index, instance in enumerate(instances)
            for plane in planes_of(index, instance.dataset)
        ]

    def one(self, planes: Sequence[Plane], label: tuple[Label, ...]) -> Volume:
        """Take planes as one volume, or say why they are none."""
        formats = {self._formats[plane.instance] for plane in planes}
        if len(formats) > 1:
            kinds = sorted(
                f"{f.columns}x{f.rows} {f.dtype} ({f.bits_stored} bits)" for f in formats
            )
            raise PackError(f"mixed images in one series: {'; '.join(kinds)}")
        grid = grid_of_planes(
            [plane.position for plane in planes],
            [plane.orientation for plane in planes],
            [plane.spacing for plane in planes],
            planes[0].thickness,
        )
        units = {plane.unit for plane in planes}
        if len(units) > 1:
            raise PackError(f"mixed units in one series: {', '.join(sorted(units))}")
        in_order = tuple(planes[index] for index in grid.order)
        return Volume(label=label, planes=in_order, grid=grid, pixels=formats.pop())

    def by_shape(self) -> Iterator[tuple[tuple[Label, ...], list[Plane]]]:
        """Part planes that can never be one grid."""
        planes = self.planes
        sizes = [self._formats[plane.instance] for plane in planes]
        columns: dict[str, tuple[Sequence[Sequence[float]], float]] = {
            "matrix": ([(f.rows, f.columns) for f in sizes], 0.0),
            "pixel spacing": ([plane.spacing for plane in planes], PIXEL_SPACING_TOLERANCE),
            "orientation": ([plane.orientation for plane in planes], ORIENTATION_TOLERANCE),
        }
        found = {name: _near(values, within) for name, (values, within) in columns.items()}
        differing = {name: codes for name, codes in found.items() if codes.max() > 0}
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, key in enumerate(zip(*found.values(), strict=True)):
            groups.setdefault(tuple(int(code) for code in key), []).append(index)
        for _, members in sorted(groups.items()):
            label = tuple(Label(name, list(columns[name][0][members[0]])) for name in differing)
            yield label, [planes[index] for index in members]

    def apart(self, planes: list[Plane], label: tuple[Label, ...]) -> list[Volume]:
        """Part planes of one shape into volumes by what tells them apart."""
        try:
            return [self.one(planes, label)]
        except PackError as error:
            reason = str(error)
        places = places_of([plane.position for plane in planes], planes[0].orientation)
        most = int(np.bincount(places).max())
        if most == 1:
            raise PackError(reason)
        traits = self._differing(planes)
        nearest = ""
        for tried in _combinations(list(traits)):
            keys = _keys(tried, traits, places)
            if keys is None or len(set(keys)) != most:
                continue
            try:
                volumes = self._parts(planes, keys, tried, label)
                failure = _lone(volumes)
            except PackError as error:
                failure = str(error)
            if failure is None:
                return volumes
            names = " and ".join(trait.name for trait in tried)
            nearest = nearest or f"; parted by {names} they are no volumes either: {failure}"
        if not nearest:
            names = ", ".join(dict.fromkeys(trait.name for trait in traits))
            nearest = f"; what differs ({names or 'nothing'}) does not part them into {most}"
        raise PackError(f"{reason}{self._copies(planes, places)}{nearest}")

    def _differing(self, planes: list[Plane]) -> dict[Trait, list[Any]]:
        """Return the attributes whose values are not all the same, with the values."""
        scopes = []
        for plane in planes:
            dataset = self._instances[plane.instance].dataset
            found = scopes_of(dataset, plane.frame)
            scopes.append(found if found[-1] is dataset else [*found, dataset])
        members = dict.fromkeys(plane.instance for plane in planes)
        every = (*TRAITS, *dimensions(self._instances[index].dataset for index in members))
        values = {trait: [trait.read(places) for places in scopes] for trait in every}
        return {trait: found for trait, found in values.items() if len(set(found)) > 1}

    def _parts(
        self,
        planes: list[Plane],
        keys: list[tuple[Any, ...]],
        tried: tuple[Trait, ...],
        label: tuple[Label, ...],
    ) -> list[Volume]:
        groups: dict[tuple[Any, ...], list[Plane]] = {}
        for key, plane in zip(keys, planes, strict=True):
            groups.setdefault(key, []).append(plane)
        volumes = []
        for key in sorted(groups, key=_sortable):
            values = [list(value) if isinstance(value, tuple) else value for value in key]
            own = [Label(trait.name, value) for trait, value in zip(tried, values, strict=True)]
            volumes.append(self.one(groups[key], (*label, *own)))
        return volumes

    def _copies(self, planes: list[Plane], places: NDArray[np.intp]) -> str:
        """Say of slices at one position whether their pixels are the same."""
        if len({plane.instance for plane in planes}) < len(planes):
            return ""  # frames of one image
        contents = Counter(
            (int(place), _hash(self._instances[plane.instance].pixel_bytes()))
            for place, plane in zip(places, planes, strict=True)
        )
        same, repeated = len(planes) - len(contents), len(planes) - len(set(places.tolist()))
        return f"; {same} of these {repeated} have the same pixels as another slice there"


def _combinations(traits: list[Trait]) -> Iterator[tuple[Trait, ...]]:
    """Yield what to try: few attributes before many, at most one ranked one, which is last."""
    plain = [trait for trait in traits if not trait.ranked]
    ranked = [trait for trait in traits if trait.ranked]
    names = {trait.name for trait in plain}
    for count in range(1, _MOST_TRAITS + 1):
        for tried in itertools.chain(
            itertools.combinations(plain, count),
            ((*some, last) for last in ranked for some in itertools.combinations(plain, count - 1)),
        ):
            chosen = {trait.name for trait in tried}
            if len(chosen) == len(tried) and all(
                trait.needs not in names or trait.needs in chosen for trait in tried
            ):
                yield tried


def _keys(
    tried: tuple[Trait, ...], values: dict[Trait, list[Any]], places: NDArray[np.intp]
) -> list[tuple[Any, ...]] | None:
    """Return, for each plane, the values that its volume has, None if they cannot tell."""
    if not tried[-1].ranked:
        return list(zip(*(values[trait] for trait in tried), strict=True))
    *plain, last = tried
    before = [tuple(values[trait][index] for trait in plain) for index in range(len(places))]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, key in enumerate(before):
        groups.setdefault(key, []).append(index)
    keys: list[tuple[Any, ...]] = [()] * len(places)
    for key, members in groups.items():
        ranks = _ranks([values[last][index] for index in members], places[members])
        if ranks is None:
            return None
        spans: dict[int, list[Any]] = {}
        for rank, index in zip(ranks, members, strict=True):
            spans.setdefault(rank, []).append(values[last][index])
        firsts = [min(spans[rank]) for rank in range(len(spans))]
        ends = [max(spans[rank]) for rank in range(len(spans))]
        if last.clock and any(end > begin for end, begin in zip(ends, firsts[1:], strict=False)):
            return None
        for rank, index in zip(ranks, members, strict=True):
            keys[index] = (*key, firsts[rank])
    return keys


def _ranks(values: list[Any], places: NDArray[np.intp]) -> list[int] | None:
    """Rank the slices at each position by their value, None unless all have equally many."""
    if any(value is None for value in values):
        return None
    at: dict[int, list[int]] = {}
    for index, place in enumerate(places.tolist()):
        at.setdefault(place, []).append(index)
    if len({len(members) for members in at.values()}) > 1:
        return None
    ranks = [0] * len(values)
    for members in at.values():
        members.sort(key=lambda index: values[index])
        if len({values[index] for index in members}) < len(members):
            return None
        for rank, index in enumerate(members):
            ranks[index] = rank
    return ranks


def _near(values: Sequence[Sequence[float]], within: float) -> NDArray[np.intp]:
    """Give near rows the same number; numbers ascend with the rows."""
    rows, inverse = np.unique(
        np.asarray(values, dtype=np.float64) + 0.0, axis=0, return_inverse=True
    )
    codes = np.full(len(rows), -1, dtype=np.intp)
    count = 0
    while (left := np.flatnonzero(codes < 0)).size:
        near = np.abs(rows[left] - rows[left[0]]).max(axis=1) <= within
        codes[left[near]] = count
        count += 1
    return codes[inverse.reshape(-1)]


def _hash(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _sortable(key: tuple[Any, ...]) -> tuple[tuple[bool, Any], ...]:
    return tuple((value is not None, value if value is not None else 0) for value in key)


def _lone(volumes: list[Volume]) -> str | None:
    """Say which slice is left alone beside larger volumes, None if there is none."""
    sizes = [len(volume.planes) for volume in volumes]
    if not min(sizes) == 1 < max(sizes):
        return None
    lone = volumes[sizes.index(1)]
    x, y, z = lone.planes[0].position
    return (
        f"a lone slice at ({x:.1f}, {y:.1f}, {z:.1f}) mm, {_said(lone.label)}, is no volume "
        f"beside one of {max(sizes)} slices"
    )


def _said(label: tuple[Label, ...]) -> str:
    def value(part: Any) -> str:
        if isinstance(part, list):
            return "[" + ", ".join(f"{number:g}" for number in part) + "]"
        return "none" if part is None else f"{part:g}" if isinstance(part, float) else str(part)

    return ", ".join(f"{part.by} {value(part.value)}" for part in label)
