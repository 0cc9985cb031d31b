"""One received DICOM file: what it is, where its pixel data lie, and its image planes."""

from __future__ import annotations

import hashlib
import io
import re
import struct
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pydicom
from pydicom import uid
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_partial

from kakehashi.errors import PackError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

UID = re.compile(r"[0-9][0-9.]{0,63}")
PIXEL_DATA = 0x7FE00010

PACKABLE = frozenset(
    {
        uid.CTImageStorage,
        uid.EnhancedCTImageStorage,
        uid.LegacyConvertedEnhancedCTImageStorage,
        uid.MRImageStorage,
        uid.EnhancedMRImageStorage,
        uid.LegacyConvertedEnhancedMRImageStorage,
        uid.PositronEmissionTomographyImageStorage,
        uid.EnhancedPETImageStorage,
        uid.LegacyConvertedEnhancedPETImageStorage,
    }
)
"""SOP classes whose images are packed; all others are kept as they came."""

_SERIES_UID = 0x0020000E
# pydicom raises OSError, without a number, for a sequence that is cut.
DAMAGE = (
    InvalidDicomError,
    BytesLengthException,
    AttributeError,
    EOFError,
    NotImplementedError,
    OSError,
    ValueError,
    struct.error,
)
"""What pydicom raises where a file or a value is damaged."""
_ITEM, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE0DD
# Series Instance UID, and Source series for segmentation (PS3.16, context group DCM).
_SERIES_CONCEPTS = frozenset({("112002", "DCM"), ("121232", "DCM")})
_UNDEFINED = 0xFFFFFFFF
_LONG_FORM = frozenset({b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"UN"})


@dataclass(frozen=True, slots=True)
class Instance:
    """A DICOM file that was read whole and has readable pixel data.

    Attributes
    ----------
    path : Path
    sha256 : str
        Of the file as received.
    size : int
        Bytes of the file as received.
    dataset : pydicom.Dataset
        All attributes but the pixel data.
    header : bytes
        The file with the element Pixel Data cut out.
    cut_at : int
        Offset of the cut.
    cut_element : bytes
        Tag, VR and length of the element that was cut out.
    """

    path: Path
    sha256: str
    size: int
    dataset: pydicom.Dataset
    header: bytes
    cut_at: int
    cut_element: bytes

    @property
    def sop(self) -> str:
        """SOPInstanceUID."""
        return str(self.dataset.SOPInstanceUID)

    def raw(self) -> bytes:
        """Read the file again.

        Raises
        ------
        PackError
            It is not what it was.
        """
        raw = self.path.read_bytes()
        if hashlib.sha256(raw).hexdigest() != self.sha256:
            raise PackError(f"{self.path} changed while it was being read")
        return raw

    def stored(self, frame: int) -> NDArray[Any] | None:  # noqa: ARG002 - for kinds that know it
        """Return a frame's stored values where they are there without decoding, else None."""
        return None

    def pixel_bytes(self) -> bytes:
        """Return the value of the pixel data, as it stands in the file."""
        start = self.cut_at + len(self.cut_element)
        return self.raw()[start : self.cut_at + self.size - len(self.header)]


@dataclass(frozen=True, slots=True)
class Plane:
    """One image plane: a frame of an instance, with its place and rescale.

    Attributes
    ----------
    instance, frame : int
        Index of the instance and of the frame in it, from 0.
    position : tuple of 3 float
        Image Position (Patient), mm, LPS.
    orientation : tuple of 6 float
        Image Orientation (Patient).
    spacing : tuple of 2 float
        Pixel Spacing: between rows, between columns, mm.
    thickness : float or None
        Spacing Between Slices or else Slice Thickness, mm.
    slope, intercept : float
    unit : str
    """

    instance: int
    frame: int
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]
    thickness: float | None
    slope: float
    intercept: float
    unit: str


@contextmanager
def tolerant() -> Iterator[None]:
    """Read attributes that break a rule of DICOM without a word.

    They are kept as they came; judging the senders is not the store's business.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_head(path: Path) -> pydicom.Dataset | None:
    """Return the attributes of a file up to its pixel data, None if it is not DICOM.

    Of a file that is damaged further down, only what says which series it belongs to.
    """
    for last in (PIXEL_DATA - 1, _SERIES_UID):
        try:
            with path.open("rb") as file, tolerant():
                return read_partial(file, stop_when=partial(_after, last))
        except DAMAGE as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
    return None


def _after(last: int, tag: int, _vr: str | None, _length: int) -> bool:
    return tag > last


def read_instance(path: Path) -> Instance:
    """Read a file whole and find its pixel data.

    Raises
    ------
    PackError
        It is not DICOM, is truncated, has no pixel data, or is deflated.
    """
    raw = path.read_bytes()
    source = io.BytesIO(raw)
    try:
        with tolerant():
            dataset = read_partial(source, stop_when=partial(_after, PIXEL_DATA - 1))
            syntax = dataset.file_meta.TransferSyntaxUID
            implicit, little = dataset.original_encoding
            start = source.tell()
            if syntax == uid.DeflatedExplicitVRLittleEndian:
                raise PackError("deflated transfer syntax; send it uncompressed or as JPEG 2000")
            if raw[start : start + 4] != (b"\xe0\x7f\x10\x00" if little else b"\x7f\xe0\x00\x10"):
                raise PackError("no pixel data: the file is truncated or holds no image")
            element, end = _pixel_element(raw, start, implicit=bool(implicit), little=bool(little))
            header = raw[:start] + raw[end:]
            if end < len(raw):
                dataset = pydicom.dcmread(io.BytesIO(header))
            length = end - start - len(element)
            _check_length(dataset, length, encapsulated=syntax.is_encapsulated)
    except DAMAGE as error:
        raise PackError(f"not readable as DICOM: {error or type(error).__name__}") from error
    return Instance(
        path=path,
        sha256=hashlib.sha256(raw).hexdigest(),
        size=len(raw),
        dataset=dataset,
        header=header,
        cut_at=start,
        cut_element=element,
    )


def _pixel_element(raw: bytes, start: int, *, implicit: bool, little: bool) -> tuple[bytes, int]:
    """Return the element's header and where the element ends."""
    order = "<" if little else ">"
    if not implicit and raw[start + 4 : start + 6] in _LONG_FORM:
        value = start + 12
    elif implicit:
        value = start + 8
    else:
        raise PackError(f"pixel data have the value representation {raw[start + 4 : start + 6]!r}")
    if value > len(raw):
        raise PackError("truncated: the file ends at the start of the pixel data")
    (length,) = struct.unpack(f"{order}I", raw[value - 4 : value])
    if length != _UNDEFINED:
        if value + length > len(raw):
            raise PackError(
                f"truncated: {length} bytes of pixel data are announced, "
                f"{len(raw) - value} are there"
            )
        return raw[start:value], value + length
    position = value
    while position + 8 <= len(raw):
        group, element, length = struct.unpack_from("<HHI", raw, position)
        position += 8
        tag = group << 16 | element
        if tag == _SEQUENCE_END:
            return raw[start:value], position
        if tag != _ITEM or length == _UNDEFINED:
            raise PackError("compressed pixel data are damaged: a fragment does not begin properly")
        position += length
    raise PackError("truncated: compressed pixel data have no end")


def _check_length(dataset: pydicom.Dataset, length: int, *, encapsulated: bool) -> None:
    rows, columns, bits = (positive(dataset, name) for name in ("Rows", "Columns", "BitsAllocated"))
    samples = int(dataset.get("SamplesPerPixel") or 1)
    expected = (rows * columns * bits * frames_of(dataset) * samples + 7) // 8
    if not encapsulated and length < expected:
        raise PackError(f"truncated: {length} bytes of pixel data where {expected} are needed")


def attribute(dataset: pydicom.Dataset, name: str) -> Any:
    """Return an attribute's value, None if there is none or it is damaged."""
    try:
        return dataset.get(name)
    except DAMAGE:
        return None


def foreign(dataset: pydicom.Dataset) -> str | None:
    """Say why an object is no image of a kind that is packed, None if it is one."""
    sop_class = str(attribute(dataset, "SOPClassUID") or "")
    if sop_class not in PACKABLE:
        name = uid.UID(sop_class).name if sop_class else "an object without SOP Class UID"
        return f"{name}: not a CT, MR or PET image"
    for name in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
        if not UID.fullmatch(str(attribute(dataset, name))):
            return f"{name} is missing or not a valid UID"
    return None


def refusal(dataset: pydicom.Dataset) -> str | None:
    """Say why an image is not one to be packed, None if it is.

    Parameters
    ----------
    dataset : pydicom.Dataset
        The attributes, at least up to the pixel data.
    """
    if reason := foreign(dataset):
        return reason
    monochrome = str(attribute(dataset, "PhotometricInterpretation")).startswith("MONOCHROME")
    bits = attribute(dataset, "BitsAllocated")
    reasons = {
        "localizer": "LOCALIZER" in _texts(dataset, "ImageType"),
        "colour image": attribute(dataset, "SamplesPerPixel") not in (None, 1) or not monochrome,
        f"{bits} bits allocated; 8, 16 or 32 are possible": bits not in (8, 16, 32),
        "modality look-up table instead of slope and intercept": "ModalityLUTSequence" in dataset,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def frames_of(dataset: pydicom.Dataset) -> int:
    """Return the number of frames of an image."""
    return positive(dataset, "NumberOfFrames") if dataset.get("NumberOfFrames") else 1


def planes_of(index: int, dataset: pydicom.Dataset) -> list[Plane]:
    """Return the image planes of an instance.

    Parameters
    ----------
    index : int
        The instance's index, to be put into the planes.
    dataset : pydicom.Dataset
        A single-frame image, or a multi-frame one with functional groups.

    Raises
    ------
    PackError
        An attribute that places the image is missing or not a number.
    """
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence")
    frames = frames_of(dataset)
    if not per_frame and frames > 1:
        raise PackError(f"{frames} frames without functional groups that place them")
    if per_frame and len(per_frame) != frames:
        raise PackError(f"{frames} frames, but functional groups for {len(per_frame)}")
    return [_plane(index, frame, scopes_of(dataset, frame), dataset) for frame in range(frames)]


def scopes_of(dataset: pydicom.Dataset, frame: int) -> list[pydicom.Dataset]:
    """Return where the attributes of a frame stand, the most special place first.

    For a single-frame image that is the object itself, else the frame's functional groups, then
    the shared ones, which both may hold unassigned attributes of the images converted.
    """
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence")
    if not per_frame:
        return [dataset]
    scopes = []
    for group, unassigned in (
        (per_frame[frame], "UnassignedPerFrameConvertedAttributesSequence"),
        *(
            (shared, "UnassignedSharedConvertedAttributesSequence")
            for shared in dataset.get("SharedFunctionalGroupsSequence") or []
        ),
    ):
        scopes += [group, *(group.get(unassigned) or [])]
    return scopes


def _plane(
    index: int, frame: int, scopes: list[pydicom.Dataset], dataset: pydicom.Dataset
) -> Plane:
    def find(sequence: str, name: str) -> Any:
        for scope in scopes:
            if scope is dataset:
                return scope.get(name)
            if items := scope.get(sequence):
                return items[0].get(name)
        return None

    thickness = find("PixelMeasuresSequence", "SpacingBetweenSlices") or find(
        "PixelMeasuresSequence", "SliceThickness"
    )
    slope = find("PixelValueTransformationSequence", "RescaleSlope")
    intercept = find("PixelValueTransformationSequence", "RescaleIntercept")
    return Plane(
        instance=index,
        frame=frame,
        position=_numbers(find("PlanePositionSequence", "ImagePositionPatient"), 3, "position"),
        orientation=_numbers(
            find("PlaneOrientationSequence", "ImageOrientationPatient"), 6, "orientation"
        ),
        spacing=_numbers(find("PixelMeasuresSequence", "PixelSpacing"), 2, "pixel spacing"),
        thickness=None if thickness is None else abs(_float(thickness, "slice thickness")),
        slope=1.0 if slope is None else _float(slope, "rescale slope"),
        intercept=0.0 if intercept is None else _float(intercept, "rescale intercept"),
        unit=_unit(dataset, find("PixelValueTransformationSequence", "RescaleType")),
    )


def _unit(dataset: pydicom.Dataset, rescale_type: Any) -> str:
    if units := dataset.get("Units"):
        return str(units)
    if rescale_type:
        return str(rescale_type)
    # PS3.3 C.8.2.1.1.2: without a type, the values of a CT image are in Hounsfield units.
    return "HU" if dataset.get("Modality") == "CT" else ""


def _numbers(value: Any, count: int, what: str) -> tuple[float, ...]:
    if value is None or len(np.atleast_1d(value)) != count:
        raise PackError(f"no image {what}: the image cannot be placed in the patient")
    return tuple(_float(part, what) for part in value)


def _float(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise PackError(f"{what} is not a number: {value!r}") from error
    if not np.isfinite(number):
        raise PackError(f"{what} is not a finite number: {value!r}")
    return number


def positive(dataset: pydicom.Dataset, name: str) -> int:
    """Return an attribute that must be a whole number above 0."""
    value = attribute(dataset, name)
    if not isinstance(value, int) or value <= 0:
        raise PackError(f"{name} is missing or not a positive number: {value!r}")
    return value


def _texts(dataset: pydicom.Dataset, name: str) -> list[str]:
    value = attribute(dataset, name)
    if value is None:
        return []
    return [str(part) for part in ([value] if isinstance(value, str) else value)]


def references_of(dataset: pydicom.Dataset) -> tuple[set[str], set[str]]:
    """Return the series and the instances that an object refers to.

    Parameters
    ----------
    dataset : pydicom.Dataset
        E.g. an RTSTRUCT, SEG, SR, key object selection, presentation state or secondary capture.

    Returns
    -------
    series, instances : set of str
        SeriesInstanceUIDs and SOPInstanceUIDs found in its sequences, at any depth, and series
        that the content of a report names (PS3.16 TID 1411).
    """
    series: set[str] = set()
    instances: set[str] = set()
    pending = list(_items(dataset))
    while pending:
        item = pending.pop()
        if found := attribute(item, "SeriesInstanceUID"):
            series.add(str(found))
        if found := attribute(item, "ReferencedSOPInstanceUID"):
            instances.add(str(found))
        if (found := attribute(item, "UID")) and _concept(item) in _SERIES_CONCEPTS:
            series.add(str(found))
        pending += _items(item)
    return series, instances


def _items(dataset: pydicom.Dataset) -> Iterator[pydicom.Dataset]:
    """Yield the items of all sequences; what is damaged has none."""
    for tag in list(dataset.keys()):
        try:
            element = dataset[tag]
        except DAMAGE:
            continue
        if element.VR == "SQ":
            yield from element.value


def _concept(item: pydicom.Dataset) -> tuple[str, str] | None:
    """Return code and scheme of what a content item of a report is about."""
    if not (names := attribute(item, "ConceptNameCodeSequence")):
        return None
    code, scheme = (attribute(names[0], name) for name in ("CodeValue", "CodingSchemeDesignator"))
    return str(code), str(scheme)
