"""Gathers what an object says of persons, places and numbers, to look for it elsewhere in it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kakehashi.store.deidentify.actions import tags_of
from kakehashi.store.deidentify.content import is_identifier
from kakehashi.store.deidentify.dates import day_of, shift_date
from kakehashi.store.deidentify.names import Names
from kakehashi.store.deidentify.tree import Node, readings_of

_PLACES = tags_of(
    "InstitutionName InstitutionAddress ResponsibleOrganization PatientAddress "
    "PatientTelephoneNumbers PatientInstitutionResidence PersonAddress PersonTelephoneNumbers "
    "ReferringPhysicianAddress ReferringPhysicianTelephoneNumbers VerifyingOrganization "
    "ClinicalTrialSiteName ClinicalTrialCoordinatingCenterName RegionOfResidence "
    "HumanPerformerOrganization ScheduledStudyLocation OrderCallbackPhoneNumber"
)
_IDS = tags_of(
    "PatientID OtherPatientIDs AccessionNumber StudyID AdmissionID ServiceEpisodeID "
    "RequestedProcedureID ScheduledProcedureStepID PerformedProcedureStepID MedicalRecordLocator "
    "PlacerOrderNumberImagingServiceRequest FillerOrderNumberImagingServiceRequest "
    "InsurancePlanIdentification ClinicalTrialSubjectID ClinicalTrialSubjectReadingID "
    "SpecimenIdentifier SpecimenAccessionNumber InterpretationID ResultsID BarcodeValue"
)
_PERSON_CODES = tags_of("PersonIdentificationCodeSequence")
_PLACE_CODES = tags_of("InstitutionCodeSequence")
_IDENTIFYING = tags_of("PatientName PatientID")
(_MEANING,) = tags_of("CodeMeaning")
(_CODE,) = tags_of("CodeValue")
(_TEXT,) = tags_of("TextValue")
_HOSPITAL = re.compile(
    r"病院|医院|クリニック|センター|大学|hospital|clinic|university|center|centre", re.IGNORECASE
)
# What may hold an institution's name; as a rule it is a word such as Radiology.
_PERHAPS = tags_of("InstitutionalDepartmentName StationName RequestingService")


@dataclass(frozen=True, slots=True)
class Collected:
    """What an object says.

    Attributes
    ----------
    names : Names
    unreadable : str
        The first name or id that cannot be decoded, empty if all can.
    """

    names: Names
    unreadable: str

    def days_not_in(self, days: int) -> frozenset[str]:
        """Return the original dates that no moved date is equal to."""
        return self.names.days - {shift_date(day, days) for day in self.names.days}


def collect(node: Node) -> Collected:
    """Gather names, places, numbers and dates at any depth, also of what will be removed."""
    persons: set[str] = set()
    places: set[str] = set()
    ids: set[str] = set()
    days: set[str] = set()
    unreadable = ""
    for owner, element in node.walk():
        target = (
            persons
            if element.rule.vr == "PN"
            else days
            if element.rule.vr in ("DA", "DT")
            else places
            if element.tag in _PLACES or element.tag in _PERHAPS
            else ids
            if element.tag in _IDS
            else None
        )
        if target is not None:
            # Of bytes in an undeclared character set all that they may be.
            texts = readings_of(element, owner.encodings)
            if not texts and (target is persons or element.tag in _IDENTIFYING):
                unreadable = unreadable or f"({element.tag >> 16:04X},{element.tag & 0xFFFF:04X})"
            good = (text for reading in texts for text in reading if text)
            if element.tag in _PERHAPS:
                good = (text for text in good if _HOSPITAL.search(text))
            target.update(good)
        for item in element.items or ():
            if element.tag in _PERSON_CODES:
                persons.update(item.texts(_MEANING))
                ids.update(item.texts(_CODE))
            elif element.tag in _PLACE_CODES:
                places.update(item.texts(_MEANING))
            elif is_identifier(item):
                ids.update(item.texts(_TEXT))
    found = {text[:8] for text in days if day_of(text[:8])}
    return Collected(
        Names(frozenset(persons), frozenset(places), frozenset(ids), frozenset(found)), unreadable
    )
