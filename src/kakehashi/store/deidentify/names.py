"""Finds, in any text, the names, places and numbers that an object itself names."""

# ruff: noqa: RUF001 - Japanese letters and signs are meant

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from kakehashi.store.deidentify import phonetic, vocabulary
from kakehashi.store.deidentify.actions import words_of
from kakehashi.store.deidentify.phonetic import Folded, fold

if TYPE_CHECKING:
    from collections.abc import Iterable

Kind = Literal["name", "place", "id"]


@dataclass(frozen=True)
class Names:
    """What an object says of persons, institutions and numbers; never shown.

    Sets of several objects of a study are joined by ``|``.

    Attributes
    ----------
    persons : frozenset of str
        Values of elements of VR PN, as they came.
    places : frozenset of str
        Institutions, addresses, phone numbers.
    ids : frozenset of str
        Patient ids, accession numbers and the like.
    days : frozenset of str
        Original dates, YYYYMMDD, of which a changed copy is in the output.
    uids : frozenset of str
        Original UIDs that were replaced.
    """

    persons: frozenset[str] = field(default=frozenset(), repr=False)
    places: frozenset[str] = field(default=frozenset(), repr=False)
    ids: frozenset[str] = field(default=frozenset(), repr=False)
    days: frozenset[str] = field(default=frozenset(), repr=False)
    uids: frozenset[str] = field(default=frozenset(), repr=False)

    def __or__(self, other: Names) -> Names:
        return Names(*(getattr(self, f.name) | getattr(other, f.name) for f in fields(self)))

    def __str__(self) -> str:
        return "Names(***)"

    @property
    def matcher(self) -> Matcher:
        """What finds them; made once for equal sets."""
        return _matcher(self.persons, self.places, self.ids)


@dataclass(frozen=True, slots=True)
class Hit:
    """A part of a text that must go."""

    start: int
    end: int
    kind: Kind


# What is written in the place of a name without being one.
_NOBODY = words_of(
    "anonymized anonymous anonym unknown none null noname name patient test phantom physician "
    "doctor operator admin administrator user technician tech removed dr md phd mr mrs ms prof "
    "jr sr 不明 匿名 技師 医師 先生 氏名 患者 様 担当 なし 無し 未定"
)
# Names that are ordinary words too; they count only beside another sign of a name.
_ORDINARY = words_of(
    "so go no do an oh see he she you sun son in on to at as is it am pm be we or of by my "
    "long young white brown black green gray grey small wall stone ball bell hand foot rib may "
    "will mark ray sharp strong short day case page price rice wood cross art old new high low "
    "early may june april august best bright good first case moore "
    "わたる すすむ ひかる のぞみ つよし まさる みのる かおる とおる さとる あきら すぐる "
    "ひろし ふとし ただし さかえ めぐみ しずか はじめ おわり まこと たかし"
)
_TITLE_AFTER = re.compile(
    r"[\s　]{0,2}(?:様|さま|さん|氏|殿|先生|医師|医員|教授|准教授|講師|"
    r"技師|看護師|君|くん|ちゃん|どくたー|"
    r"[,、]?\s?(?:m\.?d\b|ph\.?d\b|dr\b))"
)
_TITLE_BEFORE = re.compile(
    r"(?:\b(?:dr|mr|mrs|ms|prof|professor|doctor|patient|name)\.?"
    r"|氏名|患者名?|依頼医|主治医|担当医|読影医?|読影者|報告者|記載者|撮影者|技師|執刀医?|術者|紹介医)"
    r"[\s:：=]{0,3}$"
)
_SEPARATOR = re.compile(r"[\s　,、・･^=._/\-‐]{0,3}")
_LATIN = re.compile(r"[a-z]+(?:['’][a-z]+)*")
_KANJI = re.compile(r"[\u3400-\u9fff々〆\U00020000-\U0003ffff\uac00-\ud7af]")
_KANA = re.compile(r"[ぁ-ゖー]+")
_KATAKANA = re.compile(r"[ァ-ヶーｦ-ﾟ]+")
_SPLIT = re.compile(r"[\s　,、・･_.]+")
_SUBSTRING = 6
"""Letters from which a name is found also inside a longer run of Latin letters."""


@dataclass(frozen=True, slots=True)
class _Surface:
    """One way of writing one part of one person's name."""

    person: int
    part: int
    strong: bool


@dataclass(frozen=True, slots=True)
class _Candidate:
    start: int
    end: int
    persons: frozenset[tuple[int, int]]
    strong: bool


class Matcher:
    """Finds known names, places and numbers; see docs/data-manager.md for the rules.

    A part of a name counts by itself if it is *strong*: two kanji or more, three kana or
    more (of katakana: not inside a longer word), three Latin letters or more, and no word of
    the radiological vocabulary or of everyday speech. A *weak* part, such as a family name
    of one kanji (林, 森), counts only beside another part of the same person's name, before
    a title (様, 先生, 医師, MD) or after one (Dr., 患者名).
    """

    def __init__(
        self, persons: frozenset[str], places: frozenset[str], ids: frozenset[str]
    ) -> None:
        self._literals: dict[str, list[_Surface]] = {}
        self._patterns: dict[str, list[_Surface]] = {}
        self._keys: dict[str, list[_Surface]] = {}
        numbers = set(ids)
        for number, person in enumerate(sorted(persons)):
            if any(letter.isdigit() for letter in person):
                numbers.add(person)
            self._person(number, person)
        self._cjk = _alternation({re.escape(text): s for text, s in self._literals.items()})
        self._kana = _alternation(self._patterns)
        self._long_keys = [key for key in self._keys if len(key) >= _SUBSTRING]
        self._places = _join(_place_pattern(place) for place in sorted(places))
        self._ids = _join(_id_pattern(number) for number in sorted(numbers))
        plain = (_plain_id(number).lstrip("0") for number in numbers)
        self._numbers = frozenset(number for number in plain if len(number) >= 6)

    def find(self, text: str) -> list[Hit]:
        """Return the parts of a text that must go, in order, not overlapping."""
        return self.find_in(fold(text))

    def find_in(self, folded: Folded) -> list[Hit]:
        """Like :meth:`find`, for a text that was folded already."""
        spans: list[tuple[int, int, Kind]] = []
        if self._places:
            spans += [(m.start(), m.end(), "place") for m in self._places.finditer(folded.text)]
        if self._ids:
            spans += [(m.start(), m.end(), "id") for m in self._ids.finditer(folded.text)]
        spans += [(start, end, "name") for start, end in self._names(folded)]
        return _merged([Hit(*folded.span(start, end), kind) for start, end, kind in spans])

    def hits(self, text: str) -> bool:
        """Say whether anything in a text must go."""
        return bool(self.find(text))

    def is_number(self, text: str) -> bool:
        """Say whether a text is, as a whole, one of the numbers of six digits or more."""
        return bool(self._numbers) and _plain_id(text).lstrip("0") in self._numbers

    # ---- the names of one person -----------------------------------------------------

    def _person(self, number: int, value: str) -> None:
        for group in value.split("="):
            parts = [part for part in group.split("^")[:3] if part.strip()]
            guessed: list[str] = []
            if len(parts) == 1:
                parts = [part for part in _SPLIT.split(parts[0]) if part]
                if len(parts) == 1:
                    guessed = _guesses(parts[0])
            keys = [self._part(number, place, part) for place, part in enumerate(parts)]
            for guess in guessed:
                self._part(number, 0, guess)
            self._joined(number, [key for key in keys if key])

    def _part(self, number: int, place: int, text: str) -> str:
        """Enter a part in all its ways of writing, and return its romaji key, if it has one."""
        form = re.sub(r"[\s　,、・･.\-‐]+", "", fold(text).text)
        if not form or form in _NOBODY or any(letter.isdigit() for letter in form):
            return ""
        if _KANJI.search(form):
            strong = len(form) >= 2 and not vocabulary.contains(form) and form not in _ORDINARY
            self._literals.setdefault(form, []).append(_Surface(number, place, strong))
            return ""
        if _KANA.fullmatch(form):
            key = ""
            for kana in {form, phonetic.small_kana(form)}:
                strong = len(kana) >= 3 and not vocabulary.contains(kana) and kana not in _ORDINARY
                surface = _Surface(number, place, strong)
                self._patterns.setdefault(phonetic.kana_pattern(kana), []).append(surface)
                key = phonetic.romaji_of_kana(kana)
                self._key(key, surface)
            return key
        if letters := re.sub(r"[^a-z]", "", form):
            key = phonetic.romaji_key(letters)
            ordinary = letters in _ORDINARY or vocabulary.contains(letters)
            self._key(key, _Surface(number, place, len(letters) >= 3 and not ordinary))
            if made := phonetic.kana_pattern_of_romaji(key):
                pattern, count = made
                surface = _Surface(number, place, count >= 3 and not ordinary)
                self._patterns.setdefault(pattern, []).append(surface)
            return key
        return ""

    def _key(self, key: str, surface: _Surface) -> None:
        if len(key) >= 2:
            strong = surface.strong and key not in _ORDINARY and not vocabulary.contains(key)
            self._keys.setdefault(key, []).append(
                _Surface(surface.person, surface.part, strong and len(key) >= 3)
            )

    def _joined(self, number: int, keys: list[str]) -> None:
        # YAMADATARO and TaroYamada; a romaji key is made of the whole, too.
        for first in keys:
            for second in keys:
                joined = first + second
                if first is not second and len(joined) >= 5:
                    for key in {joined, phonetic.romaji_key(joined)}:
                        self._keys.setdefault(key, []).append(_Surface(number, -1, strong=True))

    # ---- looking ---------------------------------------------------------------------

    def _names(self, folded: Folded) -> list[tuple[int, int]]:
        text = folded.text
        found: list[_Candidate] = []
        if not text.isascii():
            for pattern, surfaces in (self._cjk, self._kana):
                for match in pattern.finditer(text) if pattern else ():
                    # A match of an empty lookahead holds the group that fitted.
                    found += _candidates(match, surfaces, folded)
        if self._keys:
            for match in _LATIN.finditer(text):
                found += self._latin(match)
        if not found:
            return []
        found.sort(key=lambda candidate: (candidate.start, candidate.end))
        return [
            (candidate.start, candidate.end)
            for candidate in found
            if candidate.strong or _titled(candidate, text) or _beside(candidate, found, text)
        ]

    def _latin(self, match: re.Match[str]) -> list[_Candidate]:
        start, end = match.span()
        key = phonetic.romaji_key(match[0])
        if surfaces := self._keys.get(key):
            return [_candidate(start, end, surfaces)]
        if len(key) > _SUBSTRING and any(long in key for long in self._long_keys):
            strong = [s for long in self._long_keys if long in key for s in self._keys[long]]
            return [_candidate(start, end, strong)]
        return []


def _guesses(whole: str) -> list[str]:
    """Divide a name that came without a sign between family and given name."""
    plain = fold(whole).text
    if not _KANJI.match(plain) or len(plain) < 3:
        return []
    return [plain[:2], plain[2:]] if len(plain) > 3 else [plain[:2], plain[1:]]


def _alternation(
    patterns: dict[str, list[_Surface]],
) -> tuple[re.Pattern[str] | None, list[list[_Surface]]]:
    if not patterns:
        return None, []
    order = sorted(patterns, key=len, reverse=True)
    # Looking ahead lets names overlap: of 中村 and 村田, both are found in 中村田.
    source = "|".join(f"(?=({pattern}))" for pattern in order)
    return re.compile(source), [patterns[pattern] for pattern in order]


def _candidate(start: int, end: int, surfaces: list[_Surface]) -> _Candidate:
    return _Candidate(
        start,
        end,
        frozenset((surface.person, surface.part) for surface in surfaces),
        any(surface.strong for surface in surfaces),
    )


def _candidates(
    match: re.Match[str], surfaces: list[list[_Surface]], folded: Folded
) -> list[_Candidate]:
    group = match.lastindex or 1
    start, end = match.span(group)
    candidate = _candidate(start, end, surfaces[group - 1])
    if _KANA.fullmatch(match[group]):
        first, last = folded.span(start, end)
        written = folded.source[first:last]
        if _KATAKANA.fullmatch(written):
            before, after = folded.source[:first][-1:], folded.source[last : last + 1]
            alone = not _KATAKANA.fullmatch(before) and not _KATAKANA.fullmatch(after)
            # Two kana fill a whole word of katakana: モリ is a name, the モリ of アモリ is not.
            strong = alone and (candidate.strong or len(match[group]) == 2)
            return [_Candidate(start, end, candidate.persons, strong)]
    return [candidate]


def _titled(candidate: _Candidate, text: str) -> bool:
    if _TITLE_AFTER.match(text, candidate.end):
        return True
    return bool(_TITLE_BEFORE.search(text[max(0, candidate.start - 14) : candidate.start]))


def _beside(candidate: _Candidate, found: list[_Candidate], text: str) -> bool:
    """Say whether another part of the same person's name stands beside this one."""
    at = bisect_left(found, candidate.start - 24, key=lambda other: other.start)
    for other in found[at:]:
        if other.start > candidate.end + 3:
            return False
        if other is candidate or not _parts_of_one(candidate.persons, other.persons):
            continue
        first, second = (other, candidate) if other.end <= candidate.start else (candidate, other)
        if first.end <= second.start and _SEPARATOR.fullmatch(text, first.end, second.start):
            return True
    return False


def _parts_of_one(one: frozenset[tuple[int, int]], two: frozenset[tuple[int, int]]) -> bool:
    return any(p == q and a != b for p, a in one for q, b in two)


def _place_pattern(place: str) -> str | None:
    form = fold(place).text.strip()
    words = re.findall(r"[^\s　,、^=._/\-‐()]+", form)
    plain = "".join(words)
    if len(plain) < 3 or all(vocabulary.contains(word) for word in words):
        return None
    pattern = r"[\s　,、^=._/\-‐()]{0,3}".join(re.escape(word) for word in words)
    return _bounded(pattern, plain)


def _plain_id(number: str) -> str:
    return re.sub(r"[^0-9a-z]", "", fold(number).text)


def _id_pattern(number: str) -> str | None:
    plain = _plain_id(number)
    if len(plain) < 4 or not any(letter.isdigit() for letter in plain):
        return None
    if plain.isdigit():
        digits = plain.lstrip("0")
        if len(digits) < 4:
            return None
        return rf"(?<!\d)0*{'[-_./ ]?'.join(digits) if len(digits) > 5 else digits}(?!\d)"
    return _bounded("[-_./ ]?".join(re.escape(letter) for letter in plain), plain)


def _bounded(pattern: str, plain: str) -> str:
    """Short Latin words and numbers count only if they are not part of longer ones."""
    if len(plain) >= _SUBSTRING or not plain.isascii():
        return pattern
    return rf"(?<![0-9a-z]){pattern}(?![0-9a-z])"


def _join(patterns: Iterable[str | None]) -> re.Pattern[str] | None:
    known = sorted({pattern for pattern in patterns if pattern}, key=len, reverse=True)
    return re.compile("|".join(known)) if known else None


def _merged(hits: list[Hit]) -> list[Hit]:
    out: list[Hit] = []
    for hit in sorted(hits, key=lambda one: (one.start, -one.end)):
        if out and hit.start < out[-1].end:
            if hit.end > out[-1].end:
                out[-1] = Hit(out[-1].start, hit.end, out[-1].kind)
        else:
            out.append(hit)
    return out


@lru_cache(maxsize=1024)
def _matcher(persons: frozenset[str], places: frozenset[str], ids: frozenset[str]) -> Matcher:
    return Matcher(persons, places, ids)
