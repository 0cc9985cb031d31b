"""Real series go through, can still be packed, and give the same SUV."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pydicom
import pytest

from kakehashi.store.deidentify import residue
from kakehashi.store.pack import pack_series
from tests.store.conftest import DATA, SERIES, files_of

OTHERS = ["seg_tiny/*.dcm", "sts/*/mask/*.dcm", "charset/*.dcm"]
HELD = {"charset/chrH31.dcm", "charset/chrI2.dcm", "charset/chrX1.dcm"}


def deidentified(deidentifier, files, folder) -> list[Path]:
    folder.mkdir()
    written = []
    for path in files:
        outcome = deidentifier.object(pydicom.dcmread(path), facility="F01")
        assert outcome.held is None
        assert residue(outcome, outcome.names) == []
        written.append(folder / path.name)
        outcome.write(written[-1])
    return written


@pytest.mark.parametrize("name", sorted(SERIES))
def test_every_series_goes_through_with_its_pixels(deidentifier, name, tmp_path):
    before = files_of(name)[:3]
    for old, new in zip(before, deidentified(deidentifier, before, tmp_path / "out"), strict=True):
        one, two = pydicom.dcmread(old), pydicom.dcmread(new)
        # A comment of the encoder may have gone from a compressed image, no pixel.
        assert len(two.PixelData) == len(one.PixelData)
        assert two.PixelData == one.PixelData or name == "mr_jpeg2000"
        assert (two.pixel_array == one.pixel_array).all()
        assert two.file_meta.TransferSyntaxUID == one.file_meta.TransferSyntaxUID
        assert two.PatientID != one.PatientID
        assert two.SOPInstanceUID == deidentifier.uid(one.SOPInstanceUID)


@pytest.mark.parametrize("path", sorted(path for pattern in OTHERS for path in DATA.glob(pattern)))
def test_other_objects_go_through_or_are_held(deidentifier, path, tmp_path):
    outcome = deidentifier.object(pydicom.dcmread(path), facility="F01")
    assert (outcome.held is not None) == (path.relative_to(DATA).as_posix() in HELD)
    assert residue(outcome, outcome.names) == []
    outcome.write(tmp_path / "out.dcm")
    pydicom.dcmread(tmp_path / "out.dcm")


@pytest.mark.parametrize("name", ["pet_uneven", "mr_adc"])
def test_a_series_can_still_be_packed_on_the_same_grid(deidentifier, packed, name, tmp_path):
    files = deidentified(deidentifier, files_of(name), tmp_path / "out")
    info = pack_series(files, tmp_path / "series.ozx")
    before = packed(name).info.facts
    for fact in ("modality", "slices", "spacing_x", "spacing_z", "model", "sex", "age", "kernel"):
        assert getattr(info.facts, fact) == getattr(before, fact)
    assert info.facts.series_uid == deidentifier.uid(before.series_uid)


def suv_factor(dataset: pydicom.Dataset) -> float:
    """SUVbw by body weight: weight over the dose that is left at the start of the scan."""
    tracer = dataset.RadiopharmaceuticalInformationSequence[0]
    if "RadiopharmaceuticalStartDateTime" in tracer:
        injected = tracer.RadiopharmaceuticalStartDateTime[:14]
    else:
        injected = dataset.SeriesDate + tracer.RadiopharmaceuticalStartTime[:6]
    scanned = dataset.SeriesDate + dataset.SeriesTime[:6]
    form = "%Y%m%d%H%M%S"
    seconds = (
        dt.datetime.strptime(scanned, form) - dt.datetime.strptime(injected, form)  # noqa: DTZ007 - a day
    ).total_seconds()
    left = tracer.RadionuclideTotalDose * 2 ** (-seconds / float(tracer.RadionuclideHalfLife))
    return float(dataset.PatientWeight) * 1000 / float(left)


@pytest.mark.parametrize("name", ["pet_uneven", "sts_pet"])
def test_suv_is_the_same_before_and_after(deidentifier, name):
    for path in files_of(name)[:2]:
        before = pydicom.dcmread(path)
        start = (
            before.SeriesDate
            + before.RadiopharmaceuticalInformationSequence[0].RadiopharmaceuticalStartTime
        )
        before.RadiopharmaceuticalInformationSequence[0].RadiopharmaceuticalStartDateTime = start
        after = deidentifier.object(before, facility="F01").dataset
        assert after.SeriesDate != before.SeriesDate
        assert suv_factor(after) == suv_factor(before) > 0
        del before.RadiopharmaceuticalInformationSequence[0].RadiopharmaceuticalStartDateTime
        after = deidentifier.object(before, facility="F01").dataset
        assert suv_factor(after) == suv_factor(before) > 0


def test_references_between_objects_still_lead_to_them(deidentifier):
    images = {
        str(deidentifier.object(pydicom.dcmread(path), facility="F01").dataset.SOPInstanceUID)
        for path in sorted((DATA / "ct_tiny").iterdir())
        if path.name != "LICENSE"
    }
    path = DATA / "seg_tiny" / "seg_image_ct_binary.dcm"
    seg = deidentifier.object(pydicom.dcmread(path), facility="F01").dataset
    refers = {
        str(item.ReferencedSOPInstanceUID)
        for series in seg.ReferencedSeriesSequence
        for item in series.ReferencedInstanceSequence
    }
    assert refers
    assert refers <= images
    assert all(segment.SegmentLabel for segment in seg.SegmentSequence)


def test_contours_and_safe_private_elements_stay(deidentifier):
    path = DATA / "sts" / "CT" / "mask" / "RS.dcm"
    before = pydicom.dcmread(path)
    after = deidentifier.object(before, facility="F01").dataset
    assert [
        [contour.ContourData for contour in roi.ContourSequence] for roi in after.ROIContourSequence
    ] == [
        [contour.ContourData for contour in roi.ContourSequence]
        for roi in before.ROIContourSequence
    ]
    path = DATA / "ct_tilted" / "axial" / "I110"
    after = deidentifier.object(pydicom.dcmread(path), facility="F01").dataset
    assert after.private_block(0x01F1, "ELSCINT1")[0x27].value == 0.75
    assert sum(element.tag.is_private for element in after) == 2
