"""Private elements that are known to be safe stay; everything else in their place goes."""

from __future__ import annotations

import io
import struct

import pydicom
import pytest
from pydicom import uid
from pydicom._private_dict import private_dictionaries

from kakehashi.store.deidentify.private import SAFE
from kakehashi.store.dicom import tolerant
from tests.store.deidentify.plants import ct


def kept(deidentifier, place, vr, value, *, syntax=uid.ExplicitVRLittleEndian):
    """Return the value that is left of a private element, None if it goes."""
    creator, group, number = place
    dataset = ct()
    dataset.file_meta.TransferSyntaxUID = syntax
    with tolerant():
        dataset.private_block(group, creator, create=True).add_new(number, vr, value)
        source = io.BytesIO()
        dataset.save_as(source, enforce_file_format=True)
        source.seek(0)
        outcome = deidentifier.object(pydicom.dcmread(source), facility="F01")
        outcome.write(io.BytesIO())
        done = outcome.dataset
        try:
            return done.private_block(group, creator)[number].value
        except KeyError:
            return None


PHILIPS = "Philips MR Imaging DD 001"
SYNTAXES = [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian]


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize(
    ("place", "vr", "value"),
    [
        ((PHILIPS, 0x2005, 0x0D), "FL", 0.5),
        ((PHILIPS, 0x2005, 0x0E), "FL", 0.0125),
        (("GEMS_PARM_01", 0x0043, 0x27), "SH", "0.938:1"),
        (("GEMS_ACQU_01", 0x0019, 0x9E), "LO", "EFGRE3D"),
        (("ELSCINT1", 0x01E1, 0x26), "CS", "BODY"),
        (("ELSCINT1", 0x01F1, 0x26), "DS", "0.671"),
        (("ELSCINT1", 0x01F1, 0x26), "FD", 0.671),
        (("ELSCINT1", 0x00E1, 0x50), "DS", "12.5"),
        (("GEMS_PARM_01", 0x0043, 0x39), "IS", ["1000000050", "8", "0", "0"]),
        (("SIEMENS MR HEADER", 0x0019, 0x27), "FD", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
    ],
)
def test_what_the_table_of_the_standard_has_stays(deidentifier, place, vr, value, syntax):
    found = kept(deidentifier, place, vr, value, syntax=syntax)
    many = value if isinstance(value, list) else [value]
    left = found if isinstance(value, list) else [found]
    assert [float(a) if vr in ("DS", "IS", "FL", "FD") else a for a in left] == pytest.approx(
        [float(a) for a in many] if vr in ("DS", "IS", "FL", "FD") else many
    )


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize(
    ("place", "vr", "value"),
    [
        (("GEMS_PARM_01", 0x0043, 0x27), "SH", "Suzuki Ichiro"),
        (("GEMS_PARM_01", 0x0043, 0x27), "SH", "03-1234-5678"),
        (("GEMS_ACQU_01", 0x0019, 0x9E), "LO", "Suzuki Ichiro"),
        (("GEMS_ACQU_01", 0x0019, 0x9E), "LO", "KAWAMOTO"),
        (("GEMS_ACQU_01", 0x0019, 0x9E), "LO", "20240301"),
        (("ELSCINT1", 0x01E1, 0x26), "CS", "SUZUKI"),
        (("ELSCINT1", 0x01F1, 0x26), "FD", struct.unpack("<d", b"SUZUKI H")[0]),
        ((PHILIPS, 0x2005, 0x0E), "FL", [1.0, 2.0]),
        (("SIEMENS MR HEADER", 0x0019, 0x0E), "FD", [1.0] * 4),
        (
            ("SIEMENS MR HEADER", 0x0019, 0x0E),
            "FD",
            list(struct.unpack("<3d", b"SUZUKI ICHIRO 03-1234567")),
        ),
        (("SIEMENS MR HEADER", 0x0019, 0x0C), "IS", ["800"] * 2),
        (("SIEMENS MR HEADER", 0x0019, 0x0C), "IS", "0312345678"),
        (("SIEMENS MR HEADER", 0x0019, 0x0C), "IS", "20240516"),
        (("GEMS_ACQU_01", 0x0019, 0x23), "DS", ["1"] * 400),
        (("GEMS_ACQU_01", 0x0019, 0x23), "UN", b"03-12345678 "),
        (("GEMS_PARM_01", 0x0043, 0x39), "IS", [str(ord(letter)) for letter in "SUZUKI ICHIRO"]),
        (("GEMS_PARM_01", 0x0043, 0x6F), "DS", ["1", "2", "3", "4", "5"]),
    ],
)
def test_what_is_no_such_number_goes(deidentifier, place, vr, value, syntax):
    assert kept(deidentifier, place, vr, value, syntax=syntax) is None


def test_the_list_has_the_types_that_a_public_dictionary_has():
    unknown = set()
    for (creator, group, number), safe in SAFE.items():
        known = private_dictionaries[creator]
        keys = [f"{group:04X}{block}{number:02X}" for block in ("xx", "10")]
        types = {known[key][0] for key in keys if key in known}
        if not types:
            unknown.add((creator, group, number))
        assert types <= set(safe.vrs), (creator, hex(group), hex(number))
    # Of this one the dictionary has nothing.
    assert unknown == {("ELSCINT1", 0x01E1, 0x50)}
