from __future__ import annotations

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kakehashi.store.deidentify.charset import decode, encodings_of, redecode
from kakehashi.store.deidentify.tree import read_tree
from tests.store.conftest import DATA

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
    assert redecode(taken, encodings_of(())) == "山田太郎"
    assert redecode("山田太郎", encodings_of(())) == "山田太郎"
    assert redecode("山\ufffd", encodings_of(())) is None


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
