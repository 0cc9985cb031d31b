"""Geometry: the affine takes each slice's first voxel to the position that DICOM gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kakehashi.errors import PackError
from kakehashi.imaging.geometry import (
    axial_angle,
    grid_of_planes,
    orientation_of,
    places_of,
    slice_distance,
    to_patient,
    to_voxel,
)

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
lengths = st.floats(0.1, 20, allow_nan=False)
places = st.floats(-1000, 1000, allow_nan=False)


@st.composite
def rotations(draw: st.DrawFn) -> np.ndarray:
    quaternion = np.array(draw(st.tuples(*[st.floats(-1, 1)] * 4)))
    if np.linalg.norm(quaternion) < 0.1:
        quaternion = np.array([1.0, 0, 0, 0])
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


@st.composite
def volumes(draw: st.DrawFn, sheared: bool = False) -> dict[str, np.ndarray]:
    """Planes of a volume in any orientation and order, their places rounded as DS are."""
    turn = draw(rotations())
    step = draw(lengths)
    along = turn[:, 2] * step
    if sheared:
        along = along + turn[:, 1] * step * math.tan(math.radians(draw(st.floats(1, 30))))
    count = draw(st.integers(2, 40))
    order = draw(st.permutations(range(count)))
    origin = np.array(draw(st.tuples(places, places, places)))
    return {
        "positions": np.round([origin + k * along for k in order], 6),
        "orientations": np.round(np.tile(turn[:, :2].T.reshape(6), (count, 1)), 7),
        "spacings": np.tile(draw(st.tuples(lengths, lengths)), (count, 1)),
        "order": np.array(order),
        "step": along,
    }


@given(volumes())
def test_every_slice_lies_where_dicom_puts_it(volume):
    grid = grid_of_planes(volume["positions"], volume["orientations"], volume["spacings"], None)
    assert np.array_equal(volume["order"][list(grid.order)], np.arange(len(grid.order)))
    first_voxels = [(0, 0, k) for k in range(len(grid.order))]
    expected = volume["positions"][list(grid.order)]
    assert np.allclose(to_patient(grid.affine_lps, first_voxels), expected, atol=1e-3)
    assert np.linalg.det(grid.affine_lps[:3, :3]) > 0
    assert grid.flags == ()
    z, y, x = grid.spacing_mm
    assert (y, x) == tuple(volume["spacings"][0])
    assert z == pytest.approx(np.linalg.norm(volume["step"]), abs=1e-4)


@given(volumes(sheared=True))
def test_a_tilted_gantry_is_exact_and_flagged(volume):
    grid = grid_of_planes(volume["positions"], volume["orientations"], volume["spacings"], None)
    expected = volume["positions"][list(grid.order)]
    got = to_patient(grid.affine_lps, [(0, 0, k) for k in range(len(grid.order))])
    assert np.allclose(got, expected, atol=1e-3)
    assert "tilted" in grid.flags


@given(volumes(), st.lists(st.tuples(places, places, places), min_size=1, max_size=5))
def test_to_voxel_undoes_to_patient(volume, points):
    affine = grid_of_planes(
        volume["positions"], volume["orientations"], volume["spacings"], None
    ).affine_lps
    there = to_patient(affine, to_voxel(affine, points))
    assert np.allclose(there, points, atol=1e-6)


def test_a_step_in_i_goes_along_the_row_and_in_j_along_the_column():
    grid = grid_of_planes([(10, 20, 30), (10, 20, 33)], [AXIAL] * 2, [(0.5, 0.25)] * 2, None)
    assert to_patient(grid.affine_lps, (1, 0, 0)).tolist() == [10.25, 20, 30]
    assert to_patient(grid.affine_lps, (0, 1, 0)).tolist() == [10, 20.5, 30]
    assert to_patient(grid.affine_lps, (0, 0, 1)).tolist() == [10, 20, 33]
    assert grid.spacing_mm == (3.0, 0.5, 0.25)


def stack(zs: list[float], orientation=AXIAL) -> dict:
    n = len(zs)
    return {
        "positions": [(0, 0, z) for z in zs],
        "orientations": [orientation] * n,
        "pixel_spacings": [(1, 1)] * n,
        "thickness": None,
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"positions": [(0, 0, z) for z in (0, 5, 10, 20, 25)]}, r"gap: 10\.000 mm.*3 and 4 of 5"),
        ({"positions": [(0, 0, z) for z in (0, 5, 5, 10, 15)]}, "several volumes or repeated"),
        ({"positions": [(0, 0, 0), (0, 0, 5), (3, 0, 10), (0, 0, 15), (0, 0, 20)]}, "even grid"),
        ({"positions": [(0, 0, float("nan"))] * 5}, "finite"),
        ({"orientations": [AXIAL] * 4 + [(0, 1, 0, 0, 0, 1)]}, "1 of 5 slices are not parallel"),
        ({"orientations": [(1, 0, 0, 0.5, 1, 0)] * 5}, "right angle"),
        ({"orientations": [(2, 0, 0, 0, 1, 0)] * 5}, "unit"),
        ({"pixel_spacings": [(1, 1)] * 4 + [(1, 1.1)]}, "mixed pixel spacings"),
        ({"pixel_spacings": [(0, 1)] * 5}, "positive"),
        ({"orientations": [AXIAL] * 3}, "not as many"),
    ],
)
def test_what_is_no_grid_is_refused_with_the_reason(change, reason):
    planes = stack([0, 5, 10, 15, 20])
    grid_of_planes(**planes)
    with pytest.raises(PackError, match=reason):
        grid_of_planes(**(planes | change))


def test_no_planes_are_refused():
    with pytest.raises(PackError, match="no image planes"):
        grid_of_planes([], [], [], None)


def test_rounded_bed_positions_are_packed_and_flagged():
    assert grid_of_planes(**stack([0, 3.27, 6.54, 9.73, 13.0])).flags == ("uneven-spacing",)


@pytest.mark.parametrize("thickness", [None, 0, -1, float("nan"), float("inf")])
def test_a_single_slice_needs_a_thickness(thickness):
    single = stack([7.0])
    grid = grid_of_planes(**(single | {"thickness": 2.5}))
    assert grid.flags == ("single-slice",)
    assert to_patient(grid.affine_lps, (0, 0, 1)).tolist() == [0, 0, 9.5]
    with pytest.raises(PackError, match="thickness"):
        grid_of_planes(**(single | {"thickness": thickness}))


@pytest.mark.parametrize(
    ("orientation", "name"),
    [
        (AXIAL, "axial"),
        ((-1, 0, 0, 0, -1, 0), "axial"),
        ((0, 1, 0, 0, 0, -1), "sagittal"),
        ((1, 0, 0, 0, 0, -1), "coronal"),
        ((1, 0, 0, 0, 0.9483237, -0.3173047), "axial"),
        ((1, 0, 0, 0, math.sqrt(0.5), math.sqrt(0.5)), "oblique"),
    ],
)
def test_orientation_is_named(orientation, name):
    normal = np.cross(orientation[:3], orientation[3:])
    planes = stack([0, 1], orientation) | {"positions": [(0, 0, 0), tuple(normal)]}
    assert orientation_of(grid_of_planes(**planes).affine_lps) == name


@pytest.mark.parametrize(
    ("places", "reason"),
    [
        (
            [0, 5, 10, 20, 25],
            (
                r"gap: 10\.000 mm between slices 3 and 4 of 5 \(at 10\.0 and 20\.0 mm along the "
                r"normal\), where 5\.000 mm are usual: 1 slice is missing$"
            ),
        ),
        ([0, 5, 10, 25, 30, 40, 45], "10.0 and 25.0 mm.*30.0 and 40.0 mm.*: 3 slices are missing$"),
        ([0, 5, 10, 18, 23], "gap: 8.000 mm .* the steps are irregular"),
        ([0, 5, 10, 12, 17], "gap: 2.000 mm .* the steps are irregular"),
        (
            [n + (n // 2) for n in range(0, 60, 2)] + [n * 1.0 for n in range(90, 150)],
            "gap: 3.000 mm .*; 3.000 mm .*, and .* more, where 1.000 mm",
        ),
        ([0, 5, 5.005, 10, 10.001, 10.002], r"4 of 6 slices|3 of 6 slices .* at 5\.0, 10\.0 mm"),
    ],
)
def test_a_gap_is_told_with_positions_and_what_is_missing(places, reason):
    with pytest.raises(PackError, match=reason):
        grid_of_planes(**stack(places))


def test_places_are_numbered_along_the_normal_and_rounding_makes_no_new_one():
    positions = [(0, 0, z) for z in (10, 0, 5.004, 5, 9.999, 20)]
    assert places_of(positions, AXIAL).tolist() == [2, 0, 1, 1, 2, 3]
    assert places_of(positions, (0, 1, 0, 1, 0, 0)).tolist() == [1, 3, 2, 2, 1, 0]
    with pytest.raises(PackError, match="right angle"):
        places_of(positions, (1, 0, 0, 1, 0, 0))


@given(volumes(sheared=True))
def test_distance_of_slices_is_measured_along_their_normal(volume):
    grid = grid_of_planes(volume["positions"], volume["orientations"], volume["spacings"], None)
    turn = volume["orientations"][0]
    normal = np.cross(turn[:3], turn[3:])
    expected = abs(float(volume["step"] @ normal) / float(np.linalg.norm(normal)))
    assert slice_distance(grid.affine_lps) == pytest.approx(expected, abs=1e-4)
    angle = math.degrees(math.acos(min(1, abs(normal[2]) / np.linalg.norm(normal))))
    assert axial_angle(grid.affine_lps) == pytest.approx(angle, abs=1e-3)
