"""Items of a report that are an identifier by their concept go, whatever is in them."""

from __future__ import annotations

import io

import pytest
from pydicom import Sequence, uid
from pydicom.dataelem import DataElement

from kakehashi.store.deidentify.content import IDENTIFYING
from kakehashi.store.deidentify.kept import meaning_of
from tests.store.deidentify.plants import code, ct, find, item

SECRET = "Quagga 4711"


def about(concept: tuple[str, str, str], kind: str = "TEXT", **values: object):
    return item(ValueType=kind, ConceptNameCodeSequence=Sequence([code(*concept)]), **values)


def report(deidentifier, *items, by_reference: bool = False):
    dataset = ct()
    dataset.SOPClassUID = uid.ComprehensiveSRStorage
    inner = [*items]
    if by_reference:
        other = item(RelationshipType="INFERRED FROM")
        other[0x0040DB73] = DataElement(0x0040DB73, "UL", [1, 1])
        inner.append(other)
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.ContentSequence = Sequence(
        [item(ValueType="CONTAINER", ContentSequence=Sequence(inner))]
    )
    target = io.BytesIO()
    outcome = deidentifier.object(dataset, facility="F01")
    outcome.write(target)
    return outcome.dataset.ContentSequence[0].ContentSequence, target.getvalue()


CODES = "111700 111705 113516 121121 121434 126070 130203 130264 121008 121030 121041 113872"


@pytest.mark.parametrize("value", CODES.split())
@pytest.mark.parametrize("by_reference", [False, True])
def test_a_concept_that_is_an_identifier_has_no_text(deidentifier, value, by_reference):
    # The meaning is what the sender makes of it.
    found, raw = report(
        deidentifier,
        about((value, "DCM", "Something"), TextValue=SECRET),
        about(("121071", "DCM", "Finding"), TextValue="nodule"),
        by_reference=by_reference,
    )
    assert not find(raw, SECRET)
    assert len(found) == (3 if by_reference else 1)
    assert found[1 if by_reference else 0].TextValue == "nodule"


@pytest.mark.parametrize(
    "meaning",
    [
        "Specimen Identifier",
        "Chart Number",
        "Name of Reader",
        "Referring Physician",
        "Contact Person",
        "Ward location",
        "Institution",
        "Home Address",
        "Phone",
        "Telephone No.",
        "Staff ID",
        "Operator",
        "氏名",
        "担当医師",
        "施設名",
        "連絡先電話",
        "住所",
        "患者番号",
        "検体識別子",
        "病棟",
    ],
)
def test_a_concept_whose_meaning_is_that_of_an_identifier_has_no_text(deidentifier, meaning):
    for kind, values in (("TEXT", {"TextValue": SECRET}), ("PNAME", {"PersonName": SECRET})):
        found, raw = report(deidentifier, about(("L1", "99HERE", meaning), kind, **values))
        assert not find(raw, SECRET)
        assert len(found) == 0


def test_measurements_codes_and_references_stay_though_their_concept_sounds_like_it(deidentifier):
    measured = item(
        NumericValue="3", MeasurementUnitsCodeSequence=Sequence([code("1", "UCUM", "1")])
    )
    lesions = ("111406", "DCM", "Number of similar findings")
    found, _ = report(
        deidentifier,
        about(lesions, "NUM", MeasuredValueSequence=Sequence([measured])),
        about(
            ("112013", "DCM", "Location in Chest"),
            "CODE",
            ConceptCodeSequence=Sequence([code("39607008", "SCT", "Lung")]),
        ),
        about(("112040", "DCM", "Tracking Unique Identifier"), "UIDREF", UID="1.2.3.4"),
        about(("121071", "DCM", "Finding"), TextValue="nodule"),
        about(("121069", "DCM", "Previous Finding"), TextValue="idiopathic, unnamed"),
    )
    assert [one.ValueType for one in found] == ["NUM", "CODE", "UIDREF", "TEXT", "TEXT"]
    assert found[0].MeasuredValueSequence[0].NumericValue == 3
    assert found[2].UID != "1.2.3.4"


def test_what_a_device_is_called_stays_in_a_report_too(deidentifier):
    serial = ("121016", "DCM", "Device Observer Serial Number")
    found, raw = report(
        deidentifier,
        about(serial, TextValue="CT 73412"),
        about(serial, TextValue="Suzuki"),
    )
    assert found[0].TextValue == "CT 73412"
    assert not find(raw, "Suzuki")


def test_a_number_under_such_a_concept_is_looked_for_elsewhere(deidentifier):
    _, raw = report(
        deidentifier,
        about(("L1", "99HERE", "Chart Number"), TextValue="ZX471199"),
        about(("121071", "DCM", "Finding"), TextValue="as in ZX471199"),
    )
    assert not find(raw, "ZX471199")


def test_the_listed_codes_are_the_standards():
    assert all(meaning_of("DCM", value) for value in IDENTIFYING)
