"""Takes the person out of a DICOM object, and keeps what research needs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pydicom import Dataset, FileDataset, Sequence, dcmwrite, uid
from pydicom.dataelem import DataElement
from pydicom.dataset import FileMetaDataset

from kakehashi.errors import StoreError
from kakehashi.store.deidentify import content
from kakehashi.store.deidentify.actions import TABLE_EDITION, tags_of
from kakehashi.store.deidentify.collect import collect
from kakehashi.store.deidentify.dates import age_between, day_of
from kakehashi.store.deidentify.elements import UTF8, Elements
from kakehashi.store.deidentify.hold import REPORTS, hold_reason, tier_of
from kakehashi.store.deidentify.key import Pseudonyms
from kakehashi.store.deidentify.names import Names
from kakehashi.store.deidentify.report import clean_report
from kakehashi.store.deidentify.tree import Node, read_tree
from kakehashi.store.dicom import tolerant
from kakehashi.store.layout import replacing

if TYPE_CHECKING:
    from kakehashi.secret import Secret

METHOD = f"Kakehashi: DICOM PS3.15 {TABLE_EDITION} Basic Profile with options"
# CID 7050, de-identification methods.
_METHODS = (
    ("113100", "Basic Application Confidentiality Profile"),
    ("113105", "Clean Descriptors Option"),
    ("113107", "Retain Longitudinal Temporal Information Modified Dates Option"),
    ("113108", "Retain Patient Characteristics Option"),
    ("113109", "Retain Device Identity Option"),
    ("113111", "Retain Safe Private Option"),
)
_STRUCTURED = ("113104", "Clean Structured Content Option")

(_PATIENT_ID,) = tags_of("PatientID")
(_BIRTH,) = tags_of("PatientBirthDate")
_DAYS_OF_AGE = [
    tag
    for keyword in ("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate")
    for tag in tags_of(keyword)
]
(_CONTENT,) = tags_of("ContentSequence")
_CODE = (0x00080100, 0x00080102, 0x00080104)
(_SOP_CLASS,) = tags_of("SOPClassUID")
(_SOP_INSTANCE,) = tags_of("SOPInstanceUID")


@dataclass
class Outcome:
    """What became of an object.

    Attributes
    ----------
    dataset : pydicom.FileDataset
        De-identified, with pixel data as they came and file meta information.
    tier : int
        1: nothing by which a person could be recognised; 2: a head, or free text, may be
        there (see :func:`kakehashi.store.deidentify.hold.tier_of`).
    held : str or None
        Why it must not go into the store, None if it may.
    names : Names
        What must go from the report of the same study too.
    """

    dataset: FileDataset
    tier: int
    held: str | None
    names: Names = field(repr=False)

    def write(self, target: Path | BinaryIO) -> None:
        """Write the object as a DICOM file; of equal inputs and keys, equal bytes.

        A path is replaced whole or not at all.
        """
        if isinstance(target, Path):
            with replacing(target) as file:
                self.write(file)
            return
        with tolerant():
            dcmwrite(target, self.dataset, enforce_file_format=True)


class Deidentifier:
    """De-identifies objects and reports with one key.

    The profile is the Basic Application Level Confidentiality Profile of DICOM PS3.15 with
    the options Clean Descriptors, Retain Longitudinal Temporal Information with Modified
    Dates, Retain Patient Characteristics, Retain Device Identity and Retain Safe Private;
    for structured reports Clean Structured Content too. What the profile's table does not
    name is denied by default (see :func:`kakehashi.store.deidentify.actions.rule_of`).

    Parameters
    ----------
    key : Secret
        From :func:`load_key`.
    """

    def __init__(self, key: Secret) -> None:
        self._pseudonyms = Pseudonyms(key)

    def patient_id(self, facility: str, patient_id: str) -> str:
        """Return a person's pseudonym; see :meth:`Pseudonyms.patient_id`."""
        return self._pseudonyms.patient_id(facility, patient_id)

    def uid(self, original: str) -> str:
        """Return the UID that takes the place of another; see :meth:`Pseudonyms.uid`."""
        return self._pseudonyms.uid(original)

    def shift_days(self, facility: str, patient_id: str) -> int:
        """Return the days by which a person's dates are moved."""
        return self._pseudonyms.shift_days(facility, patient_id)

    def report(self, text: str, *, facility: str, patient_id: str, names: Names | None) -> str:
        """De-identify a report that came as text.

        Parameters
        ----------
        text : str
        facility, patient_id : str
            Whose report it is; the id as the facility has it.
        names : Names or None
            Of the objects of the study, joined by ``|``.

        Returns
        -------
        str
            The text with markers such as ``[氏名]``; see
            :func:`kakehashi.store.deidentify.report.clean_report`.
        """
        known = (names or Names()) | Names(ids=frozenset((patient_id,)))
        return clean_report(text, known, self.shift_days(facility, patient_id))

    def object(self, dataset: Dataset, *, facility: str) -> Outcome:
        """De-identify a DICOM object.

        Parameters
        ----------
        dataset : pydicom.Dataset
            With ``file_meta``; with or without pixel data. It is not changed.
        facility : str
            Where it came from, by the store's name for it.

        Returns
        -------
        Outcome
            Also of an object that is held: it may be looked at by the store's own staff.

        Raises
        ------
        StoreError
            It has no transfer syntax, so that it cannot be written.
        """
        with tolerant():
            return self._object(dataset, facility)

    def _object(self, dataset: Dataset, facility: str) -> Outcome:
        syntax = str(getattr(dataset, "file_meta", {}).get("TransferSyntaxUID", "") or "")
        if not syntax:
            raise StoreError("a DICOM object without a transfer syntax; send it as a file")
        problems: list[str] = []
        node = read_tree(dataset, problems=problems)
        patient_id = node.text(_PATIENT_ID)
        days = self.shift_days(facility, patient_id)
        collected = collect(node)
        names = replace(collected.names, days=collected.days_not_in(days))
        encoding = dataset.original_encoding
        work = Elements(
            pseudonyms=self._pseudonyms,
            facility=facility,
            days=days,
            names=names,
            matcher=names.matcher,
            encoding=encoding,
            by_reference=content.by_reference(node),
            report=node.text(_SOP_CLASS) in REPORTS,
            top=node,
            syntax=syntax,
            problems=problems,
        )
        out = FileDataset(
            "",
            work.items(node),
            preamble=b"\0" * 128,
            file_meta=self._file_meta(node, syntax),
            is_implicit_VR=bool(encoding[0]),
            is_little_endian=encoding[1] is not False,
        )
        out.set_original_encoding(encoding[0], encoding[1], UTF8)
        _age(node, out)
        _say_what_was_done(out, structured=_CONTENT in node.elements)
        held = hold_reason(node, syntax)
        if unreadable := collected.unreadable:
            held = held or f"{unreadable} cannot be decoded: names could not be looked for"
        return Outcome(
            dataset=out,
            tier=tier_of(node),
            held=held or (problems[0] if problems else None),
            names=replace(names, uids=frozenset(work.uids)),
        )

    def _file_meta(self, node: Node, syntax: str) -> FileMetaDataset:
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = uid.UID(node.text(_SOP_CLASS))
        meta.MediaStorageSOPInstanceUID = uid.UID(self.uid(node.text(_SOP_INSTANCE)))
        meta.TransferSyntaxUID = uid.UID(syntax)
        meta.ImplementationClassUID = uid.PYDICOM_IMPLEMENTATION_UID
        return meta


def _age(node: Node, out: Dataset) -> None:
    """Give an age where only the date of birth was there."""
    if out.get("PatientAge"):
        return
    birth = day_of(node.text(_BIRTH))
    for tag in _DAYS_OF_AGE:
        day = day_of(node.text(tag))
        if birth and day and (age := age_between(birth, day)):
            out.PatientAge = age
            return


def _say_what_was_done(out: Dataset, *, structured: bool) -> None:
    out.SpecificCharacterSet = "ISO_IR 192"
    out.PatientIdentityRemoved = "YES"
    out.DeidentificationMethod = METHOD
    out.LongitudinalTemporalInformationModified = "MODIFIED"
    codes = []
    for value, meaning in (*_METHODS, *((_STRUCTURED,) if structured else ())):
        codes.append(Dataset(parent_encoding=UTF8))
        for tag, vr, text in zip(_CODE, ("SH", "SH", "LO"), (value, "DCM", meaning), strict=True):
            codes[-1][tag] = DataElement(tag, vr, text)
    out.DeidentificationMethodCodeSequence = Sequence(codes)
