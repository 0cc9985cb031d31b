"""Names of an object are found in any text, and ordinary words are left alone."""

# ruff: noqa: RUF001 - Japanese letters and signs are meant

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kakehashi.store.deidentify import Names


def left(text: str, *persons: str, places: tuple[str, ...] = (), ids: tuple[str, ...] = ()) -> str:
    names = Names(frozenset(persons), frozenset(places), frozenset(ids))
    for hit in reversed(names.matcher.find(text)):
        text = text[: hit.start] + "_" + text[hit.end :]
    return text


YAMADA = "Yamada^Tarou=山田^太郎=やまだ^たろう"


@pytest.mark.parametrize(
    "text",
    [
        "山田太郎",
        "山田　太郎",
        "太郎 山田",
        "山田・太郎",
        "山田_太郎",
        "ヤマダ タロウ",
        "ヤマダタロウ",
        "ﾔﾏﾀﾞ ﾀﾛｳ",
        "ﾔﾏﾀﾞﾀﾛｳ",
        "やまだ たろう",
        "やまだたろー",
        "YAMADA TARO",
        "Yamada, Tarou",
        "taroh yamada",
        "Tarō Yamada",
        "TARO^YAMADA",
        "Yamada-Taro",
        "YamadaTaro",
        "taroyamada",
        "ＹＡＭＡＤＡ　ＴＡＲＯ",
        "ＹａｍａｄａＴａｒｏｕ",
        "山\u200b田太郎",
        "山田\U000e0100太郎",
    ],
)
def test_all_ways_of_writing_a_name_are_found(text):
    cleaned = left(f"胸部 {text} CT", YAMADA)
    assert not set(cleaned) & set("山田太郎やまだたろうヤマダタロウﾔﾏﾀﾛｳ"), cleaned
    assert "ama" not in cleaned.lower()
    assert "胸部" in cleaned
    assert "CT" in cleaned


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Shinji^Chiaki", "SINZI TIAKI"),
        ("Sinzi^Tiaki", "Shinji Chiaki"),
        ("Fujitsuka^Jun", "Huzituka Zyun"),
        ("Satou^Shou", "SATO SHO, Satoh Sho, Satô Shô"),
        ("==さとう^しょう", "Sato Sho"),
        ("==サトウ^ショウ", "satou shou"),
        ("=佐藤^翔=ｻﾄｳ^ｼﾖｳ", "Sato Sho"),
        ("Honma^Jun'ichi", "HOMMA JUNICHI"),
        ("Kenichi^Ono", "けんいち, ケンイチ"),
        ("Hattori^Ryouko", "はっとり りょうこ"),
        ("Hong^Gildong=洪^吉洞=홍^길동", "吉洞 홍길동 gildong"),
    ],
)
def test_romaji_and_kana_stand_for_one_another(name, text):
    cleaned = left(text, name)
    assert not any(letter.isalnum() for letter in cleaned), cleaned


@pytest.mark.parametrize(
    ("name", "text"),
    [("髙橋^濵", "高橋"), ("齋藤^一", "斉藤 斎藤 齊藤"), ("渡邉^進", "渡辺"), ("高﨑^実", "高崎")],
)
def test_old_and_new_forms_of_a_kanji_are_one(name, text):
    assert not any(letter.isalpha() for letter in left(text, name))


WEAK = "Hayashi^Mamoru=林^守"


@pytest.mark.parametrize(
    "text", ["林守", "林　守", "守 林", "林様", "林先生", "林さん", "患者名：林", "林医師"]
)
def test_a_name_of_one_kanji_goes_beside_a_sign_of_a_name(text):
    assert not set(left(text, WEAK)) & set("林守")


@pytest.mark.parametrize("text", ["林間学校", "守るべき", "森林浴", "看守", "気胸は林立する"])
def test_a_name_of_one_kanji_leaves_ordinary_words(text):
    assert left(text, WEAK) == text


def test_a_family_name_that_is_a_radiological_word_leaves_that_word():
    assert left("肺中部に結節", "中部^健") == "肺中部に結節"
    assert left("中部 健 様", "中部^健") == "_ _ 様"
    assert left("head CT, Long axis", "Head^Long") == "head CT, Long axis"
    assert left("Dr. Head, Long Head", "Head^Long") == "Dr. _, _ _"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Mori^Aki=森^亜紀=もり^あき", "膜を覆うアモリファスな、つもりで"),
        ("==すずき^わたる", "広範囲にわたる"),
        ("Oh^An", "an oval mass, oh"),
        ("Ito^Abe", "into, label, abetting"),
        ("Saito^Rei", "サイトカイン"),
    ],
)
def test_short_names_leave_ordinary_words(name, text):
    assert left(text, name) == text


def test_a_short_name_in_katakana_that_is_a_word_goes():
    assert left("モリ 造影", "Mori^Aki=森^亜紀=もり^あき") == "_ 造影"


def test_a_name_without_a_sign_between_its_parts_is_divided():
    assert left("山田様の太郎", "山田太郎") == "_様の_"
    assert left("TARO, YAMADA", "YAMADA TARO") == "_, _"


def test_placeholders_are_no_names():
    text = "Anonymized CT of unknown patient, test"
    assert left(text, "ANONYMIZED", "Unknown^Patient", "TEST", "技師") == text


def test_institutions_are_found_with_any_separators():
    places = ("架空　中央病院", "Nagoya Example Hospital")
    text = "架空中央病院にて。NAGOYA-EXAMPLE_HOSPITAL. nagoya castle"
    assert left(text, places=places) == "_にて。_. nagoya castle"


@pytest.mark.parametrize(
    "text", ["12345678", "0012345678", "No.12345678x", "12-345-678", "１２３４５６７８"]
)
def test_numbers_are_found_in_any_form(text):
    assert "345" not in left(text, ids=("0012345678",)).replace("３４５", "345")


def test_numbers_leave_other_numbers():
    assert (
        left("912345678 1234 56 12345679", ids=("12345678", "12")) == "912345678 1234 56 12345679"
    )
    assert left("AB12 xAB12 AB123", ids=("AB12",)) == "_ xAB12 AB123"


def test_names_are_not_shown():
    names = Names(frozenset({YAMADA}), ids=frozenset({"123456"}))
    assert "山田" not in f"{names} {names!r}"
    assert "123456" not in f"{names} {names!r}"


_KANJI = st.text(alphabet="堀江澄渕鵜飼榎栃柚纐纈舘稗", min_size=2, max_size=3)
_SYLLABLE = r"[ksnmrgh][aueo]|[knmrg]i|shi|chi|tsu|fu|t[aeo]|kyo|sho|chu|jo|ryu"
_SYLLABLES = st.lists(st.from_regex(_SYLLABLE, fullmatch=True), min_size=3, max_size=5)
_KUNREI = {
    "shi": "si",
    "chi": "ti",
    "tsu": "tu",
    "fu": "hu",
    "sho": "syo",
    "chu": "tyu",
    "jo": "zyo",
}


@given(_KANJI, _KANJI, st.sampled_from(["", " ", "　", "・", "_", ", "]), st.booleans())
def test_any_kanji_name_is_found_in_any_order(family, given_name, separator, turned):
    parts = [given_name, family] if turned else [family, given_name]
    cleaned = left(f"胸部{separator.join(parts)}造影", f"X^Y={family}^{given_name}")
    assert not set(cleaned) & set(family + given_name)


_SEPARATORS = st.sampled_from([" ", "", "^", ", ", "-"])


@given(_SYLLABLES, _SYLLABLES, _SEPARATORS, st.booleans(), st.booleans())
def test_any_romaji_name_is_found_in_any_spelling(family, given_name, separator, turned, upper):
    parts = [family, given_name]
    written = ["".join(_KUNREI.get(s, s) for s in part).capitalize() for part in parts]
    text = separator.join(reversed(written) if turned else written)
    text = text.upper() if upper else text
    cleaned = left(f"CT {text} 5mm", "^".join("".join(part) for part in parts))
    assert cleaned.replace("_", "").replace(separator, "").split() in (["CT", "5mm"], ["CT5mm"])


@given(st.text(max_size=60), st.text(max_size=20), st.text(max_size=20))
def test_any_text_and_any_name_are_dealt_with(text, one, two):
    names = Names(frozenset({f"{one}^{two}"}), frozenset({two}), frozenset({one}))
    last = 0
    for hit in names.matcher.find(text):
        assert last <= hit.start < hit.end <= len(text)
        last = hit.end
