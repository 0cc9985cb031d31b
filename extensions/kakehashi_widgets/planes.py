"""One plane of a packed series, rescaled, in the smallest type that holds it exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kakehashi.errors import StoreError
from kakehashi.imaging.ozip import LEVELS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kakehashi.imaging.ozip import Pack

AXES = ("z", "y", "x")
_INT16 = np.iinfo(np.int16)
# What CT is looked at first; other modalities have no fixed scale.
_SOFT_TISSUE = {"width": 400.0, "level": 40.0}
# The share of voxels that may be black or white at first sight, in percent.
_DARK_PERCENT, _BRIGHT_PERCENT = 1.0, 99.5


class OutOfRangeError(ValueError):
    """An axis, index or level that the series does not have."""


def read_plane(
    pack: Pack, axis: str, index: int, level: int = 0
) -> NDArray[np.int16] | NDArray[np.float32]:
    """Return one plane of rescaled values, e.g. in HU.

    Parameters
    ----------
    pack : Pack
        The opened series.
    axis : {"z", "y", "x"}
        The array axis that is held fast: z gives the slices as they were acquired.
    index : int
        Position on that axis, from 0, counted at `level`.
    level : int
        0 is full resolution; each further one is halved on each axis.

    Returns
    -------
    ndarray, 2-D
        For z: (rows, columns); for y: (slices, columns); for x: (slices, rows). Values are
        int16 where that is exact, else float32.

    Raises
    ------
    OutOfRangeError
        No such axis, index or level; the message says which there are.
    StoreError
        The pack's data cannot be decoded.
    """
    if axis not in AXES:
        raise OutOfRangeError(f"axis {axis!r} is not one of {', '.join(AXES)}")
    if not 0 <= level < LEVELS:
        raise OutOfRangeError(f"level {level} does not exist; there are 0 to {LEVELS - 1}")
    array = pack.array(level)
    fixed = AXES.index(axis)
    length = array.shape[fixed]
    if not 0 <= index < length:
        raise OutOfRangeError(
            f"index {index} on axis {axis} does not exist at level {level}; "
            f"there are 0 to {length - 1}"
        )
    selection: list[Any] = [slice(None)] * 3
    selection[fixed] = index
    try:
        stored = np.asarray(array[tuple(selection)])
    except (ValueError, RuntimeError) as error:
        raise StoreError(
            f"the series {pack.series} is damaged, as it was packed: {error}; "
            "tell the store's operators"
        ) from error
    slices = [index] if axis == "z" else range(array.shape[0])
    factors = [pack.rescale.of_slice(k * 2**level) for k in slices]
    slope = np.array([factor[0] for factor in factors])[:, np.newaxis]
    intercept = np.array([factor[1] for factor in factors])[:, np.newaxis]
    values = stored.astype(np.float64) * slope + intercept
    whole = stored.dtype.kind in "iu" and bool(
        np.all(slope == np.rint(slope)) and np.all(intercept == np.rint(intercept))
    )
    if whole and _INT16.min <= values.min() and values.max() <= _INT16.max:
        exact: NDArray[np.int16] = values.astype(np.int16)
        return exact
    rounded: NDArray[np.float32] = values.astype(np.float32)
    return rounded


def window_hint(pack: Pack) -> dict[str, float]:
    """Return the window that a series is first shown with.

    Returns
    -------
    dict
        ``width`` and ``level`` in the unit of the rescaled values: soft tissue for CT; for
        other modalities from the percentiles of the coarsest level's middle third.
    """
    if pack.modality == "CT":
        return dict(_SOFT_TISSUE)
    coarsest = LEVELS - 1
    slices = pack.array(coarsest).shape[0]
    middle = range(slices // 3, max(slices // 3 + 1, 2 * slices // 3))
    values = np.concatenate([pack.slice(k, coarsest).ravel() for k in middle])
    values = values[np.isfinite(values)]
    low, high = (
        np.percentile(values, [_DARK_PERCENT, _BRIGHT_PERCENT]) if values.size else (0.0, 1.0)
    )
    width = float(high - low) or 1.0
    return {"width": _rounded(width), "level": _rounded(float(low + high) / 2)}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
