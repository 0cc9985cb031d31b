"""Put lesions into organs, so that each lies whole in one and apart from the others."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from kakehashi.store.synthetic.render import Lesion

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

    from kakehashi.store.synthetic.shapes import Anatomy

_TRIES = 200
_MARGIN_MM = 2.0


def place(
    rng: Random, anatomy: Anatomy, wanted: Sequence[tuple[str, str, float]]
) -> tuple[Lesion, ...]:
    """Place lesions.

    Parameters
    ----------
    rng : Random
    anatomy : Anatomy
    wanted : sequence of (organ, tissue, diameter in mm)

    Returns
    -------
    tuple of Lesion
        In the order wanted; each is smaller by steps of a fifth where the organ is too small.
    """
    found: list[Lesion] = []
    for organ, tissue, diameter in wanted:
        while (lesion := _try(rng, anatomy, found, (organ, tissue, diameter))) is None:
            diameter *= 0.8  # noqa: PLW2901 # it ends: some point of an organ has room
        found.append(lesion)
    return tuple(found)


def _try(
    rng: Random,
    anatomy: Anatomy,
    others: Sequence[Lesion],
    wanted: tuple[str, str, float],
) -> Lesion | None:
    organ, tissue, diameter = wanted
    sx, sy, sz = anatomy.scale
    (front, back), (bottom, top) = anatomy.extent
    flat = rng.uniform(0.8, 1.0)
    radii = (diameter / 2, diameter / 2 * flat, diameter / 2 / math.sqrt(flat))
    reach = [radius + _MARGIN_MM for radius in radii]
    y = np.arange(front, back, 4.0)
    z = np.arange(bottom, top, 4.0)
    plane_z, plane_y = np.meshgrid(z, y, indexing="ij")
    drawn = list(anatomy.intervals(plane_y, plane_z))
    names = [about.name for about, _ in drawn]
    low, high = drawn[names.index(organ)][1]
    room = np.argwhere(high - low > 2 * reach[0] / sx)
    if not len(room):
        return None
    after = [interval for _, interval in drawn[names.index(organ) + 1 :]]
    for _ in range(_TRIES):
        k, j = room[rng.randrange(len(room))]
        x = rng.uniform(low[k, j] + reach[0] / sx, high[k, j] - reach[0] / sx)
        centre = (float(x) * sx, float(plane_y[k, j]) * sy, float(plane_z[k, j]) * sz)
        # The lines that pass through the lesion, with a margin.
        near = ((plane_y * sy - centre[1]) / reach[1]) ** 2 + (
            (plane_z * sz - centre[2]) / reach[2]
        ) ** 2
        lines = near <= 1
        half = reach[0] * np.sqrt(1 - near[lines])
        start, end = (centre[0] - half) / sx, (centre[0] + half) / sx
        inside = bool(((low[lines] <= start) & (high[lines] >= end)).all())
        covered = any(bool(((a[lines] < end) & (b[lines] > start)).any()) for a, b in after)
        apart = all(
            math.dist(centre, other.centre) > max(radii) + max(other.radii) + _MARGIN_MM
            for other in others
        )
        if inside and not covered and apart:
            return Lesion(organ, tissue, centre, radii)
    return None
