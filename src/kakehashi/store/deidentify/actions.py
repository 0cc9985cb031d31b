"""What is done with each attribute: PS3.15 Table E.1-1, our options, and a rule for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from functools import cache, lru_cache

from dicomanonymizer.dicom_anonymization_databases import (
    dicomfields_2026c as table,
)
from pydicom.datadict import dictionary_VM, dictionary_VR, tag_for_keyword

TABLE_EDITION = "2026c"


class Action(Enum):
    """What is done with an element."""

    REMOVE = auto()
    EMPTY = auto()
    DUMMY = auto()  # a value that says nothing
    UID = auto()  # the keyed hash of it
    DAY = auto()  # moved by the person's days; a time stays
    AGE = auto()
    CLEAN = auto()  # only words of the vocabulary
    TEXT = auto()  # a maker's text: kept unless it holds or shows something of a person
    DEVICE = auto()  # what people on site call a device: kept if each word of it is known
    CODE = auto()  # kept if it is a code, and its meaning the standard's
    REPORT = auto()  # free text of a structured report; elsewhere as CLEAN
    NUMBER = auto()  # kept if it is a number (or a code string)
    BULK = auto()  # bytes, kept as they are
    PATIENT_ID = auto()
    PATIENT_NAME = auto()
    ITEMS = auto()  # a sequence: the same for the elements of its items


@dataclass(frozen=True, slots=True)
class Rule:
    """What is done with the elements of one tag.

    Attributes
    ----------
    action : Action
    vr : str
        By the dictionary; of several possible ones the first. Empty if the tag is not known.
    most : int
        Values that it may have; 0 if there is no bound.
    """

    action: Action
    vr: str
    most: int


def tags_of(keywords: str) -> frozenset[int]:
    """Return the tags of attributes, by their keywords."""
    tags = {keyword: tag_for_keyword(keyword) for keyword in keywords.split()}
    if unknown := [keyword for keyword, tag in tags.items() if tag is None]:
        raise KeyError(f"not in the dictionary: {', '.join(unknown)}")
    return frozenset(tag for tag in tags.values() if tag is not None)


def words_of(text: str) -> frozenset[str]:
    """Return the words of a list that is written as one text."""
    return frozenset(text.split())


# The columns of the options in PS3.15 Table E.1-1, as far as we follow them with more than
# removal; where such a column says C (clean), removal is the strictest way to clean.

# Rtn. Dev. Id. Opt.; titles of application entities and what was only scheduled go.
_DEVICE = tags_of(
    "CassetteID DetectorID DeviceDescription DeviceLabel DeviceSerialNumber GantryID "
    "GeneratorID LensMake LensModel LensSerialNumber LensSpecification "
    "ManufacturerDeviceIdentifier PerformedStationName PlateID SourceManufacturer "
    "SourceSerialNumber StationName TreatmentMachineName UniqueDeviceIdentifier XRayDetectorID "
    "XRayDetectorLabel XRaySourceID"
)
_DEVICE_UIDS = tags_of("DeviceUID ManufacturerDeviceClassUID")
_DEVICE_ITEMS = tags_of("UDISequence PerformedStationNameCodeSequence")
# Rtn. Pat. Chars. Opt.
_PATIENT = tags_of(
    "PatientSex PatientSize PatientWeight PatientSexNeutered PregnancyStatus SmokingStatus"
)
_PATIENT_WORDS = tags_of("EthnicGroup Allergies PreMedication")
# Rtn. Long. Modif. Dates Opt.: every date and time of the table but those of a birth.
_BIRTH = tags_of("PatientBirthDate PatientBirthTime")
# Clean Desc. Opt.
_DESCRIPTORS = tags_of(
    "StudyDescription SeriesDescription ProtocolName AcquisitionProtocolDescription "
    "AcquisitionDeviceProcessingDescription AcquisitionFieldOfViewLabel ContrastBolusAgent "
    "DerivationDescription DeviceSettingDescription MultienergyAcquisitionDescription "
    "DecompositionDescription RequestedSeriesDescription "
    "RespiratoryMotionCompensationTechniqueDescription PerformedProcedureStepDescription "
    "RequestedProcedureDescription RequestedContrastAgent ImageComments FrameComments "
    "ModifiedImageDescription LongDeviceDescription RadiationGenerationModeDescription "
    "ROIName ROIDescription ROIGenerationDescription ROIObservationLabel "
    "ROIObservationDescription StructureSetLabel StructureSetName StructureSetDescription "
    "UserContentLabel UserContentLongLabel EntityLabel EntityLongLabel TreatmentSite "
    "RTPlanLabel EquipmentFrameOfReferenceDescription AcquisitionComments "
    "ScheduledProcedureStepDescription"
)

# Attributes that the table does not name. Of these all text goes but what is listed here.
_CLEANED = tags_of(
    "AcquisitionProtocolName BodyPartExamined SegmentLabel SegmentDescription ContentDescription "
    "ContentLabel LUTExplanation LUTLabel ContrastBolusRoute EnergyWindowName "
    "DimensionDescriptionLabel AcquisitionDeviceProcessingCode WindowCenterWidthExplanation "
    "ReconstructionDescription RadiopharmaceuticalRoute InterventionDrugName StackID "
    "PositionReferenceIndicator"
)
_KEPT = tags_of(
    "Manufacturer ManufacturerModelName SoftwareVersions ConvolutionKernel SequenceName "
    "PulseSequenceName ReceiveCoilName TransmitCoilName ImagedNucleus Radiopharmaceutical "
    "RescaleType ReconstructionMethod AttenuationCorrectionMethod ScatterCorrectionMethod "
    "FilterType CollimatorGridName SegmentAlgorithmName AlgorithmName AlgorithmVersion "
    "ModalityLUTType DetectorManufacturerName DetectorManufacturerModelName "
    "MultiCoilElementName"
)
_CODES = tags_of(
    "CodeValue LongCodeValue URNCodeValue CodeMeaning CodingSchemeDesignator CodingSchemeVersion"
)
# Bytes that are numbers of the image.
_BULK = tags_of(
    "PixelData FloatPixelData DoubleFloatPixelData ExtendedOffsetTable "
    "ExtendedOffsetTableLengths LUTData RedPaletteColorLookupTableData "
    "GreenPaletteColorLookupTableData BluePaletteColorLookupTableData "
    "AlphaPaletteColorLookupTableData SegmentedRedPaletteColorLookupTableData "
    "SegmentedGreenPaletteColorLookupTableData SegmentedBluePaletteColorLookupTableData "
    "VectorGridData VertexPointIndexList EdgePointIndexList TrianglePointIndexList "
    "PointCoordinatesData VectorCoordinateData LongPrimitivePointIndexList "
    "LongEdgePointIndexList LongTrianglePointIndexList LongVertexPointIndexList"
)
_PATIENT_ID = tags_of("PatientID")
_PATIENT_NAME = tags_of("PatientName")
_PATIENT_AGE = tags_of("PatientAge")
_TEXT_VALUE = tags_of("TextValue")
_REMOVED_ITEMS = tags_of("PersonIdentificationCodeSequence FlowIdentifierSequence")

_NUMBERS = words_of("AT CS DS FD FL IS SL SS SV UL US UV")
_DAYS = frozenset(("DA", "DT", "TM"))
_BYTES = words_of("OB OD OF OL OV OW UN")
_OPEN = (0x0008, 0x7FE0)
"""Groups of data sets; below are those of messages, files and folders."""


@cache
def table_actions() -> dict[int, Action]:
    """Return what the table asks for, with our options, by tag.

    Tags of repeating groups (overlays, curves) are not in it; all of these are removed.
    """
    plain = {
        Action.DUMMY: table.D_TAGS,
        Action.EMPTY: [*table.Z_TAGS, *table.Z_D_TAGS],
        Action.REMOVE: [*table.X_TAGS, *table.X_Z_TAGS, *table.X_D_TAGS, *table.X_Z_D_TAGS],
        Action.UID: table.U_TAGS,
        Action.ITEMS: table.X_Z_U_STAR_TAGS,
    }
    return {
        tag: _with_options(tag, action)
        for action, tags in plain.items()
        for tag in (group << 16 | element for group, element, *masks in tags if not masks)
    }


def _with_options(tag: int, action: Action) -> Action:
    vr = _vr(tag)
    options = (
        (Action.PATIENT_ID, _PATIENT_ID),
        (Action.PATIENT_NAME, _PATIENT_NAME),
        (Action.AGE, _PATIENT_AGE),
        (Action.REMOVE, _REMOVED_ITEMS),
        (Action.DEVICE, _DEVICE),
        (Action.NUMBER, _DEVICE_UIDS | _PATIENT),
        (Action.ITEMS, _DEVICE_ITEMS),
        (Action.CLEAN, _PATIENT_WORDS | _DESCRIPTORS),
    )
    for option, tags in options:
        if tag in tags:
            return option
    if vr in _DAYS and tag not in _BIRTH:
        return Action.DAY
    if tag == tag_for_keyword("TimezoneOffsetFromUTC"):
        return Action.NUMBER
    if action is Action.DUMMY and vr in ("SQ", "UI"):
        return Action.ITEMS if vr == "SQ" else Action.UID
    if vr in _BYTES and action is Action.DUMMY:
        return Action.REMOVE
    return action


@lru_cache(maxsize=65536)
def rule_of(tag: int) -> Rule:
    """Return what is done with the elements of a tag that is not private.

    What the table does not name is decided by its VR: numbers, code strings, dates, UIDs and
    sequences are dealt with as such; text goes unless it is on a list of ours; bytes go
    unless they are the image's; tags that the dictionary does not know go.
    """
    vr = _vr(tag)
    group = tag >> 16
    repeating = group & 0xFF00 in (0x5000, 0x6000)
    if not vr or repeating or not _OPEN[0] <= group <= _OPEN[1] or tag & 0xFFFF == 0:
        return Rule(Action.REMOVE, vr, 0)
    action = table_actions().get(tag) or _default(tag, vr)
    return Rule(action, vr, _most(tag))


def _default(tag: int, vr: str) -> Action:
    lists = (
        (Action.CODE, _CODES),
        (Action.CLEAN, _CLEANED),
        (Action.TEXT, _KEPT),
        (Action.REPORT, _TEXT_VALUE),
        (Action.BULK, _BULK),
    )
    for action, tags in lists:
        if tag in tags:
            return action
    if vr in _NUMBERS:
        return Action.NUMBER
    if vr in _DAYS:
        return Action.DAY
    return {"UI": Action.UID, "SQ": Action.ITEMS}.get(vr, Action.REMOVE)


def _vr(tag: int) -> str:
    try:
        return dictionary_VR(tag).split(" or ")[0]
    except KeyError:
        return ""


def _most(tag: int) -> int:
    try:
        last = dictionary_VM(tag).split("-")[-1]
    except KeyError:
        return 0
    return int(last) if last.isdigit() else 0
