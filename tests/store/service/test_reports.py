"""Words are found in reports in Japanese and English, the same on both databases."""

# ruff: noqa: RUF001 - full-width letters are what is tested

from __future__ import annotations

import random

import pytest

from kakehashi.errors import StoreError
from kakehashi.store.service import records
from kakehashi.store.service.reports import (
    LONGEST_REPORT,
    Reports,
    normalised,
    snippet,
    words_of,
)

TEXTS = {
    "1.1": "右肺上葉に径12mmの結節を認める。悪性の可能性は否定できない。",
    "1.2": "Ｃｈｅｓｔ ＣＴ: No nodule. 胸水なし。",
    "1.3": "ｶﾙｼｳﾑ沈着あり。100%_の確率ではない。",
    "1.4": "Normal study. Straße",
}


@pytest.fixture
def reports(database):
    records.folder(database.need_store().root).mkdir()
    opened = Reports.open(database.need_store())
    for study, text in TEXTS.items():
        assert opened.add(study, "F01", text, patient_id=f"p{study}")
    yield opened
    opened.close()


def found(reports: Reports, text: str, *facilities: str) -> list[str]:
    pieces = reports.search(words_of(text), facilities or ("F01",))
    return sorted(report.study_uid for piece in pieces for report in piece)


@pytest.mark.parametrize(
    ("text", "studies"),
    [
        ("結節", ["1.1"]),
        ("肺上葉に", ["1.1"]),
        ("結", ["1.1"]),
        ("胸水", ["1.2"]),
        ("NODULE", ["1.2"]),
        ("nodule chest", ["1.2"]),
        ("chest 結節", []),
        ("ct", ["1.2"]),
        ("ＣＴ", ["1.2"]),
        ("カルシウム", ["1.3"]),
        ("ｶﾙｼｳﾑ", ["1.3"]),
        ("100%_", ["1.3"]),
        ("%", ["1.3"]),
        ("_", ["1.3"]),
        ("strasse", ["1.4"]),
        ("STRASSE", ["1.4"]),
        ('"', []),
        ('no" OR "normal', []),
        ("nodule*", []),
        ("12mm", ["1.1"]),
        ("可能性", ["1.1"]),
        ("", []),
        ("   ", []),
    ],
)
def test_words(reports, text, studies):
    assert found(reports, text) == studies


def test_any_piece_of_any_text_is_found_as_a_plain_search_finds_it(reports):
    draw = random.Random(3)
    for _ in range(200):
        text = draw.choice(list(TEXTS.values()))
        start = draw.randrange(len(text))
        piece = text[start : start + draw.randint(1, 8)]
        words = words_of(piece)
        expect = sorted(
            study
            for study, other in TEXTS.items()
            if words and all(word in normalised(other).casefold() for word in words)
        )
        assert found(reports, piece) == expect, piece


def test_only_the_facilities_asked_for(reports):
    reports.add("1.5", "F02", "結節", patient_id="p")
    assert found(reports, "結節", "F02") == ["1.5"]
    assert found(reports, "結節", "F01", "F02") == ["1.1", "1.5"]
    assert list(reports.search(["結節"], ())) == []


def test_the_same_text_of_a_study_is_kept_once(reports):
    assert not reports.add("1.1", "F01", TEXTS["1.1"], patient_id="p1.1")
    assert reports.add("1.1", "F01", "追加所見", patient_id="p1.1")
    assert [report.text for report in reports.of_study("1.1")] == [TEXTS["1.1"], "追加所見"]
    assert reports.of_study("9") == []


def test_a_report_without_end_is_refused(reports):
    with pytest.raises(StoreError, match="at most"):
        reports.add("1.6", "F01", "x" * (LONGEST_REPORT + 1), patient_id="p")


def test_what_is_withdrawn_is_not_found_and_not_in_the_file(reports, database):
    for number in range(50):
        reports.add(f"2.{number}", "F01", f"ほかの所見 {number} abc{number}", patient_id="q")
    reports.add("3.1", "F01", "秘密の漏洩語 secretword", patient_id="gone")
    reports.add("3.2", "F01", "漏洩語の二つ目", patient_id="gone")
    reports.add("3.3", "F01", "漏洩語の三つ目", patient_id="")
    path = records.folder(database.need_store().root) / "reports.sqlite"
    planted = ["漏洩語", "secretword"]
    if database.need_store().database is None:
        assert all(word.encode() in path.read_bytes() for word in planted)
    assert reports.withdraw(["3.1", "3.3"], "gone") == 3
    assert found(reports, "漏洩語") == []
    assert reports.of_study("3.2") == []
    assert len(found(reports, "ほかの所見")) == 50
    assert reports.withdraw(["3.1"], "gone") == 0
    if database.need_store().database is None:
        left = path.read_bytes()
        assert not any(word.encode() in left for word in planted)
        assert not any(piece.encode() in left for piece in ("漏洩", "ecretwo", "secret"))


def test_nobody_named_is_no_reason_to_remove_those_without_a_name(reports):
    reports.add("4.1", "F01", "所見", patient_id="")
    assert reports.withdraw([], "") == 0
    assert len(reports.of_study("4.1")) == 1


def test_a_search_that_nobody_waits_for_ends(reports):
    assert list(reports.search(["結"], ["F01"], ended=lambda: True)) == []
    # And what comes after it on the same connection is not ended, too.
    assert found(reports, "結") == ["1.1"]


def test_a_snippet_shows_where_the_words_are():
    text = "a" * 100 + "\n結節 Straße\t" + "b" * 100
    shown, marks = snippet(text, words_of("STRASSE 結節"))
    assert [shown[begin:end] for begin, end in marks] == ["結節", "Straße"]
    assert shown.startswith("…")
    assert shown.endswith("…")
    assert "\n" not in shown
    assert snippet("", ["x"]) == ("", [])
    assert snippet("結節", ["結節"]) == ("結節", [(0, 2)])
    assert snippet("aaa", ["aa"]) == ("aaa", [(0, 2)])
