"""Of a description only radiology is left."""

# ruff: noqa: RUF001 - Japanese letters and signs are meant

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kakehashi.store.deidentify import vocabulary


@pytest.mark.parametrize(
    "text",
    [
        "CT ABD W/ CONTRAST",
        "MRI_Abdomen",
        "t2_tse_fs_sag_3mm",
        "AXIAL 0.625mm",
        "5.0x5.0 MPR",
        "胸部CT 造影",
        "腹部ダイナミックCT 門脈相",
        "頭部単純",
        "DWI b1000",
        "PET AC WB 3D",
        "Omnipaque 300",
        "イオパミロン370 100ml",
        "CHESTABDOMEN",
        "Left Kidney",
        "GTV_primary",
    ],
)
def test_radiology_stays_as_it_was(text):
    assert vocabulary.clean(text) == text


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Yamada chest", "chest"),
        ("胸部CT 川本健太 造影", "胸部CT 造影"),
        ("山下先生 頭部単純", "頭部単純"),
        ("前田 CT", "CT"),
        ("ラインハルト", ""),
        ("room12345 lung", "lung"),
        ("ID12345678 lung", "lung"),
        ("20240501 CT", "CT"),
        ("2024/05/01 CT", "CT"),
        ("R6.5.1 CT", "CT"),
        ("5/1 CT", "CT"),
        ("CT 1.2.392.100.1.1", "CT"),
        ("CT 03-1234-5678", "CT"),
        ("CT 03(1234)5678 090-1234-5678", "CT"),
        ("name@example.com CT", "CT"),
        ("ＣＴ　ﾀﾞｲﾅﾐｯｸ", "CT ダイナミック"),
        ("KawamotoChest", ""),
        ("Chest_of_Kawamoto", "Chest_of"),
        ("東京病院 胸部", "胸部"),
    ],
)
def test_all_other_words_and_numbers_go(text, left):
    assert vocabulary.clean(text) == left


@given(st.text(max_size=40))
def test_cleaning_is_final(text):
    once = vocabulary.clean(text)
    assert vocabulary.clean(once) == once
    assert len(once) <= len(text) * 20
