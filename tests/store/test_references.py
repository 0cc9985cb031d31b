"""An annotation names the series and instances that it is about, wherever it says so."""

from __future__ import annotations

import pydicom
import pytest
from pydicom.dataset import Dataset

from kakehashi.store.dicom import references_of

from .conftest import DATA, files_of
from .made import item

IMAGES = [
    item(ReferencedSOPClassUID="1.2.3", ReferencedSOPInstanceUID=uid) for uid in ("1.5", "1.6")
]


def in_series(sequence: str) -> list[Dataset]:
    return [item(SeriesInstanceUID="1.4", **{sequence: IMAGES})]


def concept(code: str, scheme: str = "DCM") -> list[Dataset]:
    return [item(CodeValue=code, CodingSchemeDesignator=scheme, CodeMeaning="x")]


def report(**content: object) -> Dataset:
    inner = item(RelationshipType="CONTAINS", **content)
    outer = item(RelationshipType="CONTAINS", ValueType="CONTAINER", ContentSequence=[inner])
    return item(Modality="SR", ContentSequence=[outer])


EVIDENCE = [
    item(StudyInstanceUID="1.3", ReferencedSeriesSequence=in_series("ReferencedSOPSequence"))
]
BOTH = {"1.5", "1.6"}
OBJECTS = {
    "SEG": (item(ReferencedSeriesSequence=in_series("ReferencedInstanceSequence")), {"1.4"}, BOTH),
    "SEG, by frame": (
        item(
            PerFrameFunctionalGroupsSequence=[
                item(DerivationImageSequence=[item(SourceImageSequence=IMAGES)])
            ]
        ),
        set(),
        BOTH,
    ),
    "RTSTRUCT": (
        item(
            ReferencedFrameOfReferenceSequence=[
                item(
                    RTReferencedStudySequence=[
                        item(RTReferencedSeriesSequence=in_series("ContourImageSequence"))
                    ]
                )
            ]
        ),
        {"1.4"},
        BOTH,
    ),
    "RTSTRUCT, by contour": (
        item(
            ROIContourSequence=[item(ContourSequence=[item(ContourImageSequence=IMAGES)])],
        ),
        set(),
        BOTH,
    ),
    "SR, evidence": (item(CurrentRequestedProcedureEvidenceSequence=EVIDENCE), {"1.4"}, BOTH),
    "SR, other evidence": (item(PertinentOtherEvidenceSequence=EVIDENCE), {"1.4"}, BOTH),
    "SR, image in the content": (
        report(ValueType="IMAGE", ReferencedSOPSequence=IMAGES),
        set(),
        BOTH,
    ),
    "SR, source series": (
        report(ValueType="UIDREF", ConceptNameCodeSequence=concept("121232"), UID="1.4"),
        {"1.4"},
        set(),
    ),
    "SR, series": (
        report(ValueType="UIDREF", ConceptNameCodeSequence=concept("112002"), UID="1.4"),
        {"1.4"},
        set(),
    ),
    "SR, a UID of something else": (
        report(ValueType="UIDREF", ConceptNameCodeSequence=concept("112040"), UID="1.4"),
        set(),
        set(),
    ),
    "SR, a UID of nothing": (report(ValueType="UIDREF", UID="1.4"), set(), set()),
    "KO": (
        item(
            CurrentRequestedProcedureEvidenceSequence=EVIDENCE,
            ContentSequence=[item(ValueType="IMAGE", ReferencedSOPSequence=IMAGES[:1])],
        ),
        {"1.4"},
        BOTH,
    ),
    "PR": (item(ReferencedSeriesSequence=in_series("ReferencedImageSequence")), {"1.4"}, BOTH),
    "secondary capture": (item(SourceImageSequence=IMAGES), set(), BOTH),
    "none": (item(SeriesInstanceUID="1.4", SOPInstanceUID="1.5"), set(), set()),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_references_of_each_kind_of_annotation_are_found(kind):
    dataset, series, instances = OBJECTS[kind]
    assert references_of(dataset) == (series, instances)


@pytest.mark.parametrize("name", ["sts_ct", "sts_mr", "sts_pet"])
def test_real_contours_name_the_series_that_they_belong_to(name):
    folder = files_of(name)[0].parent.parent
    images = [pydicom.dcmread(path, stop_before_pixels=True) for path in files_of(name)]
    series, instances = references_of(pydicom.dcmread(folder / "mask" / "RS.dcm"))
    assert series == {images[0].SeriesInstanceUID}
    # The images came later, resampled under UIDs of their own.
    assert len(instances) >= len(images)


def test_real_segmentations_name_the_series_that_they_were_drawn_on():
    source = {
        str(pydicom.dcmread(path).SeriesInstanceUID)
        for path in (DATA / "ct_tiny").iterdir()
        if path.name != "LICENSE"
    }
    found = [
        references_of(pydicom.dcmread(path)) for path in sorted((DATA / "seg_tiny").glob("*.dcm"))
    ]
    assert found
    assert all(series == source and instances for series, instances in found)


def test_damaged_elements_hide_no_reference():
    dataset = item(Modality="SR", CurrentRequestedProcedureEvidenceSequence=EVIDENCE)
    for target in (dataset, EVIDENCE[0]):
        for keyword, vr, value in (
            ("DiffusionBValue", "FD", b"123"),
            ("SeriesDescription", "ZZ", b"x"),
            ("UID", "QQ", b"1.4"),
        ):
            tag = pydicom.tag.Tag(pydicom.datadict.tag_for_keyword(keyword))
            target._dict[tag] = pydicom.dataelem.RawDataElement(
                tag, vr, len(value), value, 0, False, True
            )
    with pytest.raises(Exception, match=r"Expected total bytes|Unknown Value"):
        list(dataset)
    assert references_of(dataset) == ({"1.4"}, BOTH)
