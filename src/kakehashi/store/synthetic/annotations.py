"""What is true of a series, as DICOM SEG (organs) and RTSTRUCT (lesions)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from pydicom import Dataset, uid
from pydicom.pixels.utils import pack_bits

from kakehashi.store.synthetic.headers import code, common, items

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from kakehashi.store.synthetic.plan import Plan
    from kakehashi.store.synthetic.protocols import SeriesPlan
    from kakehashi.store.synthetic.render import Body, Lesion
    from kakehashi.store.synthetic.scan import Grid

_CODES: Mapping[str, tuple[str, str]] = {
    "lung_right": ("3341006", "Right lung"),
    "lung_left": ("44029006", "Left lung"),
    "heart": ("80891009", "Heart"),
    "aorta": ("15825003", "Aorta"),
    "vena_cava": ("64131007", "Inferior vena cava"),
    "gallbladder": ("28231008", "Gallbladder"),
    "stomach": ("69695003", "Stomach"),
    "spleen": ("78961009", "Spleen"),
    "liver": ("10200004", "Liver"),
    "psoas_right": ("68455001", "Iliopsoas muscle"),
    "psoas_left": ("68455001", "Iliopsoas muscle"),
    "kidney_right": ("9846003", "Right kidney"),
    "kidney_left": ("18639004", "Left kidney"),
    "pancreas": ("15776009", "Pancreas"),
    "bladder": ("89837001", "Urinary bladder"),
    "cerebellum": ("113305005", "Cerebellum"),
    "brainstem": ("15926001", "Brainstem"),
    "hemisphere_right": ("83678007", "Cerebral hemisphere"),
    "hemisphere_left": ("83678007", "Cerebral hemisphere"),
    "ventricle_right": ("66720007", "Lateral ventricle"),
    "ventricle_left": ("66720007", "Lateral ventricle"),
}
_CORNERS = 48


def segmentation(
    plan: Plan,
    series: SeriesPlan,
    labels: NDArray[np.uint8],
    grid: Grid,
    *,
    names: Mapping[int, str],
    source: Sequence[tuple[str, str]],
) -> Dataset:
    """Return the labels of a series as DICOM SEG.

    Parameters
    ----------
    plan : Plan
    series : SeriesPlan
        Of the SEG.
    labels : ndarray of uint8, shape (slices, rows, columns)
    grid : Grid
        Of the series that is labelled.
    names : mapping
        Label to name of an organ or lesion.
    source : sequence of (SOP Class UID, SOP Instance UID)
        The image of each slice.
    """
    about = next(item for item in plan.series if item.number == series.source)
    found = common(plan, series, uid.SegmentationStorage, None)
    found.SOPInstanceUID = plan.uid("seg")
    found.InstanceNumber = 1
    found.ContentDate, found.ContentTime = found.SeriesDate, found.SeriesTime
    found.ImageType = ["DERIVED", "PRIMARY"]
    found.ContentLabel = "ORGANS"
    found.ContentDescription = "True labels of a synthetic body"
    found.ContentCreatorName = plan.reading.dicom(half_width=plan.hospital.half_width)
    found.SegmentationType = "BINARY"
    found.SamplesPerPixel = 1
    found.PhotometricInterpretation = "MONOCHROME2"
    found.PixelRepresentation = 0
    found.BitsAllocated = found.BitsStored = 1
    found.HighBit = 0
    found.LossyImageCompression = "00"
    found.Rows, found.Columns = grid.rows, grid.columns
    found.FrameOfReferenceUID = plan.frame_uid(about)
    found.PositionReferenceIndicator = ""
    _dimensions(found, plan)
    _shared(found, about, grid)
    present = [label for label in sorted(names) if (labels == label).any()]
    found.SegmentSequence = items(
        *(_segment(number, names[label]) for number, label in enumerate(present, 1))
    )
    series_item = Dataset()
    series_item.SeriesInstanceUID = plan.series_uid(about)
    series_item.ReferencedInstanceSequence = items(*(_reference(*pair) for pair in source))
    found.ReferencedSeriesSequence = items(series_item)
    frames: list[Dataset] = []
    bits: list[NDArray[np.uint8]] = []
    for number, label in enumerate(present, 1):
        mask = labels == label
        for k in np.flatnonzero(mask.any(axis=(1, 2))).tolist():
            frames.append(_frame(number, k, grid, source[k]))
            bits.append(mask[k].astype(np.uint8))
    found.PerFrameFunctionalGroupsSequence = items(*frames)
    found.NumberOfFrames = len(frames)
    found.PixelData = pack_bits(np.stack(bits).ravel(), pad=True)
    return found


def _reference(sop_class: str, instance: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = sop_class
    item.ReferencedSOPInstanceUID = instance
    return item


def _dimensions(found: Dataset, plan: Plan) -> None:
    organization = Dataset()
    organization.DimensionOrganizationUID = plan.uid("dimensions")
    found.DimensionOrganizationSequence = items(organization)
    indices = []
    for pointer, group in ((0x0062000B, 0x0062000A), (0x00200032, 0x00209113)):
        index = Dataset()
        index.DimensionOrganizationUID = plan.uid("dimensions")
        index.DimensionIndexPointer = pointer
        index.FunctionalGroupPointer = group
        indices.append(index)
    found.DimensionIndexSequence = items(*indices)


def _shared(found: Dataset, about: SeriesPlan, grid: Grid) -> None:
    measures = Dataset()
    measures.PixelSpacing = [grid.spacing, grid.spacing]
    measures.SliceThickness = about.thickness
    measures.SpacingBetweenSlices = about.interval
    orientation = Dataset()
    orientation.ImageOrientationPatient = [1, 0, 0, *grid.column]
    shared = Dataset()
    shared.PixelMeasuresSequence = items(measures)
    shared.PlaneOrientationSequence = items(orientation)
    found.SharedFunctionalGroupsSequence = items(shared)


def _segment(number: int, name: str) -> Dataset:
    item = Dataset()
    item.SegmentNumber = number
    item.SegmentLabel = name
    item.SegmentAlgorithmType = "AUTOMATIC"
    item.SegmentAlgorithmName = "synthetic"
    if name in _CODES:
        value, meaning = _CODES[name]
        item.SegmentedPropertyCategoryCodeSequence = items(
            code("123037004", "SCT", "Anatomical Structure")
        )
        item.SegmentedPropertyTypeCodeSequence = items(code(value, "SCT", meaning))
    else:
        item.SegmentedPropertyCategoryCodeSequence = items(
            code("49755003", "SCT", "Morphologically Abnormal Structure")
        )
        item.SegmentedPropertyTypeCodeSequence = items(code("52988006", "SCT", "Lesion"))
    return item


def _frame(number: int, k: int, grid: Grid, source: tuple[str, str]) -> Dataset:
    content = Dataset()
    content.DimensionIndexValues = [number, k + 1]
    position = Dataset()
    position.ImagePositionPatient = list(grid.position(k))
    segment = Dataset()
    segment.ReferencedSegmentNumber = number
    image = _reference(*source)
    image.PurposeOfReferenceCodeSequence = items(
        code("121322", "DCM", "Source image for image processing operation")
    )
    derivation = Dataset()
    derivation.SourceImageSequence = items(image)
    derivation.DerivationCodeSequence = items(code("113076", "DCM", "Segmentation"))
    frame = Dataset()
    frame.FrameContentSequence = items(content)
    frame.PlanePositionSequence = items(position)
    frame.SegmentIdentificationSequence = items(segment)
    frame.DerivationImageSequence = items(derivation)
    return frame


def contours(
    plan: Plan, series: SeriesPlan, body: Body, grid: Grid, source: Sequence[tuple[str, str]]
) -> Dataset:
    """Return the lesions' outlines, exact on each slice, as RTSTRUCT.

    Parameters
    ----------
    plan : Plan
    series : SeriesPlan
        Of the RTSTRUCT.
    body : Body
    grid : Grid
        Of the series on which they are drawn.
    source : sequence of (SOP Class UID, SOP Instance UID)
        The image of each slice.
    """
    about = next(item for item in plan.series if item.number == series.source)
    found = common(plan, series, uid.RTStructureSetStorage, None)
    found.SOPInstanceUID = plan.uid("rtstruct")
    found.InstanceNumber = 1
    found.StructureSetLabel = "LESIONS"
    found.StructureSetName = f"{''.join(plan.person.name.kanji)} 病変"
    found.StructureSetDate, found.StructureSetTime = found.SeriesDate, found.SeriesTime
    found.FrameOfReferenceUID = plan.frame_uid(about)
    found.PositionReferenceIndicator = ""
    images = Dataset()
    images.SeriesInstanceUID = plan.series_uid(about)
    images.ContourImageSequence = items(*(_reference(*pair) for pair in source))
    study = Dataset()
    study.ReferencedSOPClassUID = "1.2.840.10008.3.1.2.3.1"
    study.ReferencedSOPInstanceUID = plan.study_uid
    study.RTReferencedSeriesSequence = items(images)
    reference = Dataset()
    reference.FrameOfReferenceUID = plan.frame_uid(about)
    reference.RTReferencedStudySequence = items(study)
    found.ReferencedFrameOfReferenceSequence = items(reference)
    rois, outlines, observations = [], [], []
    for number, lesion in enumerate(body.lesions, 1):
        roi = Dataset()
        roi.ROINumber = number
        roi.ReferencedFrameOfReferenceUID = plan.frame_uid(about)
        roi.ROIName = f"lesion_{number}"
        roi.ROIGenerationAlgorithm = "MANUAL"
        rois.append(roi)
        outline = Dataset()
        outline.ROIDisplayColor = [255, 64, 64]
        outline.ContourSequence = items(*_outlines(plan, lesion, grid, source))
        outline.ReferencedROINumber = number
        outlines.append(outline)
        observation = Dataset()
        observation.ObservationNumber = number
        observation.ReferencedROINumber = number
        observation.RTROIInterpretedType = "GTV"
        observation.ROIInterpreter = plan.reading.dicom(half_width=plan.hospital.half_width)
        observations.append(observation)
    found.StructureSetROISequence = items(*rois)
    found.ROIContourSequence = items(*outlines)
    found.RTROIObservationsSequence = items(*observations)
    found.ApprovalStatus = "UNAPPROVED"
    return found


def _outlines(
    plan: Plan, lesion: Lesion, grid: Grid, source: Sequence[tuple[str, str]]
) -> list[Dataset]:
    """Return the ellipse in which each plane cuts a lesion, for planes turned about x."""
    across = np.array(grid.column)
    normal = grid.normal
    centre = np.array(lesion.centre) + plan.offset
    rx, ry, rz = lesion.radii
    # In a plane at distance d along the normal, points are centre + d n + u x + v c. With
    # (y, z) of n and c, the ellipsoid is u2/rx2 + a v2 + 2 b d v + c d2 = 1.
    a = across[1] ** 2 / ry**2 + across[2] ** 2 / rz**2
    b = across[1] * normal[1] / ry**2 + across[2] * normal[2] / rz**2
    c = normal[1] ** 2 / ry**2 + normal[2] ** 2 / rz**2
    found = []
    for k in range(grid.slices):
        d = float((np.array(grid.position(k)) - centre) @ normal)
        middle = -b * d / a
        left = 1 - c * d * d + b * b * d * d / a
        if left <= 0.01:
            continue
        turn = np.arange(_CORNERS) * (2 * math.pi / _CORNERS)
        u = rx * math.sqrt(left) * np.cos(turn)
        v = middle + math.sqrt(left / a) * np.sin(turn)
        points = centre + d * normal + np.outer(u, (1, 0, 0)) + np.outer(v, across)
        item = Dataset()
        item.ContourImageSequence = items(_reference(*source[k]))
        item.ContourGeometricType = "CLOSED_PLANAR"
        item.NumberOfContourPoints = _CORNERS
        item.ContourData = [round(value, 6) for value in points.ravel().tolist()]
        found.append(item)
    return found
