"""From the attributes of image planes to one grid in patient coordinates.

Source: DICOM PS3.3 C.7.6.2 (Image Plane Module), equation C.7.6.2.1-1. Coordinates are
DICOM's patient coordinates (LPS: x to the patient's left, y to the back, z to the head),
in mm. An affine takes voxel indices (i, j, k, 1) = (column, row, slice, 1) to (x, y, z, 1);
arrays are indexed the other way round, [k, j, i].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kakehashi.errors import PackError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

ORTHONORMAL_TOLERANCE = 1e-3
"""How far the two direction cosines may be from unit length and from a right angle."""

ORIENTATION_TOLERANCE = 1e-4
"""How far direction cosines of two slices may differ: rounding of decimal strings, no more."""

PIXEL_SPACING_TOLERANCE = 1e-4
"""How far the pixel spacings of two slices may differ, in mm."""

POSITION_TOLERANCE = 0.05
"""How far a slice may lie from its place on the even grid, as a part of the slice spacing.

Scanners round positions where two bed positions of a PET meet (1.2 % seen)."""

STEP_TOLERANCE = 0.25
"""How far one step between slices may be from the median step, as a part of it: a missing
slice doubles one step, which the tolerance above would spread thin over a long series."""

EVEN_TOLERANCE_MM = 0.01
"""Deviation from the even grid above which a volume is flagged ``uneven-spacing``."""

SAME_POSITION_MM = 0.01
"""Two slices nearer than this along the normal are at the same position."""

TILT_TOLERANCE = 1e-3
"""Sine of the angle between slice step and normal above which the grid is ``tilted``."""

_NAMED = 4
"""How many positions an error names."""

MAIN_AXIS = 0.9
"""Least cosine between normal and body axis for axial, coronal or sagittal, else oblique."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A regular grid of voxels.

    Attributes
    ----------
    affine_lps : ndarray of float64, shape (4, 4)
        (i, j, k, 1) to mm in LPS.
    order : tuple of int
        ``order[k]`` is the index, among the planes given, of the plane that is slice k.
    spacing_mm : tuple of float
        Lengths of one step in (z, y, x) = (slice, row, column).
    flags : tuple of str
        ``tilted``, ``uneven-spacing``, ``single-slice``.
    """

    affine_lps: NDArray[np.float64]
    order: tuple[int, ...]
    spacing_mm: tuple[float, float, float]
    flags: tuple[str, ...]


def grid_of_planes(
    positions: ArrayLike,
    orientations: ArrayLike,
    pixel_spacings: ArrayLike,
    thickness: float | None,
) -> Grid:
    """Find the grid on which image planes lie.

    Parameters
    ----------
    positions : array_like, shape (n, 3)
        Image Position (Patient): the centre of the first voxel of each plane, mm.
    orientations : array_like, shape (n, 6)
        Image Orientation (Patient): direction of a row (growing column index), then of a
        column.
    pixel_spacings : array_like, shape (n, 2)
        Pixel Spacing: between rows, then between columns, mm.
    thickness : float or None
        Step to assume for a single plane, mm.

    Returns
    -------
    Grid
        Slices are sorted along the normal (row direction x column direction). The step in k
        runs from the first to the last position, so that it is exact for a tilted gantry,
        where it is not along the normal, and the rounding of single positions averages out.

    Raises
    ------
    PackError
        The planes are not on one grid; the message says why.
    """
    where = np.asarray(positions, dtype=np.float64).reshape(-1, 3)
    cosines = np.asarray(orientations, dtype=np.float64).reshape(-1, 6)
    spacings = np.asarray(pixel_spacings, dtype=np.float64).reshape(-1, 2)
    count = len(where)
    if count == 0 or len(cosines) != count or len(spacings) != count:
        raise PackError("no image planes, or not as many orientations as positions")
    if not (np.isfinite(where).all() and np.isfinite(cosines).all()):
        raise PackError("a position or orientation is not a finite number")
    row, column, normal = _directions(cosines)
    _check_spacings(spacings)

    depth = where @ normal
    order = np.argsort(depth, kind="stable")
    where, depth = where[order], depth[order]
    flags: list[str] = []
    if count == 1:
        if thickness is None or not np.isfinite(thickness) or thickness <= 0:
            raise PackError("a single slice without a thickness: no voxel size in z")
        step = normal * thickness
        flags.append("single-slice")
    else:
        _check_steps(depth)
        step = (where[-1] - where[0]) / (count - 1)
        even = where[0] + np.arange(count)[:, None] * step
        off = np.linalg.norm(where - even, axis=1)
        if off.max() > POSITION_TOLERANCE * np.linalg.norm(step):
            worst = int(off.argmax())
            raise PackError(
                f"positions are not on an even grid: slice {worst + 1} of {count} is "
                f"{off[worst]:.3f} mm from its place (at most "
                f"{POSITION_TOLERANCE:.0%} of the spacing is rounding)"
            )
        if off.max() > EVEN_TOLERANCE_MM:
            flags.append("uneven-spacing")
        if np.linalg.norm(np.cross(step, normal)) > TILT_TOLERANCE * np.linalg.norm(step):
            flags.append("tilted")

    affine = np.eye(4)
    affine[:3, 0] = row * spacings[0, 1]
    affine[:3, 1] = column * spacings[0, 0]
    affine[:3, 2] = step
    affine[:3, 3] = where[0]
    return Grid(
        affine_lps=affine,
        order=tuple(int(index) for index in order),
        spacing_mm=(
            float(np.linalg.norm(step)),
            float(spacings[0, 0]),
            float(spacings[0, 1]),
        ),
        flags=tuple(flags),
    )


def _directions(
    cosines: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    row, column = cosines[0, :3], cosines[0, 3:]
    lengths = np.linalg.norm([row, column], axis=1)
    if np.abs(lengths - 1).max() > ORTHONORMAL_TOLERANCE or (
        abs(float(row @ column)) > ORTHONORMAL_TOLERANCE
    ):
        raise PackError(
            f"image orientation {cosines[0].tolist()} is not two unit vectors at a right angle"
        )
    off = np.abs(cosines - cosines[0]).max(axis=1)
    if off.max() > ORIENTATION_TOLERANCE:
        other = int((off > ORIENTATION_TOLERANCE).sum())
        raise PackError(
            f"mixed orientations: {other} of {len(cosines)} slices are not parallel to the first"
        )
    normal = np.cross(row, column)
    return row, column, normal / np.linalg.norm(normal)


def _check_spacings(spacings: NDArray[np.float64]) -> None:
    if not np.isfinite(spacings).all() or spacings.min() <= 0:
        raise PackError("pixel spacing is not a positive number")
    if np.abs(spacings - spacings[0]).max() > PIXEL_SPACING_TOLERANCE:
        raise PackError(
            f"mixed pixel spacings: from {spacings.min():g} to {spacings.max():g} mm in one series"
        )


def _check_steps(depth: NDArray[np.float64]) -> None:
    steps = np.diff(depth)
    same = steps < SAME_POSITION_MM
    if same.any():
        raise PackError(
            f"several volumes or repeated slices: {same.sum()} of {len(depth)} slices are at the "
            f"position of another one, at {_listed(depth[1:][same])} along the normal"
        )
    usual = float(np.median(steps))
    off = np.flatnonzero(np.abs(steps - usual) > STEP_TOLERANCE * usual)
    if not len(off):
        return
    gaps = "; ".join(
        f"{steps[k]:.3f} mm between slices {k + 1} and {k + 2} of {len(depth)} "
        f"(at {depth[k]:.1f} and {depth[k + 1]:.1f} mm along the normal)"
        for k in off[:_NAMED]
    )
    more = f", and {len(off) - _NAMED} more" if len(off) > _NAMED else ""
    wide = steps[off] / usual
    whole = np.abs(wide - np.rint(wide)) <= STEP_TOLERANCE
    if whole.all() and (wide > 1).all():
        missing = int(np.rint(wide).sum()) - len(off)
        cause = "1 slice is missing" if missing == 1 else f"{missing} slices are missing"
    else:
        cause = "the steps are irregular; slices are missing or do not belong together"
    raise PackError(f"gap: {gaps}{more}, where {usual:.3f} mm are usual: {cause}")


def _listed(places: NDArray[np.float64]) -> str:
    """Name places, each once, and not too many of them."""
    once = list(dict.fromkeys(f"{place:.1f}" for place in places))
    more = f" and {len(once) - _NAMED} more" if len(once) > _NAMED else ""
    return f"{', '.join(once[:_NAMED])} mm{more}"


def places_of(positions: ArrayLike, orientation: ArrayLike) -> NDArray[np.intp]:
    """Give parallel planes the number of their place along the normal.

    Parameters
    ----------
    positions : array_like, shape (n, 3)
        Image Position (Patient), mm.
    orientation : array_like, shape (6,)
        Image Orientation (Patient) of all of them.

    Returns
    -------
    ndarray of int, shape (n,)
        Equal for planes that are nearer than `SAME_POSITION_MM` to their neighbour; from 0 on
        along the normal.

    Raises
    ------
    PackError
        The orientation is none.
    """
    *_, normal = _directions(np.asarray(orientation, dtype=np.float64).reshape(1, 6))
    depth = np.asarray(positions, dtype=np.float64).reshape(-1, 3) @ normal
    order = np.argsort(depth, kind="stable")
    places = np.empty(len(depth), dtype=np.intp)
    places[order] = np.cumsum(np.diff(depth[order], prepend=depth[order][:1]) >= SAME_POSITION_MM)
    return places


def orientation_of(affine_lps: NDArray[np.float64]) -> str:
    """Name the plane of the slices.

    Parameters
    ----------
    affine_lps : ndarray, shape (4, 4)

    Returns
    -------
    str
        ``axial``, ``coronal``, ``sagittal``, or ``oblique`` where the normal is more than
        26 degrees (cosine 0.9) from every body axis.
    """
    normal = np.cross(affine_lps[:3, 0], affine_lps[:3, 1])
    cosines = np.abs(normal) / np.linalg.norm(normal)
    axis = int(cosines.argmax())
    if cosines[axis] < MAIN_AXIS:
        return "oblique"
    return ("sagittal", "coronal", "axial")[axis]


def axial_angle(affine_lps: NDArray[np.float64]) -> float:
    """Return the angle between the slices' normal and the body's long axis, degrees, 0 to 90.

    Parameters
    ----------
    affine_lps : ndarray, shape (4, 4)
    """
    normal = np.cross(affine_lps[:3, 0], affine_lps[:3, 1])
    cosine = abs(float(normal[2])) / float(np.linalg.norm(normal))
    return float(np.degrees(np.arccos(min(1.0, cosine))))


def slice_distance(affine_lps: NDArray[np.float64]) -> float:
    """Return the distance of two neighbouring slices along their normal, mm.

    It is less than the step from one to the next where the gantry was tilted.

    Parameters
    ----------
    affine_lps : ndarray, shape (4, 4)
    """
    normal = np.cross(affine_lps[:3, 0], affine_lps[:3, 1])
    return abs(float(normal @ affine_lps[:3, 2])) / float(np.linalg.norm(normal))


def to_patient(affine_lps: NDArray[np.float64], indices: ArrayLike) -> NDArray[np.float64]:
    """Take voxel indices to patient coordinates.

    Parameters
    ----------
    affine_lps : ndarray, shape (4, 4)
    indices : array_like, shape (..., 3)
        (i, j, k) = (column, row, slice); fractions are allowed.

    Returns
    -------
    ndarray of float64, shape (..., 3)
        (x, y, z) in mm, LPS.
    """
    voxels = np.asarray(indices, dtype=np.float64)
    return np.asarray(voxels @ affine_lps[:3, :3].T + affine_lps[:3, 3])


def to_voxel(affine_lps: NDArray[np.float64], points: ArrayLike) -> NDArray[np.float64]:
    """Take patient coordinates to voxel indices; the inverse of :func:`to_patient`.

    Parameters
    ----------
    affine_lps : ndarray, shape (4, 4)
    points : array_like, shape (..., 3)
        (x, y, z) in mm, LPS.

    Returns
    -------
    ndarray of float64, shape (..., 3)
        (i, j, k); whole numbers are voxel centres.
    """
    shifted = np.asarray(points, dtype=np.float64) - affine_lps[:3, 3]
    return np.asarray(np.linalg.solve(affine_lps[:3, :3], shifted[..., None])[..., 0])
