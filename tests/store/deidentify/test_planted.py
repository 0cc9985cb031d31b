"""Identifiers planted everywhere: none is found in what is written, and what is needed stays."""

from __future__ import annotations

import io

import pydicom
import pytest
from pydicom import uid

from kakehashi.store.deidentify import Names, residue
from tests.store.deidentify.plants import CHARSETS, SAFE_PRIVATE, find, planted

SYNTAXES = (uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian)


@pytest.fixture(params=[(c, s) for c in CHARSETS for s in SYNTAXES[: 2 if c == "utf8" else 1]])
def case(request, deidentifier, tmp_path):
    charset, syntax = request.param
    made = planted()
    source = tmp_path / "in.dcm"
    source.write_bytes(made.write(charset, syntax))
    outcome = deidentifier.object(pydicom.dcmread(source), facility="F01")
    target = tmp_path / "out.dcm"
    outcome.write(target)
    return made, source, target, outcome


def test_there_are_enough_plants_of_all_kinds():
    made = planted()
    assert len(made.plants) >= 60
    assert len(set(made.plants.values())) >= 60
    vrs = {"AE", "CS", "DA", "DT", "LO", "LT", "SH", "ST", "TM", "UC", "UI", "UN", "UR", "OB"}
    assert all(any(f"({vr})" in label for label in made.plants) for vr in vrs)


def test_every_plant_can_be_found_in_the_input(case):
    made, source, _, _ = case
    data = source.read_bytes()
    missing = [label for label, text in made.plants.items() if not find(data, text)]
    assert missing == []


def test_no_plant_is_found_in_the_output(case):
    made, _, target, _ = case
    data = target.read_bytes()
    found = [label for label, text in made.plants.items() if find(data, text)]
    assert found == []


def test_what_is_needed_is_intact(case):
    made, source, target, _ = case
    before, after = pydicom.dcmread(source), pydicom.dcmread(target)
    for keyword, value in made.keep.items():
        assert after[keyword].value == value, keyword
    assert after.PixelData == before.PixelData
    for (group, creator, element), value in SAFE_PRIVATE.items():
        found = after.private_block(group, creator)[element].value
        assert (list(found) if isinstance(value, list) else found) == value
    tracer = after.RadiopharmaceuticalInformationSequence[0]
    for keyword in (
        "RadionuclideTotalDose",
        "RadionuclideHalfLife",
        "RadiopharmaceuticalStartTime",
    ):
        assert (
            tracer[keyword].value == before.RadiopharmaceuticalInformationSequence[0][keyword].value
        )
    assert after.StudyDescription == "胸部CT"
    assert after.SeriesDescription == "Chest 5mm"
    assert after.ImageComments == "造影"


def test_the_output_says_what_was_done(case):
    _, _, target, outcome = case
    after = pydicom.dcmread(target)
    assert after.SpecificCharacterSet == "ISO_IR 192"
    assert after.PatientIdentityRemoved == "YES"
    assert after.DeidentificationMethod
    codes = [item.CodeValue for item in after.DeidentificationMethodCodeSequence]
    assert codes == ["113100", "113105", "113107", "113108", "113109", "113111", "113104"]
    assert after.LongitudinalTemporalInformationModified == "MODIFIED"
    assert after.file_meta.MediaStorageSOPInstanceUID == after.SOPInstanceUID
    assert after.preamble == bytes(128)
    assert {element.tag.element for element in after.file_meta} <= {0, 1, 2, 3, 0x10, 0x12, 0x13}
    assert not after.PatientBirthDate
    assert outcome.held is None


@pytest.mark.parametrize(
    ("part", "labels"),
    [
        ("names.Matcher.find_in", {"name in a kept text", "name in a code string (CS)"}),
        ("elements.clean_report", {"phone in text", "hospital in text", "date in text"}),
        ("vocabulary.clean", {"unknown word in a description"}),
        ("elements.shift_date", {"StudyDate (DA)"}),
    ],
)
def test_without_each_part_its_plants_would_be_found(deidentifier, monkeypatch, part, labels):
    made = planted()
    dataset = pydicom.dcmread(io.BytesIO(made.write("utf8")))
    dataset.SOPClassUID = uid.BasicTextSRStorage  # in others text is no report
    same = {"names.Matcher.find_in": lambda *_: []}.get(part, lambda text, *_: text)
    monkeypatch.setattr(f"kakehashi.store.deidentify.{part}", same)
    buffer = io.BytesIO()
    deidentifier.object(dataset, facility="F01").write(buffer)
    found = {label for label, text in made.plants.items() if find(buffer.getvalue(), text)}
    assert labels <= found


def test_structure_of_a_report_stays(case):
    _, _, target, _ = case
    content = pydicom.dcmread(target).ContentSequence[0].ContentSequence
    assert [item.ValueType for item in content] == ["TEXT", "DATE"]
    assert "肺S6に結節" in content[0].TextValue
    assert content[0].ConceptNameCodeSequence[0].CodeMeaning == "Finding"


def test_the_input_is_not_changed(deidentifier):
    raw = planted().write("iso2022")
    dataset = pydicom.dcmread(io.BytesIO(raw))
    deidentifier.object(dataset, facility="F01")
    again = io.BytesIO()
    dataset.save_as(again)
    assert again.getvalue() == raw


def test_equal_inputs_give_equal_bytes(deidentifier):
    raw = planted().write("iso2022")
    written = []
    for _ in range(2):
        buffer = io.BytesIO()
        deidentifier.object(pydicom.dcmread(io.BytesIO(raw)), facility="F01").write(buffer)
        written.append(buffer.getvalue())
    assert written[0] == written[1]


def test_the_last_look_is_silent_on_the_output_and_loud_on_the_input(case):
    _, source, target, outcome = case
    assert residue(outcome, outcome.names) == []
    assert residue(target.read_bytes(), outcome.names) == []
    assert residue(source.read_bytes(), outcome.names) == ["date", "id", "name", "place", "uid"]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "cp932", "euc_jp", "utf-16-le", "utf-16-be", "iso2022_jp"]
)
def test_the_last_look_finds_a_name_in_every_encoding(encoding):
    names = Names(persons=frozenset({"川本^健太=かわもと^けんた"}))
    for name in ("川本", "健太", "カワモト"):
        data = b"\x01\x02header" + f"、{name}、".encode(encoding) + b"\0\xff"
        assert residue(data, names) == ["name"], name
        other = b"\x01\x02header" + "、山田、".encode(encoding) + b"\0\xff"
        assert residue(other, names) == []


def test_a_name_put_back_into_the_output_is_found(deidentifier):
    dataset = pydicom.dcmread(io.BytesIO(planted().write("utf8")))
    outcome = deidentifier.object(dataset, facility="F01")
    outcome.dataset.StudyDescription = "CT 健太 川本"
    assert residue(outcome, outcome.names) == ["name"]
    outcome.dataset.StudyDescription = "CT 20240516"
    assert residue(outcome, outcome.names) == ["date"]
