"""Which objects must not go into the store, and which may show whom they are of."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

from pydicom import uid
from pydicom._uid_dict import UID_dictionary

from kakehashi.store.deidentify import vocabulary
from kakehashi.store.deidentify.actions import tags_of, words_of
from kakehashi.store.deidentify.vocabulary import Region
from kakehashi.store.dicom import PACKABLE, UID

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kakehashi.store.deidentify.tree import Node

REPORTS = frozenset(
    {
        uid.BasicTextSRStorage,
        uid.EnhancedSRStorage,
        uid.ComprehensiveSRStorage,
        uid.Comprehensive3DSRStorage,
        uid.ExtensibleSRStorage,
        uid.KeyObjectSelectionDocumentStorage,
        uid.ChestCADSRStorage,
        uid.ColonCADSRStorage,
        uid.MammographyCADSRStorage,
        uid.XRayRadiationDoseSRStorage,
        uid.PatientRadiationDoseSRStorage,
        uid.RadiopharmaceuticalRadiationDoseSRStorage,
    }
)
"""SOP classes of structured reports, with free text in them."""

DERIVED = frozenset(
    {
        uid.SegmentationStorage,
        uid.SurfaceSegmentationStorage,
        uid.RTStructureSetStorage,
        uid.RTDoseStorage,
        uid.ParametricMapStorage,
        uid.RealWorldValueMappingStorage,
        uid.SpatialRegistrationStorage,
        uid.DeformableSpatialRegistrationStorage,
    }
)
"""SOP classes of what is made from images and kept beside them."""

_CAPTURES = frozenset(
    {
        uid.SecondaryCaptureImageStorage,
        uid.MultiFrameSingleBitSecondaryCaptureImageStorage,
        uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
        uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
        uid.MultiFrameTrueColorSecondaryCaptureImageStorage,
    }
)
# Parts of the names of SOP classes in whose images text is burned in by custom.
_BURNED = ("Ultrasound", "Visible Light", "VL ", "Video", "Ophthalmic", "X-Ray Angiographic")
# Words of an image type, by themselves or beside others: CT_SOM5 PROT, CSA REPORT.
_SCREENS = words_of(
    "screen screensave screenshot capture snapshot display pasted save prot protocol report "
    "reports result results summary dose print film text graph plot chart refsurview"
)
_COMPUTED = ["DERIVED", "SECONDARY"]
_SCREEN_WORDS = (
    "screen save",
    "screensave",
    "screen shot",
    "screen capture",
    "dose report",
    "dose info",
    "patient protocol",
    "exam summary",
    "exam protocol",
    "線量レポート",
    "線量情報",
)

_ANATOMY = tags_of("AnatomicRegionSequence PrimaryAnatomicStructureSequence")
_DESCRIPTIONS = tags_of("StudyDescription SeriesDescription ProtocolName AcquisitionProtocolName")
(_SOP_CLASS,) = tags_of("SOPClassUID")
(_BODY_PART,) = tags_of("BodyPartExamined")
_TOLD = _DESCRIPTIONS | tags_of(
    "RequestedProcedureDescription PerformedProcedureStepDescription "
    "ScheduledProcedureStepDescription"
)
_PROCEDURES = tags_of(
    "ProcedureCodeSequence RequestedProcedureCodeSequence PerformedProtocolCodeSequence "
    "ScheduledProtocolCodeSequence"
)
_HEAD = re.compile(
    "頭|脳|顔|鼻|頸|頚|眼|耳|咽|喉|顎|舌|口腔|全身|head|brain|cereb|crani|skull|neuro|vertex|face|facial|"
    "neck|cervic|cspine|orbit|sinus|dental|wholebody|totalbody"
)
_NO_HEAD = re.compile(
    "骨頭|膵頭|子宮頸|子宮頚|膀胱頸|膀胱頚|骨頸|骨頚|femoralhead|femoralneck|humeralhead|radialhead|"
    "pancreatichead|headofpancreas|bladderneck|headfirst|coronarysinus|surface|interface"
)
(_IMAGE_TYPE,) = tags_of("ImageType")
(_POSITION,) = tags_of("ImagePositionPatient")
(_CODE_VALUE,) = tags_of("CodeValue")
(_CODE_MEANING,) = tags_of("CodeMeaning")
(_BURNED_IN,) = tags_of("BurnedInAnnotation")
(_CONVERSION,) = tags_of("ConversionType")
(_SAMPLES,) = tags_of("PhotometricInterpretation")
(_PATIENT_ID,) = tags_of("PatientID")
_UIDS = {
    keyword: tag
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
    for tag in tags_of(keyword)
}

# SNOMED CT and the older SNOMED-RT ids: head, head and neck, brain, skull, face, orbit, eye,
# paranasal sinus, ear, temporal bone, pituitary, jaw, mandible, maxilla, nose, mouth, neck,
# cervical spine, carotid, pharynx, larynx, whole body.
_HEAD_CODES = words_of(
    "69536005 774007 12738006 89546000 89545001 363654007 81745001 2095001 117590005 60911003 "
    "56329008 661005 91609006 70925003 45206002 123851003 45048000 122494005 69105007 54066008 "
    "4596009 38266002 T-D1100 T-D1000 T-A0100 T-11100 T-D1200 T-D1480 T-AA000 T-22000 T-AB000 "
    "T-11133 T-B1000 T-D1213 T-11180 T-11170 T-21000 T-51000 T-D1600 T-11501 T-45100 T-55000 "
    "T-24100 T-D0010"
)


def hold_reason(node: Node, syntax: str) -> str | None:
    """Say why an object must not go into the store, None if it may.

    Held are: what is not a class of our list (CT, MR and PET images; structured reports;
    what is made from images), captures of screens and what a vendor's program shows, computed
    images without a position, images with text burned in or said to have it, colour images,
    overlays inside the pixel data, objects without a patient id.
    """
    sop_class = uid.UID(node.text(_SOP_CLASS))
    if sop_class not in PACKABLE | REPORTS | DERIVED:
        return _class_reason(sop_class)
    missing = [name for name, tag in _UIDS.items() if not UID.fullmatch(node.text(tag))]
    reasons = {
        f"the transfer syntax {syntax} is not known: what is in the object cannot be said": (
            syntax not in uid.AllTransferSyntaxes
        ),
        f"{', '.join(missing)} missing or not a valid UID": bool(missing),
        "no PatientID: the object could be neither kept with its person nor withdrawn": (
            not node.text(_PATIENT_ID)
        ),
        "BurnedInAnnotation is YES: text in the pixels may name the patient": (
            any(value.strip().upper() != "NO" for value in node.texts(_BURNED_IN))
        ),
    }
    found = next((reason for reason, holds in reasons.items() if holds), None)
    return found or (_picture_reason(node) if sop_class in PACKABLE else None)


def _picture_reason(node: Node) -> str | None:
    words = _run_together(text for tag in _DESCRIPTIONS for text in node.texts(tag))
    kinds = node.texts(_IMAGE_TYPE)
    if (
        any(_shows_screen(kind) for kind in kinds)
        or node.texts(_CONVERSION)
        or any(_run_together([word]) in words for word in _SCREEN_WORDS)
    ):
        return "a capture of a screen: text in the pixels may name the patient"
    if [kind.strip().upper() for kind in kinds[:2]] == _COMPUTED and not any(
        element.tag == _POSITION and not element.empty for _, element in node.walk()
    ):
        return "computed, without a position in the patient: it may be a screen with text in it"
    if (photometric := node.text(_SAMPLES)) and not photometric.startswith("MONOCHROME"):
        return f"a colour image ({photometric}): such pictures have text in them by custom"
    if any(_hidden_overlay(node, group) for group in range(0x6000, 0x6020, 2)):
        return "an overlay inside the pixel data: it may be text, and cannot be taken away"
    return None


def _shows_screen(kind: str) -> bool:
    words = re.split(r"[ \t_\-]+", unicodedata.normalize("NFKC", kind).casefold().strip())
    return not _SCREENS.isdisjoint((*words, "".join(words)))


def _class_reason(sop_class: uid.UID) -> str:
    if sop_class in _CAPTURES:
        return "a secondary capture: text in the pixels may name the patient"
    name = sop_class.name if sop_class in UID_dictionary else ""
    if not name:
        return "unknown SOP Class: what is in the object cannot be said"
    if name.startswith("Encapsulated"):
        return f"{name}: a document that cannot be de-identified"
    if any(part in name for part in _BURNED):
        return f"{name}: text is burned into such images by custom"
    return f"{name}: not of a class that the store takes"


def _hidden_overlay(node: Node, group: int) -> bool:
    return any(tag >> 16 == group for tag in node.elements) and (
        (group << 16) + 0x3000 not in node.elements
    )


def _run_together(texts: Iterable[str]) -> str:
    """Return texts without case, width, spaces, hyphens and underscores: senders use all."""
    folded = unicodedata.normalize("NFKC", "\n".join(texts)).casefold()
    return re.sub(r"[ \t_\-]", "", folded)


def _names_head(node: Node) -> bool:
    """Say whether any word about the examination has a part of the head, or the whole body, in it.

    Parts of words count too. What only sounds like it is taken out first.
    """
    texts = [text for tag in (_BODY_PART, *sorted(_TOLD)) for text in node.texts(tag)]
    for _, element in node.walk():
        if element.tag in _ANATOMY or element.tag in _PROCEDURES:
            texts += [item.text(_CODE_MEANING) for item in element.items or ()]
    return _HEAD.search(_NO_HEAD.sub("", _run_together(texts))) is not None


def tier_of(node: Node) -> int:
    """Return the tier of access: 1 if nobody can be recognised, else 2.

    Tier 2 are: structured reports, since their text is free; everything whose body part,
    descriptions or coded anatomy name the head, face, neck, brain or the whole body, or a
    part of these; and everything of which it cannot be said that it is something else.
    So tier 1 has to be earned by a word or code for a part of the trunk or limbs.
    """
    sop_class = uid.UID(node.text(_SOP_CLASS))
    # A PET scan goes from the thighs to the eyes, or further, whatever it is of.
    if sop_class in REPORTS or "Positron" in sop_class.name or _names_head(node):
        return 2
    found: set[Region] = set()
    for tag in (_BODY_PART, *sorted(_DESCRIPTIONS)):
        for text in node.texts(tag):
            found |= vocabulary.regions(text)
    for _, element in node.walk():
        if element.tag in _ANATOMY:
            for item in element.items or ():
                if item.text(_CODE_VALUE) in _HEAD_CODES:
                    return 2
                found |= vocabulary.regions(item.text(_CODE_MEANING))
    return 1 if Region.TRUNK in found and Region.HEAD not in found else 2
