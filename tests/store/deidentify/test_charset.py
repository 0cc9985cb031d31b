from __future__ import annotations

import io

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import uid
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from kakehashi.store.deidentify.charset import decode, encodings_of, readings, redecode
from kakehashi.store.deidentify.tree import read_tree
from tests.store.conftest import DATA
from tests.store.deidentify.plants import ct, find

ISO2022 = encodings_of(("", "ISO 2022 IR 13", "ISO 2022 IR 87"))


@pytest.mark.parametrize(
    ("declared", "raw", "text"),
    [
        ((), b"Yamada ", "Yamada"),
        ((), "山田太郎".encode("cp932"), "山田太郎"),
        ((), "ﾔﾏﾀﾞ".encode("cp932"), "ﾔﾏﾀﾞ"),
        ((), "山田".encode(), "山田"),
        ((), b"\x1b$B;3ED\x1b(B", "山田"),
        (("ISO_IR 100",), "Ménière".encode("latin-1"), "Ménière"),
        (("ISO_IR 100",), "山田太郎".encode("cp932"), "山田太郎"),
        (("ISO_IR 13",), "ﾔﾏﾀﾞ".encode("cp932"), "ﾔﾏﾀﾞ"),
        (("ISO_IR 13",), "山田".encode("cp932"), "山田"),
        (("ISO_IR 192",), "山田".encode(), "山田"),
        (("ISO_IR 192",), "山田".encode("cp932"), "山田"),
        (("GB18030",), "王小东".encode("gb18030"), "王小东"),
        (("", "ISO 2022 IR 87"), b"\x1b$B;3ED\x1b(B", "山田"),
        (("", "ISO 2022 IR 13", "ISO 2022 IR 87"), b"\x1b)I\xd4\xcf\xc0\xde\x1b(B", "ﾔﾏﾀﾞ"),
        (("", "ISO 2022 IR 159"), b"\x1b$(D0!\x1b(B", "丂"),
        (("ISO 2022 IR 6", "ISO 2022 IR 87"), b"x\x1b$B;3ED\x1b(B", "x山田"),
        (("NOBODY KNOWS",), "山田".encode("cp932"), "山田"),
        (("unicode_escape",), b"\\u5c71", "\\u5c71"),
    ],
)
def test_text_is_decoded(declared, raw, text):
    assert decode(raw, encodings_of(declared)) == text


@pytest.mark.parametrize(
    ("declared", "raw"),
    [
        (("ISO_IR 192",), b"\xff\xfe\x00"),
        ((), b"abc\x01def"),
        (("", "ISO 2022 IR 87"), b"\x1b$Bxyz\xff\x1b(B"),
        (("", "ISO 2022 IR 87"), b"\x1b[31mred"),
        (("GB18030",), b"\x81"),
    ],
)
def test_what_is_no_text_is_dropped(declared, raw):
    assert decode(raw, encodings_of(declared)) is None


def test_text_that_was_taken_for_latin_is_undone():
    taken = "山田太郎".encode("cp932").decode("latin-1")
    assert redecode(taken, encodings_of(())) == ["山田太郎"]
    assert redecode("山田太郎", encodings_of(())) == ["山田太郎"]
    assert redecode("山\ufffd", encodings_of(())) == []


@given(
    st.binary(max_size=60),
    st.sampled_from(["", "ISO_IR 100", "ISO_IR 192", "ISO_IR 13", "ISO 2022 IR 87"]),
)
def test_any_bytes_give_a_text_without_control_characters_or_nothing(raw, declared):
    text = decode(raw, encodings_of((declared,)))
    if text is not None:
        assert "\x1b" not in text
        assert "\ufffd" not in text
        text.encode()


@pytest.mark.parametrize(
    ("name", "persons"),
    [
        ("chrH31", "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("chrI2", "Hong^Gildong=洪^吉洞=홍^길동"),
        ("chrX1", "Wang^XiaoDong=王^小東"),
    ],
)
@pytest.mark.parametrize("seen", [False, True])
def test_real_names_are_read_whether_pydicom_has_looked_at_them_or_not(name, persons, seen):
    dataset = pydicom.dcmread(DATA / "charset" / f"{name}.dcm")
    if seen:
        str(dataset.PatientName)
    assert read_tree(dataset).text(0x00100010).rstrip("=") == persons


EUC = "山田太郎".encode("euc_jp")
LATIN = ("ISO_IR 100",)


def with_bytes(charset: str | None, **values: bytes) -> pydicom.Dataset:
    """Return an image with bytes in its text as no writer would put them there."""
    dataset = ct()
    dataset.SpecificCharacterSet = charset
    for keyword, value in values.items():
        tag = Tag(keyword)
        vr = dictionary_VR(tag)
        even = value + b" " * (len(value) % 2)
        dataset[tag] = RawDataElement(tag, vr, len(even), even, 0, False, True)
    return dataset


def written(deidentifier, dataset: pydicom.Dataset) -> tuple[object, bytes]:
    outcome, target = deidentifier.object(dataset, facility="F01"), io.BytesIO()
    outcome.write(target)
    return outcome, target.getvalue()


def forms(text: str) -> list[str]:
    """Return a text, and what its bytes look like in a wrong character set."""
    wrong = [
        text.encode(one).decode(other, "ignore")
        for one in ("euc_jp", "cp932")
        for other in ("latin-1", "cp932", "euc_jp")
        if one != other
    ]
    return [text, *(form for form in wrong if len(form) > 1 and not form.isascii())]


@pytest.mark.parametrize("charset", [None, "ISO_IR 6", "ISO_IR 100"])
@pytest.mark.parametrize("encoding", ["euc_jp", "cp932"])
@pytest.mark.parametrize("keyword", ["SoftwareVersions", "StationName", "SeriesDescription"])
def test_bytes_in_an_undeclared_character_set_are_not_kept(
    deidentifier, charset, encoding, keyword
):
    dataset = with_bytes(charset, **{keyword: "鈴木一郎".encode(encoding)})
    _, raw = written(deidentifier, dataset)
    assert [form for form in forms("鈴木一郎") if find(raw, form)] == []


@pytest.mark.parametrize("charset", [None, "ISO_IR 100"])
@pytest.mark.parametrize("name", ["euc_jp", "cp932"])
@pytest.mark.parametrize("text", ["euc_jp", "cp932", "utf-8", "iso2022_jp"])
def test_a_name_in_an_undeclared_character_set_is_known_in_every_other(
    deidentifier, charset, name, text
):
    dataset = with_bytes(
        charset,
        PatientName="鈴木^一郎".encode(name),
        TextValue="肺に結節。鈴木一郎".encode(text) + b" Chest",
        ConvolutionKernel="B30f 鈴木一郎".encode(text),
        SeriesDescription="胸部 鈴木一郎".encode(text),
    )
    dataset.SOPClassUID = uid.BasicTextSRStorage
    outcome, raw = written(deidentifier, dataset)
    assert [form for form in forms("鈴木") + forms("一郎") if find(raw, form)] == []
    assert "鈴木^一郎" in {value.rstrip("=") for value in outcome.names.persons}


@pytest.mark.parametrize(
    "raw", ["鈴木".encode("euc_jp"), "鈴木".encode("cp932"), "김철수".encode("euc_kr")]
)
@pytest.mark.parametrize("charset", [None, "ISO_IR 100"])
def test_a_report_in_a_character_set_that_is_a_guess_is_blanked(deidentifier, charset, raw):
    dataset = with_bytes(charset, TextValue=raw + b" nodule")
    dataset.SOPClassUID = uid.BasicTextSRStorage
    outcome, _ = written(deidentifier, dataset)
    assert not outcome.dataset.get("TextValue")
    # The control: declared, it is the report's.
    dataset = with_bytes("ISO_IR 192", TextValue="結節 nodule".encode())
    dataset.SOPClassUID = uid.BasicTextSRStorage
    assert written(deidentifier, dataset)[0].dataset.TextValue == "結節 nodule"


@pytest.mark.parametrize(
    ("declared", "raw", "found"),
    [
        ((), EUC, {"山田太郎", EUC.decode("cp932")}),
        (LATIN, EUC, {"山田太郎", EUC.decode("cp932")}),
        ((), "ﾔﾏﾀﾞ".encode("cp932"), {"ﾔﾏﾀﾞ", "ﾔﾏﾀﾞ".encode("cp932").decode("euc_jp")}),
        ((), "山田".encode("cp932"), {"山田"}),
        ((), "山田".encode(), {"山田"}),
        (LATIN, "Ménière".encode("latin-1"), {"Ménière"}),
        ((), "Ménière".encode("latin-1"), set()),
        (("ISO_IR 192",), EUC, {EUC.decode("cp932"), "山田太郎"}),
        (("", "ISO 2022 IR 87"), EUC, {EUC.decode("cp932"), "山田太郎"}),
    ],
)
def test_bytes_are_read_in_every_way_that_gives_a_text(declared, raw, found):
    assert set(readings(raw, encodings_of(declared))) == found
