"""Radiology reports (所見): the text of structured reports, and lists that hospitals send."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from kakehashi.errors import StoreError
from kakehashi.store.dicom import UID

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from kakehashi.store.deidentify import Deidentifier

_STRUCTURED_REPORTS = "1.2.840.10008.5.1.4.1.1.88."
_COLUMNS = {"study_uid", "patient_id", "text"}
_NAMES = "patient_name"
_LONGEST_TEXT = 1_000_000
_DEEPEST = 32


class Reports(Protocol):
    """Where reports are kept and searched."""

    def add(self, study_uid: str, facility: str, text: str, *, patient_id: str) -> object:
        """Keep a de-identified report of a study; the same text once only."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A report as a hospital sent it: identifying.

    Attributes
    ----------
    study_uid, patient_id : str
        As the hospital names them.
    patient_name : str
        As in DICOM, with ``=`` between romaji, kanji and kana; may be empty.
    text : str
    """

    study_uid: str
    patient_id: str
    patient_name: str
    text: str


def report_of(dataset: Dataset) -> str | None:
    """Return the text of a structured report, None for another object or an empty one."""
    if not str(dataset.get("SOPClassUID", "")).startswith(_STRUCTURED_REPORTS):
        return None
    return "\n".join(_lines(dataset, 0)) or None


def _lines(item: Dataset, depth: int) -> Iterator[str]:
    if depth > _DEEPEST:
        return
    heading = _meaning(item, "ConceptNameCodeSequence")
    match item.get("ValueType"):
        case "TEXT":
            value = str(item.get("TextValue") or "")
        case "CODE":
            value = _meaning(item, "ConceptCodeSequence")
        case "NUM":
            value = _measured(item)
        case "CONTAINER":
            value = ""
        case _:
            heading = value = ""
    if value:
        yield f"{heading}: {value}" if heading else value
    elif heading:
        yield heading
    for child in item.get("ContentSequence") or ():
        yield from _lines(child, depth + 1)


def _measured(item: Dataset) -> str:
    measured = (item.get("MeasuredValueSequence") or [None])[0]
    if measured is None:
        return ""
    unit = _meaning(measured, "MeasurementUnitsCodeSequence")
    return f"{measured.get('NumericValue', '')} {unit}".strip()


def _meaning(item: Dataset, sequence: str) -> str:
    codes = item.get(sequence) or ()
    return str(codes[0].get("CodeMeaning") or "") if codes else ""


def read_list(path: Path) -> Iterator[Sent]:
    """Read a hospital's list of reports.

    Parameters
    ----------
    path : Path
        CSV in UTF-8, with the columns ``study_uid``, ``patient_id``, ``text`` and, if it may,
        ``patient_name``.

    Raises
    ------
    StoreError
        The file or a line of it is not such a list; nothing after that line was given.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            named = set(rows.fieldnames or ())
            if not named >= _COLUMNS or not named <= _COLUMNS | {_NAMES}:
                raise StoreError(
                    f"{path}: has the columns {', '.join(sorted(named)) or 'none'}; expected "
                    f"{', '.join(sorted(_COLUMNS))} and, if you have it, {_NAMES}"
                )
            for row in rows:
                yield _sent(row, f"{path}, line {rows.line_num}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise StoreError(f"{path}: cannot be read as CSV in UTF-8 ({error})") from error


def take(
    sent: Iterable[Sent],
    facility: str,
    deidentifier: Deidentifier,
    reports: Reports,
    withdrawn: frozenset[str],
) -> int:
    """De-identify reports and keep them with their studies; return how many are new.

    Those of people who withdrew are left out.
    """
    new = 0
    for report in sent:
        if deidentifier.patient_id(facility, report.patient_id) in withdrawn:
            continue
        names = deidentifier.object(_person(report), facility=facility).names
        text = deidentifier.report(
            report.text, facility=facility, patient_id=report.patient_id, names=names
        )
        study = deidentifier.uid(report.study_uid)
        patient = deidentifier.patient_id(facility, report.patient_id)
        new += bool(reports.add(study, facility, text, patient_id=patient))
    return new


def _person(report: Sent) -> Dataset:
    """Return what an object would say of the person, so that names are taken apart alike."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.PatientName = report.patient_name
    dataset.PatientID = report.patient_id
    return dataset


def _sent(row: dict[str, str | None], where: str) -> Sent:
    if None in row or None in row.values():
        raise StoreError(f"{where}: has another number of columns than the first line")
    found = {name: (value or "").strip() for name, value in row.items()}
    if not UID.fullmatch(found["study_uid"]):
        raise StoreError(f"{where}: study_uid is not a UID")
    if not found["patient_id"] or not found["text"]:
        raise StoreError(f"{where}: patient_id or text is empty")
    if len(found["text"]) > _LONGEST_TEXT:
        raise StoreError(f"{where}: the text is longer than {_LONGEST_TEXT:,} characters")
    return Sent(found["study_uid"], found["patient_id"], found.get(_NAMES, ""), found["text"])
