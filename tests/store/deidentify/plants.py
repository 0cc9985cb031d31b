"""An image full of identifiers, each of which can be looked for in bytes, and of values to keep."""

# ruff: noqa: RUF001 - Japanese letters and signs are meant

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
from pydicom import Dataset, FileDataset, Sequence, dcmread, dcmwrite, uid
from pydicom.charset import custom_encoders
from pydicom.dataelem import DataElement
from pydicom.dataset import FileMetaDataset

CHARSETS = {
    "iso2022": ["", "ISO 2022 IR 13", "ISO 2022 IR 87"],
    "utf8": "ISO_IR 192",
    "sjis": "ISO_IR 13",
    "sjis undeclared": "ISO_IR 13",
    "sjis said to be latin": "ISO_IR 13",
}
PATIENT = "Kawamoto^Kenta=川本^健太=かわもと^けんた"
NUMBER = "7701234"
_ENCODINGS = ("utf-8", "cp932", "euc_jp", "utf-16-le", "utf-16-be")


def find(data: bytes, text: str) -> bool:
    """Say whether a text is in some bytes, in any encoding and case."""
    low = data.lower()
    for encoding in _ENCODINGS:
        raw = _encoded(text, encoding)
        if raw and raw.lower() in low:
            return True
    if text.isascii():
        return False
    # In ISO 2022, half-width kana are one byte, with escape sequences at each delimiter.
    kana = _encoded(text, "cp932")
    if kana and kana in re.sub(rb"\x1b[()$]+[@-Z]", b"", data):
        return True
    # Kanji are two bytes after an escape sequence.
    pieces = re.findall(r"[^\x00-\x7f\uff61-\uff9f]+", text)
    raw_pieces = [_encoded(piece, "iso2022_jp")[3:-3] for piece in pieces]
    segments = re.findall(rb"\x1b\$[@B]([^\x1b]*)", data)
    return bool(pieces) and all(raw and any(raw in part for part in segments) for raw in raw_pieces)


def _encoded(text: str, encoding: str) -> bytes:
    try:
        return text.encode(encoding)
    except UnicodeEncodeError:
        return b""


@dataclass
class Planted:
    """The image and what was put into it."""

    dataset: FileDataset
    plants: dict[str, str] = field(default_factory=dict)
    keep: dict[str, object] = field(default_factory=dict)

    def plant(self, label: str, value: str) -> str:
        assert label not in self.plants
        self.plants[label] = value
        return value

    def write(self, charset: str, syntax: str = uid.ExplicitVRLittleEndian) -> bytes:
        self.dataset.SpecificCharacterSet = CHARSETS[charset]
        self.dataset.file_meta.TransferSyntaxUID = uid.UID(syntax)
        buffer = io.BytesIO()
        # pydicom writes no kanji in Shift-JIS, as many devices do.
        with mock.patch.dict(custom_encoders, clear=charset.startswith("sjis")):
            dcmwrite(buffer, self.dataset, enforce_file_format=True)
        raw = buffer.getvalue()
        at = raw.index(b"\x08\x00\x05\x00")
        end = raw.index(b"ISO_IR 13 ") + 10 if charset.startswith("sjis") else at
        if charset == "sjis undeclared":
            raw = raw[:at] + raw[end:]
        elif charset == "sjis said to be latin":
            raw = raw[: end - 10] + b"ISO_IR 100" + raw[end:]
        assert (charset == "sjis undeclared") == (
            "SpecificCharacterSet" not in dcmread(io.BytesIO(raw))
        )
        return raw


def ct(rows: int = 8) -> FileDataset:
    """Return a small CT image with nothing in it that identifies but what must be there."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = uid.CTImageStorage
    ds = FileDataset("", {}, preamble=b"\0" * 128, file_meta=meta)
    ds.SOPClassUID = uid.CTImageStorage
    ds.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = "1.2.392.100.1.1"
    ds.SeriesInstanceUID = "1.2.392.100.1.2"
    ds.StudyInstanceUID = "1.2.392.100.1.3"
    ds.FrameOfReferenceUID = "1.2.392.100.1.4"
    ds.Modality = "CT"
    ds.PatientID = NUMBER
    ds.PatientName = PATIENT.split("=", maxsplit=1)[0]
    ds.StudyDate = "20240516"
    ds.StudyTime = "131211.250"
    ds.BodyPartExamined = "CHEST"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI"]
    ds.Rows = ds.Columns = rows
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    pixels = np.random.default_rng(1).integers(0, 4096, (rows, rows), dtype=np.uint16)
    ds.PixelData = pixels.tobytes()
    return ds


def code(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def item(**values: object) -> Dataset:
    made = Dataset()
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made


def planted() -> Planted:
    made = Planted(ct())
    ds, plant = made.dataset, made.plant
    for number, group in enumerate(PATIENT.split("=")):
        for part in group.split("^"):
            plant(f"patient's name {number} {part}", part)
    ds.PatientName = PATIENT
    ds.PatientID = plant("PatientID", NUMBER)
    ds.PatientBirthDate = plant("PatientBirthDate (DA)", "19481103")
    ds.PatientBirthTime = plant("PatientBirthTime (TM)", "045613")
    ds.StudyDate = plant("StudyDate (DA)", "20240516")
    ds.SeriesDate = plant("SeriesDate", "20240515")
    ds.AcquisitionDateTime = plant("AcquisitionDateTime (DT)", "20240517131211.5+0900")
    ds.OtherPatientNames = (
        plant("OtherPatientNames", "Kyusei") + "^Hana=" + plant("kanji", "旧姓田")
    )
    ds.PatientMotherBirthName = plant("PatientMotherBirthName", "Hahaoya") + "^Umi"
    ds.ResponsiblePerson = (
        "Hogo^" + plant("ResponsiblePerson", "Shamachi") + "=保護^" + plant("保", "者町")
    )
    ds.ReferringPhysicianName = "Irai^Isao=" + plant("ReferringPhysicianName", "依頼田") + "^功"
    ds.OperatorsName = [plant("OperatorsName 1", "Sosashi"), plant("OperatorsName 2", "ｿｳｻｼﾀﾞ")]
    ds.PhysiciansOfRecord = plant("PhysiciansOfRecord", "シュジイノ") + "^マモル"
    ds.NameOfPhysiciansReadingStudy = plant("NameOfPhysiciansReadingStudy", "読影島") + "^進"
    ds.InstitutionName = plant("InstitutionName", "架空中央病院")
    ds.InstitutionAddress = plant("InstitutionAddress", "架空県想像市夢見町一丁目二番")
    ds.InstitutionalDepartmentName = plant("department", "架空第三内科")
    ds.StationName = plant("StationName (SH) with the hospital", "架空中央病院CT")
    ds.AccessionNumber = plant("AccessionNumber", "88112233")
    ds.StudyID = plant("StudyID", "ST55667")
    ds.OtherPatientIDs = plant("OtherPatientIDs", "99887766")
    ds.IssuerOfPatientID = plant("IssuerOfPatientID", "ISSUERXY")
    ds.RetrieveAETitle = plant("RetrieveAETitle (AE)", "PLANTAE01")
    ds.ScanOptions = plant("name in a code string (CS)", "KENTA KAWAMOTO")
    ds.PatientAddress = plant("PatientAddress (LO)", "想像市空町9-8-7")
    ds.PatientTelephoneNumbers = plant("PatientTelephoneNumbers", "090-1234-9876")
    ds.Occupation = plant("Occupation", "宇宙飛行士長")
    ds.AdditionalPatientHistory = plant("AdditionalPatientHistory (LT)", "既往歴あれこれ")
    ds.PatientComments = plant("PatientComments", "comment plant one")
    ds.DerivationDescription = plant("DerivationDescription (ST)", "derived by plantman")
    ds.StudyDescription = "胸部CT " + plant("StudyDescription", "川本健太様")
    ds.SeriesDescription = "Chest " + plant("SeriesDescription", "KawamotoKenta") + " 5mm"
    ds.ProtocolName = "Thorax " + plant("ProtocolName", "ＫＡＷＡＭＯＴＯ") + " routine"
    ds.ImageComments = plant("ImageComments", "ｶﾜﾓﾄ ｹﾝﾀ") + " 造影"
    ds.AcquisitionProtocolDescription = plant("unknown word in a description", "Zebrafinch")
    ds.ConvolutionKernel = "B30f"
    ds.SoftwareVersions = plant("name in a kept text", "v1 kawamoto")
    ds.ReasonForStudy = plant("ReasonForStudy", "依頼理由の文章")
    ds.RequestedProcedureID = plant("RequestedProcedureID", "RQ778899")
    ds.TextString = plant("TextString", "some text string")
    ds[0x00081190] = DataElement(
        0x00081190, "UR", plant("RetrieveURL (UR)", "http://pacs.plant.example/1")
    )
    ds[0x00189937] = DataElement(
        0x00189937, "LO", plant("RequestedSeriesDescription", "Quagga series")
    )
    ds[0x00080119] = DataElement(
        0x00080119, "UC", plant("LongCodeValue (UC)", "kawamoto.long.code")
    )
    ds[0x0040DB07] = DataElement(0x0040DB07, "DT", "20240516")
    ds[0x0072006E] = DataElement(0x0072006E, "ST", plant("SelectorSTValue", "selector plant"))
    ds[0x00420011] = DataElement(
        0x00420011, "OB", plant("EncapsulatedDocument (OB)", "bytes of a letter").encode() + b"."
    )
    ds[0x00880200] = DataElement(
        0x00880200, "SQ", Sequence([item(PatientComments=plant("icon", "icon plant"))])
    )
    ds[0x0008FFF1] = DataElement(
        0x0008FFF1, "UN", plant("unknown tag (UN)", "unknown bytes plant").encode() + b"."
    )
    ds[0x0008FFF3] = DataElement(0x0008FFF3, "LO", plant("unknown tag (LO)", "unknown text plant"))
    ds[0x00281201] = DataElement(
        0x00281201, "LO", plant("text where a table should be", "palette plant")
    )
    ds[0x00182010] = DataElement(
        0x00182010, "LT", plant("text where numbers should be", "spacing plant")
    )
    ds[0x0028301A] = DataElement(
        0x0028301A, "OW", plant("unknown OW", "words as text").encode() + b"."
    )
    # The person's numbers in numbers.
    ds.AcquisitionNumber = plant("patient's id in IS", NUMBER)
    ds[0x00180081] = DataElement(0x00180081, "DS", plant("other id in DS", "99887766"))
    # UIDs.
    for keyword in (
        "SOPInstanceUID",
        "SeriesInstanceUID",
        "StudyInstanceUID",
        "FrameOfReferenceUID",
    ):
        plant(f"{keyword} (UI)", str(ds[keyword].value))
    ds.IrradiationEventUID = plant("IrradiationEventUID", "1.2.392.100.9.9")
    # Two deep, with names of their own.
    deep = item(
        PersonName=plant("PersonName two deep", "Fukai") + "^Sokoko",
        InstitutionName=plant("institution two deep", "深海クリニック"),
        CodeMeaning=plant("meaning in a local scheme", "ローカル語"),
        CodingSchemeDesignator="99HERE",
        CodeValue="L123",
        PatientComments=plant("comment two deep", "深い所の文章"),
        StudyDate=plant("date two deep", "20231224"),
        ReferencedSOPInstanceUID=plant("UID two deep", "1.2.392.100.7.7"),
        TextValue="依頼田先生より。" + plant("free text two deep", "ﾌｶｲ ｿｺｺ"),
    )
    middle = item(ViewCodeSequence=Sequence([deep]), SeriesDescription=plant("one deep", "川本"))
    ds.AnatomicRegionSequence = Sequence([code("51185008", "SCT", "Chest")])
    ds.ProcedureCodeSequence = Sequence([middle])
    ds.ReferencedImageSequence = Sequence(
        [item(ReferencedSOPClassUID=uid.CTImageStorage, ReferencedSOPInstanceUID="1.2.392.100.7.7")]
    )
    ds.PersonIdentificationCodeSequence = Sequence(
        [code(plant("code of a person", "EMP90817"), "99STAFF", plant("name in a code", "職員野"))]
    )
    ds.OtherPatientIDsSequence = Sequence([item(PatientID=plant("id in a sequence", "OLDID4711"))])
    ds.SourcePatientGroupIdentificationSequence = Sequence(
        [item(PatientID=plant("id of a group", "GROUP0815"))]
    )
    ds.RequestAttributesSequence = Sequence(
        [item(RequestedProcedureDescription=plant("request", "依頼内容の文"))]
    )
    # Content of a report.
    person = item(
        ValueType="PNAME",
        ConceptNameCodeSequence=Sequence([code("121008", "DCM", "Person Observer Name")]),
    )
    person.PersonName = plant("PNAME item", "Kansatsu") + "^Sha"
    number = item(
        ValueType="TEXT",
        ConceptNameCodeSequence=Sequence([code("121030", "DCM", "Subject ID")]),
        TextValue=plant("subject's id", "SUBJ31415"),
    )
    text = item(
        ValueType="TEXT",
        ConceptNameCodeSequence=Sequence([code("121071", "DCM", "Finding")]),
        TextValue=plant("known name in text", "川本 健太")
        + "氏。肺S6に結節。主治医："
        + plant("unknown name in text", "無名山")
        + "。電話 "
        + plant("phone in text", "03-9876-5432")
        + "。前回 "
        + plant("date in text", "2023年3月7日")
        + " の "
        + plant("hospital in text", "夢野記念病院")
        + " のCTと比較。"
        + "ID: "
        + plant("id in text", "ZZ-55512"),
    )
    day = item(ValueType="DATE", Date=plant("date item", "20221111"))
    day.ConceptNameCodeSequence = Sequence([code("111018", "DCM", "Content Date")])
    ds.ContentSequence = Sequence(
        [item(ValueType="CONTAINER", ContentSequence=Sequence([person, number, text, day]))]
    )
    # Private: text, bytes, a sequence, and a creator who names somebody.
    block = ds.private_block(0x0099, plant("private creator", "KAWAMOTO PRIVATE"), create=True)
    block.add_new(0x01, "LO", plant("private text", "private plant"))
    block.add_new(0x02, "UN", plant("private bytes", "private bytes plant").encode() + b".")
    inner = item(PatientName=plant("name in a private sequence", "Himitsu") + "^No")
    block.add_new(0x03, "SQ", Sequence([inner]))
    safe = ds.private_block(0x0019, "SIEMENS MR HEADER", create=True)
    safe.add_new(0x08, "CS", plant("unsafe element of a safe creator", "IMAGE NUM 4PLANT"))
    stolen = ds.private_block(0x7053, "Not Philips", create=True)
    stolen.add_new(0x00, "DS", plant("safe element of another creator", "3.14159265"))
    # Overlays, curves, padding, preamble, file meta.
    ds[0x60000010] = DataElement(0x60000010, "US", 8)
    ds[0x60000011] = DataElement(0x60000011, "US", 8)
    ds[0x60003000] = DataElement(0x60003000, "OW", plant("overlay", "overlay data plant").encode())
    ds[0x60004000] = DataElement(
        0x60004000, "LT", plant("overlay comment", "overlay comment plant")
    )
    ds[0x50000040] = DataElement(0x50000040, "LO", plant("curve label", "curve plant"))
    ds[0xFFFCFFFC] = DataElement(
        0xFFFCFFFC, "OB", plant("trailing padding", "trailing plant").encode()
    )
    ds.preamble = plant("preamble", "Kawamoto in the preamble").encode().ljust(128, b"\0")
    meta = ds.file_meta
    meta.SourceApplicationEntityTitle = plant("file meta AE", "METAAE77")
    meta.SendingApplicationEntityTitle = plant("file meta AE 2", "METAAE88")
    meta.PrivateInformationCreatorUID = plant("file meta UID", "1.2.392.100.5.5")
    meta.PrivateInformation = plant("file meta bytes", "meta private plant").encode()
    _keep(made)
    return made


def _keep(made: Planted) -> None:
    """Add what research needs, and remember it."""
    ds = made.dataset
    values = {
        # geometry
        "ImagePositionPatient": ["-120.5", "-131.25", "17.0000001"],
        "ImageOrientationPatient": ["1", "0", "0", "0", "0.948", "-0.317"],
        "PixelSpacing": ["0.697265625", "0.697265625"],
        "SliceThickness": "1.25",
        "SpacingBetweenSlices": "1.0",
        "SliceLocation": "17.0000001",
        "GantryDetectorTilt": "-18.5",
        "PatientPosition": "HFS",
        # pixels
        "RescaleSlope": "1",
        "RescaleIntercept": "-1024",
        "RescaleType": "HU",
        "WindowCenter": ["40", "-600"],
        "WindowWidth": ["400", "1500"],
        "SmallestImagePixelValue": 3,
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI"],
        # acquisition
        "KVP": "120",
        "XRayTubeCurrent": "250",
        "ExposureTime": "500",
        "Exposure": "125",
        "ConvolutionKernel": "B30f",
        "CTDIvol": 7.25,
        "SpiralPitchFactor": 0.9,
        "InstanceNumber": "17",
        "SeriesNumber": "3",
        "AcquisitionTime": "131211.250000",
        "ContrastBolusAgent": "イオパミロン370",
        "ContrastBolusVolume": "100",
        "ScanningSequence": ["SE", "IR"],
        "EchoTime": "2.46",
        # device
        "Manufacturer": "SIEMENS",
        "ManufacturerModelName": "SOMATOM Definition Flash",
        "DeviceSerialNumber": "73412",
        "DeviceUID": "1.2.392.200036.5.1",
        "DetectorID": "DET-4",
        # patient characteristics
        "PatientSex": "F",
        "PatientSize": "1.62",
        "PatientWeight": "57.5",
        "PatientAge": "075Y",
        "PregnancyStatus": 1,
        # SUV
        "Units": "BQML",
        "DecayCorrection": "START",
    }
    for keyword, value in values.items():
        setattr(ds, keyword, value)
        made.keep[keyword] = ds[keyword].value
    ds.RadiopharmaceuticalInformationSequence = Sequence(
        [
            item(
                Radiopharmaceutical="FDG",
                RadiopharmaceuticalStartTime="121500.00",
                RadionuclideTotalDose="366300000",
                RadionuclideHalfLife="6586.2",
                RadionuclidePositronFraction="0.97",
            )
        ]
    )
    safe = ds.private_block(0x0019, "SIEMENS MR HEADER", create=True)
    safe.add_new(0x0C, "IS", "800")
    safe.add_new(0x0E, "FD", [0.1, -0.7, 0.707])
    philips = ds.private_block(0x2001, "Philips Imaging DD 001", create=True)
    philips.add_new(0x03, "FL", 800.0)
    ge = ds.private_block(0x0043, "GEMS_PARM_01", create=True)
    ge.add_new(0x39, "IS", ["1000000050", "8", "0", "0"])


SAFE_PRIVATE = {
    (0x0019, "SIEMENS MR HEADER", 0x0C): 800,
    (0x0019, "SIEMENS MR HEADER", 0x0E): [0.1, -0.7, 0.707],
    (0x2001, "Philips Imaging DD 001", 0x03): 800.0,
    (0x0043, "GEMS_PARM_01", 0x39): [1000000050, 8, 0, 0],
}


def write_raw(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def element(tag: int, vr: bytes, value: bytes) -> bytes:
    """Return an element in explicit VR little endian."""
    value += b"\0" * (len(value) % 2)
    head = struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, vr)
    return head + struct.pack("<H", len(value)) + value
