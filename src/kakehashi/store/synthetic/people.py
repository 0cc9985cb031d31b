"""Fictional people and hospitals, with the names as Japanese hospitals write them."""

from __future__ import annotations

import datetime as dt
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from random import Random

_FAMILY = (
    ("佐藤", "さとう", "SATO"), ("鈴木", "すずき", "SUZUKI"), ("高橋", "たかはし", "TAKAHASHI"),
    ("田中", "たなか", "TANAKA"), ("渡辺", "わたなべ", "WATANABE"), ("伊藤", "いとう", "ITO"),
    ("山本", "やまもと", "YAMAMOTO"), ("中村", "なかむら", "NAKAMURA"),
    ("小林", "こばやし", "KOBAYASHI"), ("加藤", "かとう", "KATO"), ("吉田", "よしだ", "YOSHIDA"),
    ("山田", "やまだ", "YAMADA"), ("佐々木", "ささき", "SASAKI"),
    ("山口", "やまぐち", "YAMAGUCHI"), ("松本", "まつもと", "MATSUMOTO"),
    ("井上", "いのうえ", "INOUE"), ("木村", "きむら", "KIMURA"), ("林", "はやし", "HAYASHI"),
    ("清水", "しみず", "SHIMIZU"), ("斎藤", "さいとう", "SAITO"), ("森", "もり", "MORI"),
    ("池田", "いけだ", "IKEDA"), ("橋本", "はしもと", "HASHIMOTO"),
    ("石川", "いしかわ", "ISHIKAWA"),
)  # fmt: skip
_GIVEN = {
    "M": (
        ("太郎", "たろう", "TARO"), ("健一", "けんいち", "KENICHI"), ("博", "ひろし", "HIROSHI"),
        ("誠", "まこと", "MAKOTO"), ("大輔", "だいすけ", "DAISUKE"), ("隆", "たかし", "TAKASHI"),
        ("直樹", "なおき", "NAOKI"), ("勇", "いさむ", "ISAMU"), ("正雄", "まさお", "MASAO"),
        ("和夫", "かずお", "KAZUO"), ("翔太", "しょうた", "SHOTA"), ("進", "すすむ", "SUSUMU"),
        ("茂", "しげる", "SHIGERU"), ("哲也", "てつや", "TETSUYA"),
    ),
    "F": (
        ("花子", "はなこ", "HANAKO"), ("幸子", "さちこ", "SACHIKO"), ("和子", "かずこ", "KAZUKO"),
        ("恵子", "けいこ", "KEIKO"), ("美咲", "みさき", "MISAKI"), ("陽子", "ようこ", "YOKO"),
        ("千代", "ちよ", "CHIYO"), ("節子", "せつこ", "SETSUKO"), ("由美", "ゆみ", "YUMI"),
        ("真理", "まり", "MARI"), ("彩", "あや", "AYA"), ("直子", "なおこ", "NAOKO"),
        ("文子", "ふみこ", "FUMIKO"), ("京子", "きょうこ", "KYOKO"),
    ),
}  # fmt: skip

# Half-width katakana by what they are compatible with; a voiced one is two signs.
_HALF = {unicodedata.normalize("NFKC", chr(code)): chr(code) for code in range(0xFF66, 0xFFA0)}
_TO_KATAKANA = 0x60


@dataclass(frozen=True, slots=True)
class Name:
    """A person's name in three scripts.

    Attributes
    ----------
    kanji, kana, romaji : tuple of str
        (family, given).
    """

    kanji: tuple[str, str]
    kana: tuple[str, str]
    romaji: tuple[str, str]

    @property
    def half_width(self) -> tuple[str, str]:
        """In half-width katakana, as older systems write it (JIS X 0201)."""
        return _half_width(self.kana[0]), _half_width(self.kana[1])

    def dicom(self, *, half_width: bool = False) -> str:
        """As DICOM's three groups: alphabetic (or half-width katakana), kanji, kana."""
        first = self.half_width if half_width else self.romaji
        return "=".join("^".join(group) for group in (first, self.kanji, self.kana))


def _half_width(kana: str) -> str:
    wide = "".join(chr(ord(sign) + _TO_KATAKANA) for sign in kana)
    return "".join(_HALF[sign] for sign in unicodedata.normalize("NFD", wide))


@dataclass(frozen=True, slots=True)
class Person:
    """A fictional patient.

    Attributes
    ----------
    number : int
        Of the person in a run; the same for all studies of one person.
    name : Name
    sex : str
        ``M`` or ``F``.
    birth : date
    height_cm, weight_kg : float
    """

    number: int
    name: Name
    sex: str
    birth: dt.date
    height_cm: float
    weight_kg: float

    def age_on(self, day: dt.date) -> int:
        """Return the age in whole years."""
        before = (day.month, day.day) < (self.birth.month, self.birth.day)
        return day.year - self.birth.year - before


@dataclass(frozen=True, slots=True)
class Hospital:
    """A fictional hospital.

    Attributes
    ----------
    name, address : str
    code : str
        First letters of stations' names and accession numbers.
    charset : tuple of str
        Specific Character Set that its systems write.
    id_format : str
        How a number becomes a Patient ID there.
    """

    name: str
    address: str
    code: str
    charset: tuple[str, ...]
    id_format: str

    @property
    def half_width(self) -> bool:
        """Whether the first group of names is in half-width katakana."""
        return self.charset[0] == "ISO 2022 IR 13"


_JIS = ("", "ISO 2022 IR 87")
_KATAKANA = ("ISO 2022 IR 13", "ISO 2022 IR 87")
_UTF8 = ("ISO_IR 192",)

HOSPITALS: Mapping[str, Hospital] = {
    "F01": Hospital("架橋大学附属病院", "愛知県星見市架橋町1-1", "KKH", _JIS, "{:08d}"),
    "F02": Hospital("浮島大学病院", "東京都浮島区浮島2-7", "UKJ", _UTF8, "{:07d}"),
    "F03": Hospital("星見市立総合病院", "愛知県星見市中央3-12", "HSM", _JIS, "HM{:06d}"),
    "F04": Hospital("霧浜医療センター", "福岡県霧浜市東浜4-5", "KRH", _KATAKANA, "{:010d}"),
    "F05": Hospital("月岬大学病院", "大阪府月岬市岬台5-9", "TKM", _UTF8, "{:08d}-1"),
    "F06": Hospital("風見総合病院", "岡山県風見市本町6-3", "KZM", _JIS, "{:06d}"),
    "F07": Hospital("水無原医科大学病院", "京都府水無原市学園7-8", "MNH", _UTF8, "M{:07d}"),
    "F08": Hospital("雲雀坂病院", "神奈川県雲雀坂市坂上8-2", "HBZ", _KATAKANA, "{:07d}"),
    "F09": Hospital("花霞大学医学部附属病院", "北海道花霞市北9-14", "HNK", _JIS, "{:09d}"),
    "F10": Hospital("虹原がんセンター", "宮城県虹原市青葉10-1", "NJH", _JIS, "{:07d}"),
}
"""The ten facilities. None of these exists."""


def _name(rng: Random, sex: str) -> Name:
    kanji, kana, romaji = zip(rng.choice(_FAMILY), rng.choice(_GIVEN[sex]), strict=True)
    return Name(kanji, kana, romaji)


def physician(rng: Random) -> Name:
    """Draw a physician."""
    return _name(rng, rng.choice("MF"))


def person(rng: Random, number: int, today: dt.date) -> Person:
    """Draw a person who is of a patient's age on a day: mostly old, seldom a child."""
    sex = rng.choices("MF", (54, 46))[0]
    years = rng.uniform(1, 15) if rng.random() < 0.02 else rng.triangular(18, 97, 74)
    birth = today - dt.timedelta(days=int(years * 365.25))
    grown = min(1.0, 0.42 + years / 17 * 0.58)
    height = rng.gauss(170 if sex == "M" else 157, 6) * grown
    weight = max(15.0, rng.gauss(23, 3.2)) * (height / 100) ** 2 * (0.75 + 0.25 * grown)
    return Person(number, _name(rng, sex), sex, birth, round(height, 1), round(weight, 1))
