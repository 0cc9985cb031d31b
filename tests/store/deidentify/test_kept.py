"""What is kept as it is says nothing of a person whom nobody named: texts, codes and numbers."""

from __future__ import annotations

import io
import struct

import pydicom
import pytest
from pydicom import Sequence, uid
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.tag import Tag

from kakehashi.store.dicom import tolerant
from tests.store.deidentify.plants import code, ct, find, item

DEVICE = ["StationName", "DeviceSerialNumber", "DetectorID", "DeviceLabel", "GantryID"]
VENDOR = ["SoftwareVersions", "ManufacturerModelName", "ReceiveCoilName"]
SIGNS = [
    "03-1234-5678",
    "090 1234 5678",
    "hiroshi@example.jp",
    "2024-03-01",
    "2024/3/1",
    "令和6年3月1日",
    "R6.3.1",
    "3/1/2024",
    "1 Mar 2024",
    "20240301",
    "Dr. Smith",
    "鈴木先生",
]


def cleaned(deidentifier, **values):
    dataset = ct()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    with tolerant():
        for keyword, value in values.items():
            setattr(dataset, keyword, value)
        source = io.BytesIO()
        dataset.save_as(source, enforce_file_format=True)
        source.seek(0)
        outcome = deidentifier.object(pydicom.dcmread(source), facility="F01")
        target = io.BytesIO()
        outcome.write(target)
    return outcome.dataset, target.getvalue()


@pytest.mark.parametrize("keyword", DEVICE + VENDOR)
@pytest.mark.parametrize("text", SIGNS)
def test_a_kept_text_with_the_form_of_a_day_or_an_address_goes(deidentifier, keyword, text):
    _, written = cleaned(deidentifier, **{keyword: f"CT2 {text}"})
    assert not find(written, text)


@pytest.mark.parametrize("text", ["090 1234 5678", "1 Mar 2024", "Mar 1, 2024", "R6.3.1"])
def test_a_description_keeps_no_day_and_no_phone_number_made_of_words_it_may_keep(
    deidentifier, text
):
    done, _ = cleaned(deidentifier, SeriesDescription=f"Chest {text} axial 5mm")
    assert done.SeriesDescription == "Chest axial 5mm"


@pytest.mark.parametrize("keyword", DEVICE)
@pytest.mark.parametrize(
    "text", ["鈴木 一郎", "SUZUKI ICHIRO", "Suzuki", "CT SMITH", "ABE", "スズキ"]
)
def test_a_name_that_nobody_named_goes_from_what_the_site_calls_a_device(
    deidentifier, keyword, text
):
    _, written = cleaned(deidentifier, **{keyword: text})
    for word in text.split():
        assert word == "CT" or not find(written, word)


@pytest.mark.parametrize(
    ("keyword", "text"),
    [
        ("StationName", "CTAWP73412"),
        ("StationName", "ROOM 3 CT"),
        ("StationName", "MRC35123"),
        ("StationName", "PHILIPS-A1B2C3"),
        ("DeviceSerialNumber", "0000123456"),
        ("DeviceSerialNumber", "1BD2022"),
        ("DetectorID", "DET-4"),
        ("ManufacturerModelName", "MR 7700"),
        ("ManufacturerModelName", "Achieva MR Elition"),
        ("ManufacturerModelName", "NAEOTOM Alpha.Peak"),
        ("SoftwareVersions", "syngo CT VB20A"),
        ("SoftwareVersions", "5.1.7.2"),
        ("ConvolutionKernel", "Br40d\\3"),
        ("SequenceName", "*tfl3d1_16ns"),
        ("Radiopharmaceutical", "Fluorodeoxyglucose"),
        ("TimezoneOffsetFromUTC", "+0900"),
    ],
)
def test_what_devices_are_called_stays(deidentifier, keyword, text):
    done, _ = cleaned(deidentifier, **{keyword: text})
    value = done[keyword].value
    assert (value if isinstance(value, str) else "\\".join(value)) == text


@pytest.mark.parametrize(
    "text",
    ["Suzuki Ichiro", "suzuki", "2024-03-01", "03-1234-5678", "03 1234 5678", "20240301", "A" * 17],
)
def test_a_code_string_is_one_or_goes_and_leaves_its_place(deidentifier, text):
    done, written = cleaned(deidentifier, ImageType=["ORIGINAL", "PRIMARY", text, "CT_SOM5 SPI"])
    assert not find(written, text)
    assert list(done.ImageType) == ["ORIGINAL", "PRIMARY", "", "CT_SOM5 SPI"]


def test_code_strings_of_devices_stay(deidentifier):
    values = ["ORIGINAL", "PRIMARY", "M_SE", "Axial", "DIS2D", "CT_SOM7 SPI DUAL"]
    done, _ = cleaned(deidentifier, ImageType=values)
    assert list(done.ImageType) == values


def meaning(deidentifier, *coded: str) -> tuple[str, str, str]:
    done, _ = cleaned(deidentifier, ProcedureCodeSequence=Sequence([code(*coded)]))
    found = done.ProcedureCodeSequence[0]
    return found.CodeValue, found.CodingSchemeDesignator, found.CodeMeaning


@pytest.mark.parametrize("scheme", ["DCM", "SCT", "LN", "JJ1017", "99HERE"])
@pytest.mark.parametrize("text", ["鈴木 一郎", "Suzuki Ichiro", "03-1234-5678", "2024-03-01"])
def test_a_scheme_is_no_licence_for_the_meaning(deidentifier, scheme, text):
    made = meaning(deidentifier, "123", scheme, text)
    assert not any(word in made[2] for word in text.split())


def test_the_meaning_of_a_code_of_the_standard_stays_or_becomes_the_standards(deidentifier):
    assert meaning(deidentifier, "121029", "DCM", "Subject Name")[2] == "Subject Name"
    assert meaning(deidentifier, "T-A0100", "SRT", "Brain")[2] == "Brain"
    assert meaning(deidentifier, "126070", "DCM", "Suzuki Ichiro")[2] == (
        "Subject Time Point Identifier"
    )
    assert meaning(deidentifier, "mm", "UCUM", "mm") == ("mm", "UCUM", "mm")
    assert meaning(deidentifier, "mg/mL", "UCUM", "mg/mL")[0] == "mg/mL"
    assert meaning(deidentifier, "1000-0", "JJ1017", "胸部単純CT")[2] == "胸部単純CT"


@pytest.mark.parametrize("scheme", ["DCM", "99HERE", "UCUM"])
@pytest.mark.parametrize("text", ["SUZUKI", "Suzuki^Ichiro", "ichiro.suzuki", "03-1234-5678"])
def test_a_code_is_a_code_in_every_scheme(deidentifier, scheme, text):
    assert meaning(deidentifier, text, scheme, "Chest")[0] == "REMOVED"


def test_a_scheme_has_the_form_of_one(deidentifier):
    assert meaning(deidentifier, "L1", "99SUZUKI", "Chest") == ("L1", "REMOVED", "Chest")
    assert meaning(deidentifier, "L1", "99SDM", "Chest") == ("L1", "99SDM", "Chest")


@pytest.mark.parametrize(
    ("tag", "vr", "value"),
    [
        ("CTDIvol", "FD", b"SUZUKI H"),
        ("CTDIvol", "FD", b"SUZUKI A"),
        ("CTDIvol", "FD", b"SUZUKI\0\0"),
        ("DiffusionGradientOrientation", "FD", b"SUZUKI ICHIRO 03-1234567"),
        ("TableSpeed", "FD", b"SUZUKI H"),
        ("RecommendedDisplayFrameRateInFloat", "FL", b"SUZUKI H"),
        ("TableOfParameterValues", "FL", b"20190304"),
        ("TableOfParameterValues", "FL", b"03-1234-5678"),
        ("TableOfParameterValues", "FL", "鈴木一郎".encode()),
        ("ReferencedPathIndex", "US", "鈴木一郎".encode()),
        ("SelectorULValue", "UL", "鈴木一郎".encode()),
        ("LongPrimitivePointIndexList", "OL", "鈴木一郎".encode()),
        ("RedPaletteColorLookupTableData", "OW", "鈴木一郎".encode()),
        ("FloatPixelData", "OF", b"SUZUKI ICHIR"),
        ("SliceThickness", "DS", b"20190304"),
        ("InstanceNumber", "IS", b"0312345678"),
        ("SelectorULValue", "UL", b"SUZUKI H"),
        ("RedPaletteColorLookupTableDescriptor", "US", b"SUZUKI"),
        ("SelectorUVValue", "UV", b"SUZUKI H"),
        ("SliceThickness", "DS", b"03-1234-5678"),
        ("SliceThickness", "DS", b"2024-03-01"),
        ("KVP", "DS", b"0.1\\SUZUKI"),
        ("InstanceNumber", "IS", b"1-2-3 "),
        ("TimezoneOffsetFromUTC", "SH", b"Suzuki H"),
        ("DeviceUID", "UI", b"0312345678"),
        ("DeviceUID", "UI", b"1.2.7701234.5"),
    ],
)
def test_text_in_the_place_of_a_number_goes(deidentifier, tag, vr, value):
    dataset = ct()
    number = Tag(tag)
    dataset[number] = RawDataElement(number, vr, len(value), value, 0, False, True)
    assert number not in deidentifier.object(dataset, facility="F01").dataset


@pytest.mark.parametrize(
    ("tag", "vr", "value"),
    [
        ("CTDIvol", "FD", struct.pack("<d", 7.25)),
        ("CTDIvol", "FD", b"\x7b\x14\x2e\x47\x61\x7a\x54\x3f"),  # all but one printable
        ("CTDIvol", "FD", b"333333\x40\x40"),  # 32.4
        ("CTDIvol", "FD", b"ffffff\x26\x40"),  # 11.2
        ("CTDIvol", "FD", struct.pack("<d", 0.0)),
        ("DiffusionGradientOrientation", "FD", struct.pack("<3d", 0.1, -0.7, 0.707)),
        ("TableOfParameterValues", "FL", struct.pack("<3f", 0.1, 27.3, -1e5)),
        ("ReferencedPathIndex", "US", struct.pack("<6H", 1, 2, 3, 256, 513, 40000)),
        ("RedPaletteColorLookupTableData", "OW", bytes(range(256)) * 2),
        ("RadionuclideTotalDose", "DS", b"366300000 "),
        ("SliceThickness", "DS", b"1.25"),
        ("SliceThickness", "DS", b"+.5e-1"),
        ("ImagePositionPatient", "DS", b"-1.5\\2\\3 "),
        ("InstanceNumber", "IS", b"17"),
        ("DeviceUID", "UI", b"1.2.392.200036.5.1"),
    ],
)
def test_numbers_stay(deidentifier, tag, vr, value):
    dataset = ct()
    number = Tag(tag)
    dataset[number] = RawDataElement(number, vr, len(value), value, 0, False, True)
    assert number in deidentifier.object(dataset, facility="F01").dataset


@pytest.mark.parametrize("sequence", ["ProtocolContextSequence", "ContentItemModifierSequence"])
def test_free_text_outside_of_a_report_keeps_only_words_of_radiology(deidentifier, sequence):
    text = item(ValueType="TEXT", TextValue="Chest Suzuki Ichiro")
    done, written = cleaned(deidentifier, **{sequence: Sequence([text])})
    assert done[sequence].value[0].TextValue == "Chest"
    assert not find(written, "Suzuki")
    # The control: in a report, of the second tier, text is free.
    done, _ = cleaned(
        deidentifier, SOPClassUID=uid.BasicTextSRStorage, **{sequence: Sequence([text])}
    )
    assert "Suzuki" in done[sequence].value[0].TextValue


def test_what_stands_in_the_file_meta_information_is_ours(deidentifier):
    dataset = ct()
    dataset.preamble = b"SUZUKI ICHIRO".ljust(128, b"\0")
    dataset.file_meta.ImplementationVersionName = "SUZUKI"
    dataset.file_meta.SendingApplicationEntityTitle = "SUZUKI"
    dataset[0x00100000] = DataElement(0x00100000, "UL", 0x55555A53)
    target = io.BytesIO()
    deidentifier.object(dataset, facility="F01").write(target)
    assert not find(target.getvalue(), "SUZUKI")
    assert b"SZUU" not in target.getvalue()
