"""What a cold reading found: heads and screens by other spellings, numbers that look like ids."""

from __future__ import annotations

import io

import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    BasicTextSRStorage,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    PositronEmissionTomographyImageStorage,
)

from kakehashi.store.deidentify import Deidentifier, load_key, residue


@pytest.fixture(scope="module")
def deidentifier(tmp_path_factory):
    return Deidentifier(load_key(tmp_path_factory.mktemp("key") / "key", create=True))


def scan(sop_class: str = CTImageStorage, syntax: str = ExplicitVRLittleEndian, **more: object):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID = sop_class
    dataset.SOPInstanceUID, dataset.SeriesInstanceUID = "1.2.3.4", "1.2.3"
    dataset.StudyInstanceUID = "1.2"
    dataset.PatientID, dataset.PatientName = "00102400", "YAMADA^TARO=山田^太郎"
    dataset.SpecificCharacterSet = "ISO_IR 192"
    for name, value in more.items():
        setattr(dataset, name, value)
    return dataset


@pytest.mark.parametrize(
    ("attributes", "tier"),
    [
        ({"BodyPartExamined": "CHEST"}, 1),
        ({"BodyPartExamined": "KNEE", "SeriesDescription": "surface coil"}, 1),
        ({"SeriesDescription": "頭頂部から大腿"}, 2),
        ({"BodyPartExamined": "CHEST", "SeriesDescription": "鼻咽腔"}, 2),
        ({"BodyPartExamined": "CHEST", "SeriesDescription": "Whole Body"}, 2),
        ({"BodyPartExamined": "CHEST", "StudyDescription": "TOTAL-BODY"}, 2),
        ({"SeriesDescription": "C-SPINE L-SPINE LUMBAR"}, 2),
        ({"BodyPartExamined": "ABDOMEN", "SeriesDescription": "Vertex to thigh"}, 2),
        ({"BodyPartExamined": "CHEST", "PerformedProcedureStepDescription": "HEAD"}, 2),
        ({"BodyPartExamined": "CHEST", "RequestedProcedureDescription": "頭部CT"}, 2),
        ({"BodyPartExamined": "EXTREMITY", "ProtocolName": "NEURO^ROUTINE"}, 2),
    ],
)
def test_whatever_may_show_a_face_is_in_the_second_tier(deidentifier, attributes, tier):
    assert deidentifier.object(scan(**attributes), facility="F01").tier == tier


def test_a_pet_scan_may_show_a_face_whatever_it_is_of(deidentifier):
    pet = scan(PositronEmissionTomographyImageStorage, BodyPartExamined="CHEST")
    assert deidentifier.object(pet, facility="F01").tier == 2


@pytest.mark.parametrize(
    "attributes",
    [
        {"SeriesDescription": "Dose_Report"},
        {"SeriesDescription": "DoseReport"},
        {"SeriesDescription": "Dose  Report"},
        {"SeriesDescription": "Patient_Protocol"},
        {"SeriesDescription": "線量ﾚﾎﾟｰﾄ"},
        {"ImageType": ["DERIVED", "SECONDARY", "SCREEN  SAVE"]},
        {"BurnedInAnnotation": "Y"},
    ],
)
def test_screens_are_held_however_they_are_spelled(deidentifier, attributes):
    picture = scan(BodyPartExamined="CHEST", PhotometricInterpretation="MONOCHROME2", **attributes)
    assert deidentifier.object(picture, facility="F01").held


def test_geometry_and_rescale_stay_though_their_digits_are_an_id(deidentifier):
    source = scan(
        RescaleIntercept="-1024.00",
        RescaleSlope="1",
        PixelSpacing=["0.703125", "0.703125"],
        AccessionNumber="703125",
    )
    done = deidentifier.object(source, facility="F01").dataset
    assert (done.RescaleIntercept, list(done.PixelSpacing)) == (-1024, [0.703125, 0.703125])
    # The control: the number itself, where a number may stand.
    plain = scan(AccessionNumber="703125", SliceThickness="703125")
    assert "SliceThickness" not in deidentifier.object(plain, facility="F01").dataset


def test_a_sequence_that_came_without_its_type_is_written_again(deidentifier):
    item = b"\x18\0\x50\0\x04\0\0\x001.25" + b"\x28\0\x10\0\x02\0\0\0\0\2"
    value = b"\xfe\xff\0\xe0" + len(item).to_bytes(4, "little") + item
    file = io.BytesIO()
    pydicom.dcmwrite(file, scan(BodyPartExamined="CHEST"), enforce_file_format=True)
    raw = file.getvalue() + b"\x00\x52\x29\x92UN\0\0" + len(value).to_bytes(4, "little") + value
    outcome = deidentifier.object(pydicom.dcmread(io.BytesIO(raw)), facility="F01")
    again = io.BytesIO()
    outcome.write(again)
    done = pydicom.dcmread(io.BytesIO(again.getvalue()))
    assert done.SharedFunctionalGroupsSequence[0].Rows == 512


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_what_is_left_is_found_in_compressed_objects_too(deidentifier, syntax):
    outcome = deidentifier.object(scan(BasicTextSRStorage, syntax), facility="F01")
    assert residue(outcome, outcome.names) == []
    outcome.dataset.StudyDescription = "YAMADA TARO"
    assert residue(outcome, outcome.names)


@pytest.mark.parametrize(
    ("value", "unit", "left"),
    [("102", "a", "90"), ("1224", "mo", "1080"), ("120", "mo", "120"), ("40", "a", "40")],
)
def test_an_age_in_a_report_is_limited_in_its_own_unit(deidentifier, value, unit, left):
    units, concept, measured, item = Dataset(), Dataset(), Dataset(), Dataset()
    units.CodeValue, units.CodingSchemeDesignator, units.CodeMeaning = unit, "UCUM", unit
    concept.CodeValue, concept.CodingSchemeDesignator = "121033", "DCM"
    concept.CodeMeaning = "Subject Age"
    measured.NumericValue, measured.FloatingPointValue = value, float(value)
    measured.MeasurementUnitsCodeSequence = [units]
    item.ValueType, item.ConceptNameCodeSequence = "NUM", [concept]
    item.MeasuredValueSequence = [measured]
    report = scan(BasicTextSRStorage, ContentSequence=[item])
    done = deidentifier.object(report, facility="F01").dataset.ContentSequence[0]
    found = done.MeasuredValueSequence[0]
    assert float(found.NumericValue) == float(left)
    assert ("FloatingPointValue" in found) == (value == left)
