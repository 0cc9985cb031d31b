"""Whatever an object is made of, no name, id, date or UID of it is left."""

from __future__ import annotations

import io

import pydicom
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset, Sequence
from pydicom.datadict import DicomDictionary
from pydicom.dataelem import DataElement

from kakehashi.store.deidentify import residue
from kakehashi.store.dicom import tolerant
from tests.store.deidentify.plants import NUMBER, PATIENT, ct, find

SECRETS = ["Kawamoto", "川本", "健太", "カワモト", "ｶﾜﾓﾄ", NUMBER, "20240516", "1.2.392.100.1.1"]
_DEVICE = (0x00181002, 0x0018100B)  # UIDs that stay, by the option for devices
_BY_VR: dict[str, list[int]] = {}
for _tag, (_vr, *_) in DicomDictionary.items():
    if 0x00080000 < _tag < 0x50000000 and _tag & 0xFFFF and _tag not in _DEVICE:
        _BY_VR.setdefault(_vr, []).append(_tag)
_SENTENCES = [
    "{}",
    "CT {} chest",
    "{}様の所見",
    "by {}, M.D.",
    "{}_{}",
    "造影 {}",
]
_words = st.builds(
    lambda sentence, one, two: sentence.format(one, two),
    st.sampled_from(_SENTENCES),
    st.sampled_from(SECRETS),
    st.sampled_from(SECRETS),
)
_TEXT = ("LO", "SH", "ST", "LT", "UT", "UC", "PN")


def _elements() -> st.SearchStrategy[DataElement]:
    texts = [
        st.builds(DataElement, st.sampled_from(_BY_VR[vr]), st.just(vr), _words) for vr in _TEXT
    ]
    others = {
        "DA": st.just("20240516"),
        "DT": st.just("20240516101010"),
        "UI": st.just("1.2.392.100.1.1"),
        "AE": st.sampled_from(["KAWAMOTO", NUMBER]),
        "CS": st.sampled_from(["KAWAMOTO", NUMBER, "D20240516"]),
        "IS": st.just(NUMBER),
        "DS": st.just(NUMBER),
        "TM": st.sampled_from(["101010", NUMBER]),
        "OB": st.just(b"Kawamoto"),
        "UN": st.just(b"Kawamoto"),
        "US": st.integers(0, 65535),
        "FD": st.floats(allow_nan=False, width=64),
    }
    rest = [
        st.builds(DataElement, st.sampled_from(_BY_VR[vr]), st.just(vr), value)
        for vr, value in others.items()
        if vr in _BY_VR
    ]
    private = st.builds(
        DataElement, st.sampled_from([0x00990010, 0x00991001]), st.just("LO"), _words
    )
    return st.one_of(*texts, *rest, private)


def _dataset(elements: list[DataElement]) -> Dataset:
    dataset = Dataset()
    for element in elements:
        dataset[element.tag] = element
    return dataset


def _nested(inner: st.SearchStrategy[Dataset]) -> st.SearchStrategy[Dataset]:
    sequence = st.builds(
        lambda tag, items: DataElement(tag, "SQ", Sequence(items)),
        st.sampled_from(_BY_VR["SQ"]),
        st.lists(inner, min_size=1, max_size=2),
    )
    return st.lists(st.one_of(_elements(), sequence), max_size=6).map(_dataset)


_items = st.recursive(st.lists(_elements(), max_size=6).map(_dataset), _nested, max_leaves=6)
_OWN = {0x00080005, 0x00080016, 0x00080018, 0x0020000D, 0x0020000E, 0x00100010, 0x00100020}


@settings(max_examples=80, deadline=None)
@given(_items, st.sampled_from(["ISO_IR 192", "sjis"]))
def test_nothing_is_left_of_any_object(deidentifier, content, charset):
    dataset = ct()
    dataset.PatientName = PATIENT
    dataset.StudyDate = "20240516"
    for element in content:
        if int(element.tag) not in _OWN and element.tag.group != 0x0028:
            dataset[element.tag] = element
    dataset.SpecificCharacterSet = "ISO_IR 192" if charset == "ISO_IR 192" else "ISO 2022 IR 87"
    if charset == "sjis":
        dataset.SpecificCharacterSet = ["", "ISO 2022 IR 13", "ISO 2022 IR 87"]
    source, target = io.BytesIO(), io.BytesIO()
    with tolerant():
        dataset.save_as(source, enforce_file_format=True)
        source.seek(0)
        outcome = deidentifier.object(pydicom.dcmread(source), facility="F01")
        outcome.write(target)
        left = [secret for secret in SECRETS if find(target.getvalue(), secret)]
        assert left == []
        assert residue(outcome, outcome.names) == []
        again = pydicom.dcmread(io.BytesIO(target.getvalue()))
        assert again.PixelData == dataset.PixelData
        for element in again.iterall():
            str(element.value)


def test_an_object_made_in_memory_is_as_good_as_a_file(deidentifier):
    dataset = ct()
    dataset.PatientName = PATIENT
    dataset.SpecificCharacterSet = "ISO_IR 192"
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    buffer.seek(0)
    written = []
    for source in (dataset, pydicom.dcmread(buffer)):
        target = io.BytesIO()
        deidentifier.object(source, facility="F01").write(target)
        written.append(target.getvalue())
    assert written[0] == written[1]


def test_one_uid_is_replaced_by_one_everywhere(deidentifier):
    dataset = ct()
    reference = Dataset()
    reference.ReferencedSOPInstanceUID = dataset.SOPInstanceUID
    series = Dataset()
    series.SeriesInstanceUID = dataset.SeriesInstanceUID
    series.ReferencedInstanceSequence = Sequence([reference])
    dataset.ReferencedSeriesSequence = Sequence([series])
    after = deidentifier.object(dataset, facility="F02").dataset
    inside = after.ReferencedSeriesSequence[0]
    assert inside.SeriesInstanceUID == after.SeriesInstanceUID != dataset.SeriesInstanceUID
    assert inside.ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == after.SOPInstanceUID


def test_an_age_is_given_for_a_date_of_birth(deidentifier):
    dataset = ct()
    dataset.PatientBirthDate = "19481103"
    after = deidentifier.object(dataset, facility="F01").dataset
    assert after.PatientAge == "075Y"
    assert not after.PatientBirthDate
    dataset.PatientAge = "097Y"
    assert deidentifier.object(dataset, facility="F01").dataset.PatientAge == "090Y"
