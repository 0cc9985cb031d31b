"""Facts of a series: vendor, use in 3D, and what is flagged of its slices."""

from __future__ import annotations

import math

import numpy as np
import pydicom
import pytest

from kakehashi.imaging.geometry import grid_of_planes
from kakehashi.store.describe import usable_in_3d, vendor_of
from kakehashi.store.pack import pack_series

from .conftest import SERIES, files_of
from .made import CORONAL, Slice, stack, write


@pytest.mark.parametrize(
    ("manufacturer", "vendor"),
    [
        ("GE MEDICAL SYSTEMS", "GE"),
        ("GE Healthcare", "GE"),
        ("GEMS", "GE"),
        ("ge", "GE"),
        ("GENERIC", "GENERIC"),
        ("SIEMENS", "SIEMENS"),
        ("Siemens Healthineers", "SIEMENS"),
        ("Siemens HealthCare GmbH", "SIEMENS"),
        ("Philips", "PHILIPS"),
        ("Philips Medical Systems", "PHILIPS"),
        ("Philips Medical Systems / MIM Software", "PHILIPS"),
        ("TOSHIBA", "TOSHIBA"),
        ("TOSHIBA_MEC", "TOSHIBA"),
        ("ＴＯＳＨＩＢＡ", "TOSHIBA"),  # noqa: RUF001 - as some senders write it
        ("CANON_MEC", "CANON"),
        ("Canon Medical Systems", "CANON"),
        ("キヤノンメディカルシステムズ", "CANON"),
        ("HITACHI", "HITACHI"),
        ("Hitachi, Ltd.", "HITACHI"),
        ("Hitachi Medical Corporation", "HITACHI"),
        ("株式会社日立製作所", "株式会社日立製作所"),
        ("日立メディコ", "HITACHI"),
        ("FUJIFILM Healthcare Corporation", "FUJIFILM"),
        ("FUJI PHOTO FILM Co., ltd.", "FUJIFILM"),
        ("SHIMADZU CORPORATION", "SHIMADZU"),
        ("UIH", "UNITED IMAGING"),
        ("United Imaging Healthcare", "UNITED IMAGING"),
        ("Acme, Inc.", "ACME"),
        ("  ", None),
        ("", None),
        (".", None),
        (None, None),
    ],
)
def test_a_vendor_has_one_name_however_its_machines_spell_it(manufacturer, vendor):
    assert vendor_of(manufacturer) == vendor


def test_vendors_of_the_real_series_are_known():
    found = {
        name: vendor_of(str(pydicom.dcmread(files_of(name)[0]).Manufacturer)) for name in SERIES
    }
    assert found == {
        "ct_chest": "GE",
        "ct_tilted": "PHILIPS",
        "ct_enhanced": "ACME",
        "mr_adc": "TOSHIBA",
        "mr_rle": "TOSHIBA",
        "mr_jpeg2000": "TOSHIBA",
        "pet_uneven": "GE",
        "sts_ct": "GE",
        "sts_mr": "PHILIPS",
        "sts_pet": "GE",
    }


def grid(count: int, degrees: float, *, gantry: float = 0.0):
    """Slices turned about x by some degrees; the table moves so that they shear by `gantry`."""
    turn, shear = math.radians(degrees), math.tan(math.radians(gantry))
    column = np.array([0, math.cos(turn), math.sin(turn)])
    normal = np.array([0, -math.sin(turn), math.cos(turn)])
    return grid_of_planes(
        [k * (normal + shear * column) for k in range(count)],
        [[1, 0, 0, *column]] * count,
        [[1, 1]] * count,
        None,
    )


@pytest.mark.parametrize(
    ("modality", "volume", "usable"),
    [
        ("CT", grid(32, 0), True),
        ("CT", grid(31, 0), False),
        ("MR", grid(300, 0), True),
        ("PT", grid(32, 0), True),
        ("OT", grid(32, 0), False),
        (None, grid(32, 0), False),
        ("CT", grid(32, 29.9), True),
        ("CT", grid(32, -29.9), True),
        ("CT", grid(32, 30.1), False),
        ("CT", grid(32, 90), False),
        ("CT", grid(32, 180), True),
        ("CT", grid(32, 25, gantry=25), True),
    ],
)
def test_use_in_3d_follows_the_rule_of_the_study(modality, volume, usable):
    assert usable_in_3d(modality, volume) is usable


def test_localizers_are_never_packed_so_never_usable(tmp_path):
    slices = stack(40, attributes={"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]})
    with pytest.raises(Exception, match="localizer"):
        pack_series(write(tmp_path / "in", slices, "CT"), tmp_path / "x.ozx")


@pytest.mark.parametrize(
    ("thickness", "flags"),
    [
        (2.5, ()),
        (2.4, ()),
        (2.6, ()),
        (1.0, ("spaced-slices",)),
        (5.0, ("overlapping-slices",)),
        (None, ()),
        (0, ()),
    ],
)
def test_slices_that_leave_something_out_or_overlap_are_flagged(tmp_path, thickness, flags):
    attributes = {"SliceThickness": thickness}
    files = write(tmp_path / "in", stack(3, attributes=attributes), "CT")
    assert pack_series(files, tmp_path / "x.ozx").facts.flags == flags


def test_flags_and_use_in_3d_are_of_any_volume_and_the_rest_of_the_first(tmp_path):
    slices = [
        *stack(3, orientation=CORONAL),
        *[Slice(k, step_mm=5.0, origin=(0, 0, 0.1 * (k == 5))) for k in range(32)],
    ]
    facts = pack_series(write(tmp_path / "in", slices, "CT"), tmp_path / "x.ozx").facts
    assert (facts.orientation, facts.spacing_z, facts.volumes) == ("coronal", 2.5, 2)
    assert facts.usable_3d
    assert facts.flags == ("uneven-spacing",)
