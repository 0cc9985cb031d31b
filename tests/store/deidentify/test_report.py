"""Free text of reports: persons, places, numbers and days go, medicine stays."""

# ruff: noqa: RUF001 - Japanese letters and signs are meant

from __future__ import annotations

import datetime as dt
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kakehashi.store.deidentify import Names
from kakehashi.store.deidentify.report import clean_report

DAYS = -700
NAMES = Names(
    frozenset({"Yamada^Taro=山田^太郎=やまだ^たろう"}),
    frozenset({"東京第一病院"}),
    frozenset({"0076543210"}),
)


def clean(text: str, names: Names = NAMES) -> str:
    return clean_report(text, names, DAYS)


@pytest.mark.parametrize(
    ("text", "moved"),
    [
        ("2024年5月1日のCT", "2022年6月1日のCT"),
        ("2024年 5月 1日", "2022年 6月 1日"),
        ("2024年05月01日", "2022年06月01日"),
        ("２０２４年５月１日", "２０２２年６月１日"),
        ("令和6年5月1日", "令和4年6月1日"),
        ("令和2年4月3日", "平成30年5月4日"),
        ("令和３年４月", "令和元年５月"),
        ("R6.5.1", "R4.6.1"),
        ("R6/5/1", "R4/6/1"),
        ("H31.4.30", "H29.5.30"),
        ("平成元年3月1日", "昭和62年4月1日"),
        ("2024/05/01", "2022/06/01"),
        ("2024-5-1", "2022-6-1"),
        ("2024.05.01", "2022.06.01"),
        ("20240501", "20220601"),
        ("2024年5月に", "2022年6月に"),
        ("2024/05 と", "2022/06 と"),
        ("2019年に手術", "2017年に手術"),
        ("May 1, 2024", "June 1, 2022"),
        ("1 March 2024", "1 April 2022"),
        ("01-Mar-2024", "01-Apr-2022"),
        ("January 2024", "February 2022"),
        ("5/1/2024", "6/1/2022"),
    ],
)
def test_days_are_moved_and_keep_their_notation(text, moved):
    assert clean(text) == moved


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("2024年13月40日", "[日付]"),
        ("5月1日の検査", "[日付]の検査"),
        ("24年5月1日", "[日付]"),
        ("24/5/1", "[日付]"),
        ("12/3のCTと比較", "[日付]のCTと比較"),
        ("CT of May 1st", "CT of [日付]"),
        ("2024/02/30", "[日付]"),
    ],
)
def test_days_that_cannot_be_moved_go(text, left):
    assert clean(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "肝S6/8に径12x10mmの結節。3年前より増大。5年生存率。",
        "T2/FLAIR、1/2に縮小、3/10、L4/5、0.5-1.2 mm、120/80",
        "5 years ago, 2024 HU, Seg. 3/4, slice 120-130",
        "右肺下葉に結節影を認めます。縦隔リンパ節腫大なし。",
        "林間に森がある。かかりつけ医師。患者様は他院にて術後。当院、近医より紹介。",
        "No focal lesion in the liver. The right kidney is normal.",
        "造影剤イオメロン350 100mlを3ml/secで注入。",
        "担当医師、主治医、専門医師、お子様、皆様",
        "GFR 63.5、CEA 12.3、HbA1c 6.5%",
        "38歳男性、1.5Tにて撮像。",
        "第3病日。",
    ],
)
def test_medicine_stays(text):
    assert clean(text) == text


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("山田太郎様", "[氏名][氏名]様"),
        ("Dr. John Smith reviewed", "Dr. [氏名] reviewed"),
        ("read by Jane Doe, MD.", "read by [氏名], MD."),
        ("主治医：鈴木一郎、内科", "主治医：[氏名]、内科"),
        ("放射線科 佐藤先生御侍史", "放射線科 [氏名]先生御侍史"),
        ("整形外科高橋医師より", "整形外科[氏名]医師より"),
        ("スミス先生", "[氏名]先生"),
        ("Suzuki先生", "[氏名]先生"),
        ("読影医:T. Sato\n所見", "読影医:[氏名]\n所見"),
        ("Reported by: Ann Lee; ok", "Reported by: [氏名]; ok"),
        ("患者ID：12345678。", "患者ID：[ID]。"),
        ("ID AB-12345 です", "ID [ID] です"),
        ("MRN: 998877", "MRN: [ID]"),
        ("Accession No. A2024-55", "Accession No. [ID]"),
        ("76543210", "[ID]"),
        ("受付1234567890", "受付[番号]"),
        ("1.2.840.113619.2.55.3.4", "[ID]"),
        ("TEL 03-1234-5678", "TEL [電話]"),
        ("(090)1234-5678まで", "[電話]まで"),
        ("内線 4321", "[電話]"),
        ("〒100-0001", "[郵便番号]"),
        ("a.b@example.co.jp まで", "[メール] まで"),
        ("https://pacs.example/x?id=1 参照", "[URL] 参照"),
        ("東京都千代田区千代田1-1-1在住", "[住所]在住"),
        ("横浜市中区本町2丁目3番地4号の", "[住所]の"),
        ("東京第一病院にて", "[施設]にて"),
        ("名古屋記念病院より紹介", "[施設]より紹介"),
        ("以前は鶴見クリニックで", "以前は[施設]で"),
        ("at Nagoya Memorial Hospital today", "at [施設] today"),
        ("University of Tokyo Hospital", "[施設]"),
        ("93歳女性", "90歳女性"),
        ("a 101-year-old man", "a 90-year-old man"),
    ],
)
def test_persons_places_and_numbers_go(text, left):
    assert clean(text) == left


def test_a_report_as_it_comes():
    text = (
        "患者氏名：山田　太郎　殿　ID: 00-7654-3210\n"
        "検査日：2024年5月1日　依頼医：循環器内科 鈴木花子\n"
        "【所見】前回（令和5年12月3日、東京第一病院）と比較しました。\n"
        "右肺S6の結節は12mmから15mmに増大しています。ヤマダ氏には説明済み。\n"
        "読影医：放射線科　高橋次郎（内線2345）"
    )
    cleaned = clean(text)
    for word in [
        "山田",
        "太郎",
        "ヤマダ",
        "7654",
        "2024",
        "5月1日",
        "鈴木",
        "花子",
        "令和5年",
        "東京",
        "高橋",
        "次郎",
        "2345",
    ]:
        assert word not in cleaned, word
    for word in ("右肺S6の結節は12mmから15mmに増大しています。", "2022年6月1日", "【所見】"):
        assert word in cleaned


def test_the_same_shift_as_in_objects(deidentifier):
    days = deidentifier.shift_days("F01", "42")
    cleaned = deidentifier.report("2024-05-01", facility="F01", patient_id="42", names=None)
    assert dt.date.fromisoformat(cleaned) - dt.date(2024, 5, 1) == dt.timedelta(days)
    cleaned = deidentifier.report("No. 424242", facility="F01", patient_id="424242", names=None)
    assert cleaned == "No. [ID]"


@given(st.dates(dt.date(1935, 1, 1), dt.date(2030, 12, 31)), st.integers(52, 520))
def test_intervals_between_days_stay(day, weeks):
    for form in ("%Y年%m月%d日", "%Y/%m/%d", "%Y-%m-%d", "%Y%m%d", "%d %B %Y"):
        moved = clean_report(f"{day:{form}} ", Names(), -7 * weeks).strip()
        assert dt.datetime.strptime(moved, form).date() == day - dt.timedelta(weeks=weeks)  # noqa: DTZ007 - a day


@given(st.text(alphabet="0123年月日/.-RH令和 ID:山田先生様市区県病院A\n", max_size=80))
def test_no_text_is_too_odd(text):
    cleaned = clean(text)
    assert not re.search("山田(様|先生)", cleaned)


def test_long_texts_do_not_hang():
    for piece in (
        "市",
        "山田",
        "1-",
        "a.",
        "東京都",
        "a@",
        "先生",
        "A ",
        "病院",
        "の",
        "令和",
        "1",
        "a-",
        "Ab ",
    ):
        assert clean(piece * (20000 // len(piece))) is not None


@pytest.mark.parametrize("text", ["MR Angiography of the head", "MS Plaques", "MR 7700"])
def test_magnetic_resonance_is_no_title(text):
    assert clean_report(text, Names(), -7) == text
    # The control.
    assert clean_report("Mr Angio, mr Angio, MR. Angio", Names(), -7).count("[氏名]") == 3
