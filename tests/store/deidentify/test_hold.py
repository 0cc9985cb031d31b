"""What must not go into the store is held with a reason; heads are of tier 2."""

from __future__ import annotations

import io

import pydicom
import pytest
from pydicom import Dataset, Sequence, uid
from pydicom.dataelem import DataElement

from kakehashi.errors import StoreError
from tests.store.deidentify.plants import code, ct, item


def outcome(deidentifier, change):
    dataset = ct()
    change(dataset)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.get("SOPClassUID", "1.2")
    return deidentifier.object(dataset, facility="F01")


def _set(**values):
    def change(dataset):
        for keyword, value in values.items():
            if value is None:
                del dataset[keyword]
            else:
                setattr(dataset, keyword, value)

    return change


def _overlay(dataset):
    dataset[0x60000010] = DataElement(0x60000010, "US", 8)
    dataset[0x60000102] = DataElement(0x60000102, "US", 12)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_set(BurnedInAnnotation="YES"), "BurnedInAnnotation"),
        (_set(SOPClassUID=uid.SecondaryCaptureImageStorage), "secondary capture"),
        (_set(SOPClassUID=uid.UltrasoundImageStorage), "burned"),
        (_set(SOPClassUID=uid.UltrasoundMultiFrameImageStorage), "burned"),
        (_set(SOPClassUID=uid.VLPhotographicImageStorage), "burned"),
        (_set(SOPClassUID=uid.EncapsulatedPDFStorage), "document"),
        (_set(SOPClassUID=uid.EncapsulatedCDAStorage), "document"),
        (_set(SOPClassUID="1.2.3.4.5"), "unknown SOP Class"),
        (_set(SOPClassUID=None), "unknown SOP Class"),
        (_set(SOPClassUID=uid.ComputedRadiographyImageStorage), "not of a class"),
        (_set(ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"]), "screen"),
        (_set(ImageType=["DERIVED", "SECONDARY", "OTHER", "CT_SOM5 PROT"]), "screen"),
        (_set(ImageType=["DERIVED", "PRIMARY", "CSA REPORT"]), "screen"),
        (_set(ImageType=["ORIGINAL", "PRIMARY", "RESULT"]), "screen"),
        (_set(ImageType=["ORIGINAL", "PRIMARY", "OTHER", "CT_SOM7 PROT"]), "screen"),
        (_set(ImageType=["DERIVED", "PRIMARY", "CSA-RESULTS"]), "screen"),
        (_set(ImageType=["DERIVED", "PRIMARY", "EXAM_SUMMARY"]), "screen"),
        (_set(ImageType=["DERIVED", "PRIMARY", "Screen Save"]), "screen"),
        (_set(ImageType=["DERIVED", "SECONDARY"]), "position"),
        (_set(ImageType=["DERIVED", "SECONDARY", "MPR"], ImagePositionPatient=""), "position"),
        (_set(SeriesDescription="Dose Report"), "screen"),
        (_set(SeriesDescription="Patient Protocol"), "screen"),
        (_set(ConversionType="WSD"), "screen"),
        (_set(PhotometricInterpretation="RGB", SamplesPerPixel=3), "colour"),
        (_overlay, "overlay"),
        (_set(PatientID=""), "PatientID"),
        (_set(PatientID=None), "PatientID"),
        (_set(SeriesInstanceUID=None), "SeriesInstanceUID"),
        (_set(SOPInstanceUID="../../etc"), "SOPInstanceUID"),
    ],
)
def test_it_is_held(deidentifier, change, reason):
    held = outcome(deidentifier, change).held
    assert held is not None
    assert reason in held
    assert "7701234" not in held


def test_a_plain_image_is_not_held(deidentifier):
    assert outcome(deidentifier, _set()).held is None
    for values in (["ORIGINAL", "PRIMARY", "CSA RESAMPLED", "PROTON"], ["DERIVED", "PRIMARY"]):
        assert outcome(deidentifier, _set(ImageType=values)).held is None


def test_what_was_computed_and_lies_somewhere_in_the_patient_is_not_held(deidentifier):
    computed = ["DERIVED", "SECONDARY", "MPR"]
    place = _set(ImageType=computed, ImagePositionPatient=["1", "2", "3"])
    assert outcome(deidentifier, place).held is None
    plane = item(PlanePositionSequence=Sequence([item(ImagePositionPatient=["1", "2", "3"])]))
    frames = _set(ImageType=computed, PerFrameFunctionalGroupsSequence=Sequence([plane]))
    assert outcome(deidentifier, frames).held is None


def test_an_object_whose_name_cannot_be_read_is_held(deidentifier):
    buffer = io.BytesIO()
    dataset = ct()
    dataset.PatientName = "PLACEHOLDER0"
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.save_as(buffer, enforce_file_format=True)
    raw = buffer.getvalue().replace(
        b"PLACEHOLDER0", b"\xff\xfe\xfd\x80\x81\xff\xff\xff\xff\xff\xff\xff"
    )
    made = deidentifier.object(pydicom.dcmread(io.BytesIO(raw)), facility="F01")
    assert made.held is not None
    assert "decoded" in made.held


def test_an_unknown_transfer_syntax_is_held_and_none_is_an_error(deidentifier):
    dataset = ct()
    dataset.file_meta.TransferSyntaxUID = uid.UID("1.2.840.113619.5.2")
    assert "transfer syntax" in str(deidentifier.object(dataset, facility="F01").held)
    with pytest.raises(StoreError, match="transfer syntax"):
        deidentifier.object(Dataset(), facility="F01")


def test_a_damaged_sequence_is_held(deidentifier):
    buffer = io.BytesIO()
    dataset = ct()
    dataset.ProcedureCodeSequence = Sequence([code("123456", "DCM", "MEANING")])
    dataset.save_as(buffer, enforce_file_format=True, implicit_vr=False, little_endian=True)
    raw = buffer.getvalue().replace(b"SH\x06\x00123456", b"SH\xff\xff123456")
    made = deidentifier.object(pydicom.dcmread(io.BytesIO(raw)), facility="F01")
    found = made.dataset.get("ProcedureCodeSequence")
    assert made.held is not None or not found or "123456" not in str(found)


def _region(value, scheme, meaning):
    def change(dataset):
        dataset.AnatomicRegionSequence = Sequence([code(value, scheme, meaning)])
        del dataset.BodyPartExamined

    return change


@pytest.mark.parametrize(
    ("change", "tier"),
    [
        (_set(), 1),
        (_set(BodyPartExamined="HEAD"), 2),
        (_set(BodyPartExamined="BRAIN"), 2),
        (_set(BodyPartExamined="NECK"), 2),
        (_set(BodyPartExamined="WHOLEBODY"), 2),
        (_set(BodyPartExamined="HEADNECK"), 2),
        (_set(BodyPartExamined="CSPINE"), 2),
        (_set(BodyPartExamined=""), 2),
        (_set(BodyPartExamined=None), 2),
        (_set(BodyPartExamined="UNHEARDOF"), 2),
        (_set(BodyPartExamined="ABDOMEN"), 1),
        (_set(SeriesDescription="Head & Chest"), 2),
        (_set(SeriesDescription="頸部から骨盤"), 2),
        (_set(SeriesDescription="頭部単純"), 2),
        (_set(StudyDescription="全身CT"), 2),
        (_set(StudyDescription="側頭骨"), 2),
        (_set(BodyPartExamined=None, StudyDescription="腹部単純"), 1),
        (_region("12738006", "SCT", "Brain"), 2),
        (_region("T-D1100", "SRT", "x"), 2),
        (_region("51185008", "SCT", "Chest"), 1),
        (_set(SOPClassUID=uid.ComprehensiveSRStorage), 2),
        (_set(SOPClassUID=uid.SegmentationStorage, BodyPartExamined=None), 2),
    ],
)
def test_tiers(deidentifier, change, tier):
    assert outcome(deidentifier, change).tier == tier


def test_a_region_deep_in_functional_groups_counts(deidentifier):
    def change(dataset):
        region = item(AnatomicRegionSequence=Sequence([code("69536005", "SCT", "Head")]))
        group = item(FrameAnatomySequence=Sequence([region]))
        dataset.SharedFunctionalGroupsSequence = Sequence([group])

    assert outcome(deidentifier, change).tier == 2
