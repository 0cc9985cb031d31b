"""Attributes that all objects of a study share, with identifiers as hospitals write them."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

from pydicom import Dataset, uid
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence

from kakehashi.store.synthetic.chance import stream
from kakehashi.store.synthetic.mark import mark
from kakehashi.store.synthetic.protocols import PROTOCOLS

if TYPE_CHECKING:
    from pathlib import Path

    from kakehashi.store.synthetic.plan import Machine, Plan
    from kakehashi.store.synthetic.protocols import SeriesPlan

_IMPLEMENTATION = uid.UID("2.25.101366429217371906153310953245418243681")
_STREETS = ("桜通", "若宮", "緑ヶ丘", "中町", "旭町", "千代田")

# Private blocks of the form that each maker writes, with a place for text that a person typed.
_PRIVATE = {
    "GE": (0x0009, "GEMS_IDEN_01"),
    "SIEMENS": (0x0029, "SIEMENS CSA HEADER"),
    "CANON": (0x7005, "TOSHIBA_MEC_CT3"),
    "TOSHIBA": (0x7005, "TOSHIBA_MEC_CT3"),
    "PHILIPS": (0x2005, "Philips Imaging DD 005"),
    "HITACHI": (0x0019, "HMC"),
    "FUJIFILM": (0x0019, "HMC"),
}


def address_of(plan: Plan) -> str:
    """Return the patient's home, made up."""
    draw = stream(plan.scope, plan.seed, "address", plan.person.number)
    city = plan.hospital.address.split("市")[0]
    return f"{city}市{draw.choice(_STREETS)}{draw.randint(1, 9)}-{draw.randint(1, 30)}"


def telephone_of(plan: Plan) -> str:
    """Return the patient's telephone number; 0900 is not given out."""
    draw = stream(plan.scope, plan.seed, "telephone", plan.person.number)
    return f"0900-{draw.randint(0, 9999):04d}-{draw.randint(0, 9999):04d}"


def code(value: str, scheme: str, meaning: str) -> Dataset:
    """Return an item of a code sequence."""
    item = Dataset()
    item.CodeValue = value
    item.CodingSchemeDesignator = scheme
    item.CodeMeaning = meaning
    return item


def items(*datasets: Dataset) -> Sequence:
    """Return a sequence."""
    return Sequence(datasets)


def moment_of(plan: Plan, series: SeriesPlan) -> dt.datetime:
    """Return when a series begins: later ones later."""
    return plan.moment + dt.timedelta(seconds=40 * min(series.number, 40) + 60)


def common(plan: Plan, series: SeriesPlan, sop_class: str, machine: Machine | None) -> Dataset:
    """Return a new object without content.

    Parameters
    ----------
    plan : Plan
    series : SeriesPlan
    sop_class : str
    machine : Machine or None
        None for what a workstation makes.
    """
    found = Dataset()
    found.SpecificCharacterSet = list(plan.hospital.charset)
    found.SOPClassUID = sop_class
    mark(found)
    _patient(found, plan)
    _study(found, plan)
    begin = moment_of(plan, series)
    found.SeriesInstanceUID = plan.series_uid(series)
    found.SeriesNumber = series.number
    found.SeriesDescription = series.description
    found.Modality = series.modality
    found.SeriesDate = begin.strftime("%Y%m%d")
    found.SeriesTime = begin.strftime("%H%M%S")
    found.InstanceCreationDate = found.SeriesDate
    found.InstanceCreationTime = found.SeriesTime
    _equipment(found, plan, machine)
    return found


def _patient(found: Dataset, plan: Plan) -> None:
    half = plan.hospital.half_width
    who = plan.person
    found.PatientName = who.name.dicom(half_width=half)
    found.PatientID = plan.patient_id
    found.IssuerOfPatientID = plan.hospital.code
    found.PatientBirthDate = who.birth.strftime("%Y%m%d")
    found.PatientSex = who.sex
    found.PatientAge = f"{plan.age:03d}Y"
    found.PatientSize = round(who.height_cm / 100, 3)
    found.PatientWeight = who.weight_kg
    found.PatientAddress = address_of(plan)
    found.PatientTelephoneNumbers = telephone_of(plan)
    found.PatientComments = f"合成データ SYNTHETIC / {''.join(who.name.kanji)} 様"


def _study(found: Dataset, plan: Plan) -> None:
    half = plan.hospital.half_width
    found.StudyInstanceUID = plan.study_uid
    found.StudyDate = plan.moment.strftime("%Y%m%d")
    found.StudyTime = plan.moment.strftime("%H%M%S")
    found.StudyID = str(plan.index + 1)
    found.AccessionNumber = plan.accession
    about = PROTOCOLS[plan.protocol]
    japanese = stream(plan.key, "language").random() < 0.5
    found.StudyDescription = about.japanese if japanese else about.english
    found.ReferringPhysicianName = plan.referring.dicom(half_width=half)
    found.NameOfPhysiciansReadingStudy = plan.reading.dicom(half_width=half)


def _equipment(found: Dataset, plan: Plan, machine: Machine | None) -> None:
    found.InstitutionName = plan.hospital.name
    found.InstitutionAddress = plan.hospital.address
    found.OperatorsName = plan.operator.dicom(half_width=plan.hospital.half_width)
    if machine is None:
        found.Manufacturer = "Kakehashi"
        found.ManufacturerModelName = "synthetic studies"
        found.DeviceSerialNumber = "1"
        found.SoftwareVersions = "1"
        return
    found.InstitutionalDepartmentName = "放射線部"
    found.Manufacturer = machine.manufacturer
    found.ManufacturerModelName = machine.model
    found.StationName = machine.station
    found.DeviceSerialNumber = machine.serial
    found.SoftwareVersions = machine.software.split("\\")
    if machine.ct and machine.ct.vendor in _PRIVATE:
        group, creator = _PRIVATE[machine.ct.vendor]
        block = found.private_block(group, creator, create=True)
        # What an operator typed: the name in three scripts, and a number that names nobody.
        block.add_new(0xD1, "LO", " ".join(plan.person.name.kanji))
        block.add_new(0xD2, "LO", " ".join(plan.person.name.romaji))
        block.add_new(0xD3, "LO", " ".join(plan.person.name.kana))
        block.add_new(0xD4, "DS", "1.25")


def image_pixels(found: Dataset, rows: int, columns: int, *, stored: int, signed: bool) -> None:
    """Say what form single-channel pixels of 16 bits have (8 bits where 8 are stored)."""
    found.SamplesPerPixel = 1
    found.PhotometricInterpretation = "MONOCHROME2"
    found.Rows = rows
    found.Columns = columns
    found.BitsAllocated = 8 if stored == 8 else 16
    found.BitsStored = stored
    found.HighBit = stored - 1
    found.PixelRepresentation = int(signed)


def save(found: Dataset, path: Path, *, implicit: bool = False, compress: bool = False) -> None:
    """Write an object as a DICOM file; the same object gives the same bytes.

    Parameters
    ----------
    found : Dataset
    path : Path
    implicit : bool
        Implicit VR Little Endian, as older archives send, instead of explicit.
    compress : bool
        RLE Lossless.
    """
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = found.SOPClassUID
    meta.MediaStorageSOPInstanceUID = found.SOPInstanceUID
    meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian
    meta.ImplementationClassUID = _IMPLEMENTATION
    meta.ImplementationVersionName = "KAKEHASHI_SYN_1"
    found.file_meta = meta
    if compress:
        found.compress(uid.RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
    found.save_as(path, enforce_file_format=True)
