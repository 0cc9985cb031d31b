"""De-identifies the free text of a radiology report (所見), in Japanese or English."""

# ruff: noqa: RUF001 - Japanese letters and signs are meant

from __future__ import annotations

import datetime as dt
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from kakehashi.store.deidentify.actions import words_of
from kakehashi.store.deidentify.dates import shifted_day
from kakehashi.store.deidentify.names import Names
from kakehashi.store.deidentify.phonetic import Folded, fold

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME, DAY, PHONE, POST, MAIL, URL, ID, NUMBER, ADDRESS, PLACE = (
    "[氏名]",
    "[日付]",
    "[電話]",
    "[郵便番号]",
    "[メール]",
    "[URL]",
    "[ID]",
    "[番号]",
    "[住所]",
    "[施設]",
)
OLDEST = "90"
_MARKS = {"name": NAME, "place": PLACE, "id": ID}

# All patterns are for folded text: small letters, hiragana for katakana, NFKC.

_MONTHS = {
    name: number
    for number, names in enumerate(
        (
            "january jan",
            "february feb",
            "march mar",
            "april apr",
            "may",
            "june jun",
            "july jul",
            "august aug",
            "september sep sept",
            "october oct",
            "november nov",
            "december dec",
        ),
        start=1,
    )
    for name in names.split()
}
_MONTH = "|".join(sorted(_MONTHS, key=len, reverse=True))
_ERAS = {"令和": 2018, "平成": 1988, "昭和": 1925, "大正": 1911, "明治": 1867}
_ERAS |= {"r": 2018, "h": 1988, "s": 1925, "t": 1911, "m": 1867}
_ERA_STARTS = ((2019, 5, 1), (1989, 1, 8), (1926, 12, 25), (1912, 7, 30), (1868, 1, 25))
_S = r"[\s　]*"
_ERA = "令和|平成|昭和|大正|明治"
_YEAR = r"(?:19|20)\d\d"
_DATES = re.compile(
    # 2024年5月1日, 2024年5月, 2024年, and with an era; not a length of time
    rf"(?P<era>{_ERA})?{_S}(?P<y>元|(?<!\d)\d{{1,4}}){_S}年"
    r"(?!前|後|間|以|来|目|ぶり|生存|代|齢)"
    rf"(?:度|{_S}(?P<m>\d{{1,2}}){_S}月(?:{_S}(?P<d>\d{{1,2}}){_S}日)?)?"
    # 2024-05-01, 2024/5, 20240501
    rf"|(?<![\d.])(?P<y2>{_YEAR})(?P<sep>[-/.])(?P<m2>\d{{1,2}})"
    r"(?:(?P=sep)(?P<d2>\d{1,2}))?(?![\d.]*\d)"
    rf"|(?<![\d.])(?P<y3>{_YEAR})(?P<m3>0\d|1[0-2])(?P<d3>[0-3]\d)(?!\d)"
    # R6.5.1, 令和6.5.1
    rf"|(?<![a-z\d])(?P<era4>[rhstm]|{_ERA})(?P<y4>\d{{1,2}})"
    r"(?P<sep4>[-/.])(?P<m4>\d{1,2})(?P=sep4)(?P<d4>\d{1,2})(?!\d)"
    # May 1, 2024; May 2024; 1 May 2024; 01-May-2024
    rf"|\b(?P<m5>{_MONTH})\b\.?\s*"
    rf"(?:(?P<d5>\d{{1,2}})(?:st|nd|rd|th)?(?:\s*,\s*|\s+))?(?P<y5>{_YEAR})\b"
    rf"|\b(?P<d6>\d{{1,2}})(?:st|nd|rd|th)?[\s-]+(?P<m6>{_MONTH})\b\.?,?[\s-]+(?P<y6>{_YEAR})\b"
    # 5/1/2024
    rf"|(?<![\d/])(?P<m7>\d{{1,2}})(?P<sep7>[-/])(?P<d7>\d{{1,2}})(?P=sep7)(?P<y7>{_YEAR})(?!\d)"
)
# Days of which the year is not said, or not said in full, cannot be moved.
_BARE_DAYS = re.compile(
    rf"(?<!\d)\d{{1,2}}{_S}月{_S}\d{{1,2}}{_S}日"
    r"|(?<![\d/.-])\d{2}([/-])\d{1,2}\1\d{1,2}(?![\d/-])"
    r"|(?<![\d/.])(?:1[0-2]|0?[1-9])/(?:3[01]|[12]\d|0?[1-9])(?![\d/])(?=\s?(?:の?(?:ct|mri?|pet|"
    r"us|撮影|撮像|検査|画像|"
    r"単純|造影|胸部|腹部|頭部|前回)|施行|付|入院|退院|手術|受診|来院|と比較|より|から|以降|頃|"
    r"時点))"
    rf"|\b(?:{_MONTH})\.?\s+\d{{1,2}}(?:st|nd|rd|th)?\b(?!\s*(?:mm|cm|%))"
)
_OLD = re.compile(r"(?<!\d)(?:9\d|1[0-4]\d)(?=[\s　]*(?:歳|才|さい|-?\s?(?:year|yr|y/?o\b|yo\b)))")

_LABEL_ID = re.compile(
    r"(?:(?:患者|受診者)?[\s　]?(?<![a-z])id(?![a-z])|患者番号|患者no\.?|かるて番号|かるてno\.?|"
    r"診察券番号|診察券no\.?|受付番号|"
    r"検査番号|検査id|おーだー?番号|依頼番号|登録番号|症例番号|保険者?番号|記号番号|\bmrn\b|"
    r"\baccession(?:\s(?:no|number))?\b|"
    r"\bpatient\s(?:no|number)\b|\bchart\s(?:no|number)\b|\bstudy\s(?:no|number|id)\b)"
    r"[\s　]*(?:no)?[.:：=#＃]*[\s　]*(?P<value>[0-9a-z][0-9a-z_/-]*\d[0-9a-z_/-]*|\d{2,})"
)
_PREFECTURES = (
    "北海道|東京都|京都府|大阪府|青森県|岩手県|宮城県|秋田県|山形県|福島県|茨城県|栃木県|群馬県|"
    "埼玉県|千葉県|神奈川県|新潟県|富山県|石川県|"
    "福井県|山梨県|長野県|岐阜県|静岡県|愛知県|三重県|滋賀県|兵庫県|奈良県|和歌山県|鳥取県|"
    "島根県|岡山県|広島県|山口県|徳島県|香川県|愛媛県|"
    "高知県|福岡県|佐賀県|長崎県|熊本県|大分県|宮崎県|鹿児島県|沖縄県"
)
_BLOCK = (
    r"(?:[\s　0-9一二三四五六七八九十]{0,6}(?:丁目|番地|番|号室?)"
    r"|[\s　]?\d{1,5}(?:[-‐の]\d{1,5}){1,4}(?:号室?)?)"
)
_J = r"[\u3041-\u3096\u4e00-\u9fff々ヶー]"
# Atomic, so that a long text does not lead to many ways of dividing it.
_TOWN = rf"(?>{_J}{{1,8}}?[市区郡町村])"
_ADDRESSES = re.compile(
    rf"(?:{_PREFECTURES}){_S}{_TOWN}{{0,3}}(?:{_J}{{0,10}}?{_BLOCK}{{1,4}})?"
    rf"|{_TOWN}{{1,3}}{_J}{{0,10}}?{_BLOCK}{{1,4}}"
)

_K = r"[\u3400-\u9fff々〆]"
_PERSON_TITLE = (
    r"(?:先生|医師|医員|様|さん|氏|殿|教授|准教授|講師|助教|研修医|技師|看護師|"
    r"どくたー|[,、]?[ 　]?(?:dr|m\.?d)\b\.?)"
)
_PERSONS = re.compile(
    rf"(?P<kanji>{_K}{{1,12}}(?:[ 　]{_K}{{1,4}})?)[ 　]?{_PERSON_TITLE}"
    r"|"
    r"(?P<kana>(?<![\u3041-\u3096])[\u3041-\u3096ー]{2,12}(?:[ 　・][\u3041-\u3096ー]{2,8})?)[ 　]?"
    r"(?:先生|医師|様|氏|技師)"
    r"|(?P<roman>\b[a-z][a-z'’-]{1,24}(?:[ ,]{1,2}[a-z][a-z'’.-]{0,24})?)[ 　]?"
    r"(?:先生|医師|様|さん|氏|技師)"
)
_ENGLISH_PERSONS = re.compile(
    # MR and MS in capitals are what is examined, and a disease.
    r"\b(?:(?i:dr|mrs|miss|prof|professor|doctor)|[Mm][rs]|M[RS](?=\.))\b\.?[ \t]{1,2}"
    r"(?P<name>[A-Z][\w'’-]*\.?(?:[ \t][A-Z][\w'’-]*\.?){0,3})"
    r"|(?P<name2>\b[A-Z][\w'’-]+(?:[ \t][A-Z][\w'’.-]*){0,3}),?[ \t]+"
    r"(?=M\.?D\b|Ph\.?D\b|D\.?O\b|R\.?T\b|FRCR\b|MBBS\b)"
)
_LABEL_PERSON = re.compile(
    r"(?:患者氏名|患者名|氏名|名前|ふりがな|依頼医師?|依頼者|主治医|担当医師?|担当者|読影医師?|"
    r"読影者|一次読影|二次読影|報告医|報告者|記載者|"
    r"記載医|撮影者|撮影技師|検像者?|確認医|確認者|紹介医師?|指導医|承認者|承認医|署名|術者|執刀医"
    r"|\b(?:patient(?:'s)?\sname|name|(?:report|dictat|read|sign|interpret|verifi|approv|"
    r"transcrib)(?:ed|d)?\sby|"
    r"electronically\ssigned\sby|referring\s(?:physician|doctor)|radiologist|physician|"
    r"technologist|attending)\b)"
    r"[\s　]*[:：=][ \t　]*(?P<value>[^\n\r、。,;；|/（(\[]{1,40})"
)
# Words before a title that are no name: they are taken off, and what is left is the name.
_ROLES = (
    "放射線診断専門医|放射線診断科|放射線治療科|放射線科|消化器内科|消化器外科|呼吸器内科|"
    "呼吸器外科|循環器内科|脳神経外科|脳神経内科|整形外科|"
    "泌尿器科|産婦人科|耳鼻咽喉科|腎臓内科|血液内科|心臓血管外科|形成外科|小児科|皮膚科|眼科|"
    "救急科|内科|外科|麻酔科|歯科|紹介元|"
    "主治医|担当医|依頼医|読影医|紹介医|指導医|執刀医|当直医|専門医|診断専門|担当|主治|依頼|読影|"
    "紹介|指導|執刀|当直|専門|常勤|非常勤|"
    "放射線|診療放射線|臨床検査|検査|診断|病理|救急|研修|教育|部長|医長|院長|副院長|科長|患者|"
    "被検者|受診者|御家族|家族|奥|皆|各|同|前|他院|"
    "当院|他科|主任|看護|女|男性|女性|高齢|認定|産業|校|開業|医"
)
_ROLE_START = re.compile(rf"(?:{_ROLES})")
_NO_NAMES = words_of("子 この その あの どの かかりつけ おなじ ほかの または および なお")
_PLACES = re.compile(
    r"[\u3041-\u3096\u3400-\u9fff々ーa-z0-9・]{1,24}?"
    r"(?:総合病院|中央病院|大学(?:医学部)?(?:附属|付属)?病院|病院|医院|くりにっく|診療所|"
    r"医療せんたー|がんせんたー|めでぃかるせんたー|"
    r"医科大学|大学|保健所|健診せんたー|療養所|老健|介護施設)"
)
_COMMON_PLACES = re.compile(
    r"(?:当|他|前|同|本|紹介元|某|近|貴|かかりつけ|以前の|別の|専門|総合|大学|地域の?|の|は|が|"
    r"を|に|で|へ|と|も|や|から|より|にて)*"
    r"(?:総合病院|大学病院|病院|医院|くりにっく|診療所|大学)"
)
_ENGLISH_PLACES = re.compile(
    r"\b(?:[A-Z][\w.'’-]*[ \t]+(?:(?:of|and|the|for)[ \t]+)?){1,6}"
    r"(?:Hospital|Clinic|Medical[ \t]Cent(?:er|re)|Infirmary|University|Health[ \t](?:Center|"
    r"System))"
    r"(?:[ \t]of(?:[ \t][A-Z][\w.'’-]*){1,3})?"
    r"|\bUniversity[ \t]of(?:[ \t][A-Z][\w.'’-]*){1,3}(?:[ \t](?:Hospital|Clinic))?"
)
_PLAIN = (
    (re.compile(r"[a-z0-9_.+-]{1,64}@[a-z0-9-]{1,63}(?:\.[a-z0-9-]{1,63}){1,8}"), MAIL),
    (re.compile(r"(?:https?|ftp)://[^\s　、。）)」]+|\bwww\.[^\s　、。）)」]+"), URL),
    (re.compile(r"(?<![\d.])\d+(?:\.\d+){5,}(?![\d.])"), ID),
    (re.compile(r"〒[\s　]*\d{3}[-‐ー−]?\d{4}|(?<![\d.-])\d{3}-\d{4}(?![\d-])"), POST),
    (
        re.compile(
            r"(?<![\d.])(?:\+81[\s-]?\(?0?\)?|"
            r"\(?0)\d{1,4}\)?[\s‐ー−-]?\(?\d{1,4}\)?[\s‐ー−-]\d{3,4}(?!\d)"
            r"|(?<![\d.])0[1-9]\d{8,9}(?!\d)|(?:内線|phs|ぴっち|\bext\.?)[\s　:：]*\d{3,6}"
        ),
        PHONE,
    ),
    (re.compile(r"(?<![\d.])\d{7,}(?![\d.])"), NUMBER),
)


@dataclass(frozen=True, slots=True)
class _Span:
    start: int
    end: int
    text: str


def clean_report(text: str, names: Names, days: int) -> str:
    """Return a text in which persons, places, numbers and days are replaced.

    Taken away is what `names` holds, in all ways of writing, and what the text itself shows
    to be a person (by a title or a label), an institution, an address, a phone number, a
    mail address, an id or a long number. Days are moved by the person's number of days and
    stay in their notation, also in Japanese eras; a month or year alone is moved as its
    middle; a day without a year becomes a marker. An age over 89 becomes 90.

    A name that stands alone, without title or label, and that no DICOM object of the study
    holds, is not found: reports stay at access tier 2.

    Parameters
    ----------
    text : str
    names : Names
        Of the report's person and of all objects of the study.
    days : int
        By which the person's dates are moved.
    """
    return _replaced(text, _chosen(text, names, days))


@lru_cache(maxsize=65536)
def without_identity(text: str) -> str:
    """Return a text with a line break in place of what shows a person, place or day by its form.

    That is what :func:`clean_report` would replace without knowing any name, but for ages, and
    numbers without a label: devices have such.
    """
    found = _chosen(text, Names(), 0)
    kept = (NUMBER, OLDEST)
    return _replaced(text, [_Span(o.start, o.end, "\n") for o in found if o.text not in kept])


def shows_identity(text: str) -> bool:
    """Say whether a text has a day, phone number, address, title or label of a person in it."""
    return without_identity(text) != text


def _chosen(text: str, names: Names, days: int) -> list[_Span]:
    """Return what is to be replaced, in order."""
    spans: list[_Span] = []
    taken = bytearray(len(text))
    for span in _all(fold(text), names, days):
        # First come, first served: what is sure is looked for first.
        if not any(taken[span.start : span.end]):
            taken[span.start : span.end] = b"\1" * (span.end - span.start)
            spans.append(span)
    return sorted(spans, key=lambda one: one.start)


def _replaced(text: str, spans: list[_Span]) -> str:
    out, place = [], 0
    for span in spans:
        out += [text[place : span.start], span.text]
        place = span.end
    return "".join([*out, text[place:]])


def _all(folded: Folded, names: Names, days: int) -> Iterator[_Span]:
    def spans(pattern: re.Pattern[str], to: str, group: str | int = 0) -> Iterator[_Span]:
        for match in pattern.finditer(folded.text):
            if match[group]:
                yield _Span(*folded.span(*match.span(group)), to)

    for pattern, mark in _PLAIN[:3]:
        yield from spans(pattern, mark)
    for hit in names.matcher.find_in(folded):
        yield _Span(hit.start, hit.end, _MARKS[hit.kind])
    yield from spans(_LABEL_ID, ID, "value")
    yield from _dates(folded, days)
    yield from spans(_BARE_DAYS, DAY)
    for pattern, mark in _PLAIN[3:]:
        yield from spans(pattern, mark)
    yield from spans(_ADDRESSES, ADDRESS)
    yield from _labelled(folded)
    yield from _institutions(folded)
    yield from _persons(folded)
    yield from spans(_OLD, OLDEST)


# ---- days -----------------------------------------------------------------------------


def _dates(folded: Folded, days: int) -> Iterator[_Span]:
    for match in _DATES.finditer(folded.text):
        start, end = match.span()
        lead = len(match[0]) - len(match[0].lstrip())
        moved = _moved(match, days)
        first, last = folded.span(start + lead, end)
        if moved is None:
            continue
        wide = any("０" <= letter <= "９" for letter in folded.source[first:last])
        yield _Span(first, last, moved.translate(_WIDE) if wide else moved)


_WIDE = {ord("0") + digit: ord("０") + digit for digit in range(10)}


def _moved(match: re.Match[str], days: int) -> str | None:
    """Return a date of the text, moved, in its own notation; None if it is no date at all."""
    groups = match.groupdict()
    kind = next(k for k in ("y", "y2", "y3", "y4", "y5", "y6", "y7") if groups.get(k))
    suffix = kind[1:]
    era = groups.get(f"era{suffix}") or ""
    year_text, month_text, day_text = (groups.get(f"{k}{suffix}") for k in "ymd")
    if kind == "y" and not era and len(year_text or "") != 4:
        # 24年5月1日 may be of any era; 3年 is a length of time.
        return DAY if month_text else None
    year = 1 if year_text == "元" else int(year_text or 0)
    year += _ERAS.get(era, 0)
    month = _MONTHS.get(month_text or "") or int(month_text or 0)
    moved = _day(year, month, int(day_text) if day_text else 0, days)
    if moved is None:
        return DAY
    return _written(match, moved, era)


def _day(year: int, month: int, day: int, days: int) -> dt.date | None:
    try:
        return shifted_day(dt.date(year, month or 7, day or (15 if month else 1)), days)
    except ValueError:
        return None


def _written(match: re.Match[str], moved: dt.date, era: str) -> str:
    text = match[0].lstrip()
    year = _year_in_era(moved, era) if era else (str(moved.year), "")
    if year is None:
        return DAY
    groups = match.groupdict()
    values = {"y": year[0], "m": str(moved.month), "d": str(moved.day), "era": year[1]}
    offset = match.end() - len(text)
    parts = sorted(
        (match.span(name), name.rstrip("234567"), value)
        for name, value in groups.items()
        if value is not None and name.rstrip("234567") in values
    )
    out, place = [], 0
    for (start, end), name, old in parts:
        out.append(text[place : start - offset])
        out.append(_as_was(values[name], old, name))
        place = end - offset
    return _capital("".join([*out, text[place:]]))


def _as_was(new: str, old: str, name: str) -> str:
    if name == "m" and old in _MONTHS:
        return _month_name(int(new), short=len(old) <= 4 and old not in {"may", "june", "july"})
    # 05 stays two digits, and so does 12 if it becomes 3.
    return new.zfill(2) if len(old) == 2 and name != "y" else new


def _month_name(number: int, *, short: bool) -> str:
    name = next(name for name, value in _MONTHS.items() if value == number)
    return name[:3] if short else name


def _capital(text: str) -> str:
    """Months begin with a capital again, eras of one letter too."""
    text = re.sub(r"^[rhstm](?=\d)", lambda found: found[0].upper(), text)
    return re.sub(rf"\b(?:{_MONTH})\b", lambda found: found[0].capitalize(), text)


def _year_in_era(day: dt.date, era: str) -> tuple[str, str] | None:
    short = len(era) == 1
    names = "rhstm" if short else ("令和", "平成", "昭和", "大正", "明治")
    for name, start in zip(names, _ERA_STARTS, strict=True):
        if day >= dt.date(*start):
            year = day.year - _ERAS[name]
            return ("元" if year == 1 and not short else str(year)), name
    return None


# ---- persons and places ------------------------------------------------------------------


def _labelled(folded: Folded) -> Iterator[_Span]:
    for match in _LABEL_PERSON.finditer(folded.text):
        value = match["value"].strip(" \t　")
        if value and not value.startswith("["):
            start = match.start("value") + match["value"].index(value)
            yield _Span(*folded.span(start, start + len(value)), NAME)


def _persons(folded: Folded) -> Iterator[_Span]:
    for match in _PERSONS.finditer(folded.text):
        for group, rest in (("kanji", _kanji_name), ("kana", _kana_name), ("roman", len)):
            if value := match[group]:
                length = rest(value)
                if length:
                    end = match.end(group)
                    yield _Span(*folded.span(end - length, end), NAME)
    for match in _ENGLISH_PERSONS.finditer(folded.source):
        group = "name" if match["name"] else "name2"
        yield _Span(*match.span(group), NAME)


def _kanji_name(text: str) -> int:
    """Return how many characters at the end of a run of kanji are a name."""
    place = 0
    while found := _ROLE_START.match(text, place):
        place = found.end()
        while place < len(text) and text[place] in " 　":
            place += 1
    # One more word before the name, such as 紹介の, has kana at its end and is not in the run.
    return 0 if text[place:] in _NO_NAMES else len(text) - place


def _kana_name(text: str) -> int:
    return 0 if text in _NO_NAMES or text.startswith(("お", "ご")) else len(text)


def _institutions(folded: Folded) -> Iterator[_Span]:
    for match in _PLACES.finditer(folded.text):
        if not _COMMON_PLACES.fullmatch(match[0]):
            start, end = match.span()
            start += _after_particles(match[0])
            yield _Span(*folded.span(start, end), PLACE)
    for match in _ENGLISH_PLACES.finditer(folded.source):
        yield _Span(*match.span(), PLACE)


_PARTICLES = re.compile(r".*(?:にて|から|より|では|[はがをにでと、])(?=[\u3400-\u9fff々])")


def _after_particles(text: str) -> int:
    """Return where an institution's name begins in a run that holds words before it."""
    found = _PARTICLES.match(text)
    return found.end() if found else 0
