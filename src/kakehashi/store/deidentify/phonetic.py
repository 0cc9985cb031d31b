"""Japanese names in kanji, kana and romaji brought to forms that can be compared."""

from __future__ import annotations

import re
import unicodedata
from array import array
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# Forms of one kanji that hospitals' systems use for one another in names.
_KANJI = str.maketrans(
    "髙﨑邊邉齋齊斉濱濵澤嶋嶌冨眞廣國櫻惠榮瀧龍德彌圓藏條黑壽渡𠮷桒禮與亞應學寬寛靜曾曽萬假檜縣佛峯舘",
    "高崎辺辺斎斎斎浜浜沢島島富真広国桜恵栄滝竜徳弥円蔵条黒寿渡吉桑礼与亜応学寛寛静曽曽万仮桧県仏峰館",
)
_MARKS = "ﾞﾟ゙゚゛゜"
_INVISIBLE = re.compile(r"[\u00ad\u034f\u061c\u180b-\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
                        r"\ufe00-\ufe0f\ufeff\U000e0000-\U000e01ef]")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Folded:
    """A text in the form in which names are looked for, and where each character came from.

    Attributes
    ----------
    text : str
        NFKC, small letters without accents, hiragana for katakana, one form of each kanji.
    source : str
        The text as it was.
    starts, ends : sequence of int
        The part of `source` that a character of `text` stands for.
    """

    text: str
    source: str
    starts: Sequence[int]
    ends: Sequence[int]

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Return the part of the source for a part of the text that is not empty."""
        return self.starts[start], self.ends[end - 1]


def fold(text: str) -> Folded:
    """Bring a text to the form in which names are looked for."""
    if text.isascii():
        places = range(len(text) + 1)
        return Folded(text.lower(), text, places, places[1:])
    out: list[str] = []
    starts, ends = array("l"), array("l")
    position, length = 0, len(text)
    while position < length:
        end = position + 1
        # A mark belongs to the letter before it, and together they may be one character.
        while end < length and (text[end] in _MARKS or unicodedata.combining(text[end])):
            end += 1
        piece = _piece(text[position:end])
        out.append(piece)
        starts.extend([position] * len(piece))
        ends.extend([end] * len(piece))
        position = end
    return Folded("".join(out), text, starts, ends)


@lru_cache(maxsize=65536)
def _piece(cluster: str) -> str:
    cluster = cluster.replace("゛", "\u3099").replace("゜", "\u309a")
    composed = unicodedata.normalize("NFKC", _INVISIBLE.sub("", cluster)).translate(_KANJI)
    return "".join(_plain(letter) for letter in composed)


def _plain(letter: str) -> str:
    if "\u30a1" <= letter <= "\u30f6":
        return chr(ord(letter) - 0x60)
    if letter < "\u0250" and not letter.isascii():
        letter = unicodedata.normalize("NFD", letter)[0]
    low = letter.lower()
    return low if len(low) == 1 else letter


# ---- romaji -----------------------------------------------------------------------------

# Hepburn and its kin to Kunrei, in this order; then long vowels to short ones.
_KUNREI = tuple(
    (re.compile(pattern), to)
    for pattern, to in (
        (r"[^a-z]", ""),
        (r"tch", "cch"),
        (r"sh(?=[auoe])", "sy"),
        (r"shi", "si"),
        (r"ch(?=[auoe])", "ty"),
        (r"chi", "ti"),
        (r"c(?=t)", "t"),
        (r"tsu", "tu"),
        (r"[dt]zu|dsu|du", "zu"),
        (r"dz", "z"),
        (r"di", "zi"),
        (r"jy?(?=[auoe])", "zy"),
        (r"ji", "zi"),
        (r"fu", "hu"),
        (r"m(?=[bpm])", "n"),
        (r"(?<![kstnhmrgzbpc])ye", "e"),
        (r"oh(?![aeiouy])", "o"),
        (r"(?<=.)wo", "o"),
        (r"ou|oo", "o"),
        (r"oo", "o"),
        (r"uu", "u"),
        (r"aa", "a"),
        (r"ii", "i"),
        (r"ee", "e"),
    )
)


@lru_cache(maxsize=65536)
def romaji_key(word: str) -> str:
    """Return one form for all the ways of writing a Japanese name in Latin letters.

    ``Satou``, ``Satoh``, ``Satô`` and ``SATO`` give ``sato``; ``Shinji`` and ``Sinzi`` give
    ``sinzi``. Names of other languages get some form too, the same for the same name.
    """
    key = unicodedata.normalize("NFD", word).lower()
    for pattern, to in _KUNREI:
        key = pattern.sub(to, key)
    return key


# ---- kana -------------------------------------------------------------------------------

_ROWS = {
    "": "あいうえお",
    "k": "かきくけこ",
    "g": "がぎぐげご",
    "s": "さしすせそ",
    "z": "ざじずぜぞ",
    "t": "たちつてと",
    "d": "だぢづでど",
    "n": "なにぬねの",
    "h": "はひふへほ",
    "b": "ばびぶべぼ",
    "p": "ぱぴぷぺぽ",
    "m": "まみむめも",
    "r": "らりるれろ",
}
_VOWELS = "aiueo"
_ROMAN = {kana: c + v for c, row in _ROWS.items() for kana, v in zip(row, _VOWELS, strict=True)}
_ROMAN |= {"や": "ya", "ゆ": "yu", "よ": "yo", "わ": "wa", "を": "o", "ん": "n", "ー": ""}
_ROMAN |= {"ぢ": "zi", "づ": "zu", "ゔ": "bu", "ゐ": "i", "ゑ": "e"}
_SMALL = {"ゃ": "ya", "ゅ": "yu", "ょ": "yo"}
_SMALL_VOWELS = dict(zip("ぁぃぅぇぉ", _VOWELS, strict=True))
_LARGE = re.compile(r"(?<=[きぎしじちぢにひびぴみり])[やゆよ]")
_TO_SMALL = str.maketrans("やゆよ", "ゃゅょ")


def romaji_of_kana(kana: str) -> str:
    """Return the romaji key of a name in hiragana."""
    out = ""
    double = False
    for letter in kana:
        if letter == "っ":
            double = True
            continue
        if letter in _SMALL:
            out = (out[:-1] if out.endswith("i") else out) + _SMALL[letter]
        elif letter in _SMALL_VOWELS:
            out += _SMALL_VOWELS[letter]
        else:
            roman = _ROMAN.get(letter, "")
            out += (roman[:1] if double else "") + roman
        double = False
    return romaji_key(out)


def small_kana(kana: str) -> str:
    """Write contracted sounds with small letters, which old systems do not have."""
    return _LARGE.sub(lambda found: found[0].translate(_TO_SMALL), kana)


_SAME = (
    dict.fromkeys("やゃ", "[やゃ]")
    | dict.fromkeys("ゆゅ", "[ゆゅ]")
    | dict.fromkeys("よょ", "[よょ]")
    | dict.fromkeys("つっ", "[つっ]")
    | dict.fromkeys("ずづ", "[ずづ]")
    | dict.fromkeys("じぢ", "[じぢ]")
)


def kana_pattern(kana: str) -> str:
    """Return a pattern for a name in hiragana and the ways of writing its long vowels."""
    out = []
    for place, letter in enumerate(kana):
        if place and letter in "うお":
            out.append("[うおー]?" if letter == "う" else "[うおー]")
        elif letter == "ー":
            out.append("[ーあいうえお]?")
        else:
            out.append(_SAME.get(letter, re.escape(letter)))
    return "".join(out)


_LONG = {"a": "[あー]?", "i": "[いー]?", "u": "[うー]?", "e": "[えいー]?", "o": "[うおー]?"}
_SYLLABLE = re.compile(r"(kk|ss|tt|pp)?([kgsztdnhbpmr]?)(y?)([aiueo])|(w)a|(n)(?![aiueo])")


def kana_pattern_of_romaji(key: str) -> tuple[str, int] | None:
    """Return a pattern in hiragana for a romaji key, and the kana it has at least.

    None if the key is not made of Japanese syllables.
    """
    out, count, position = [], 0, 0
    while position < len(key):
        # A double consonant's first letter stands for a small tsu.
        small = key[position : position + 2] in ("kk", "ss", "tt", "pp", "zz", "gg", "dd", "bb")
        start = position + small
        found = _SYLLABLE.match(key, start)
        if not found:
            return None
        if small:
            out.append("[っつ]")
            count += 1
        out.append(_kana(found))
        count += 1 + bool(found[3])
        position = found.end()
    return "".join(out), count


def _kana(found: re.Match[str]) -> str:
    if found[5]:
        return "わ" + _LONG["a"]
    if found[6]:
        return "ん"
    consonant, glide, vowel = found[2], found[3], found[4]
    place = _VOWELS.index(vowel)
    if glide and not consonant:
        if vowel in "ie":
            return ("い" if vowel == "i" else "いえ") + _LONG[vowel]
        core = {"a": "や", "u": "ゆ", "o": "よ"}[vowel]
    elif glide:
        stem = _same_sound(consonant, 1)
        core = stem + {"a": "[やゃ]", "u": "[ゆゅ]", "o": "[よょ]"}.get(vowel, "[えぇ]")
    else:
        core = _same_sound(consonant, place)
    if consonant == "n" and not glide:
        # Kenichi is ke-ni-chi or ken-ichi.
        core = f"(?:{core}|ん{_ROWS[''][place]})"
    return core + _LONG[vowel]


def _same_sound(consonant: str, place: int) -> str:
    if consonant == "z" and place in (1, 2):
        return "[じぢ]" if place == 1 else "[ずづ]"
    if not consonant and place == 4:
        return "[おを]"
    return _ROWS[consonant][place]
