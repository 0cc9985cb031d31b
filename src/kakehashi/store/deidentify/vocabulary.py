"""Which words of a description are radiology, so that all others can be dropped."""

# ruff: noqa: RUF001 - Japanese letters and signs are meant

from __future__ import annotations

import re
import unicodedata
from enum import Enum
from functools import cache, lru_cache
from importlib.resources import files

_PIECE = re.compile(
    r"(?P<latin>[A-Za-zÀ-ɏ][A-Za-zÀ-ɏ'’]*)"
    r"|(?P<number>\d+(?:\.\d+)?)"
    r"|(?P<japanese>[\u3041-\u30ff\u3400-\u9fff々〆]+)"
    r"|(?P<other>[^A-Za-zÀ-ɏ\d\u3041-\u30ff\u3400-\u9fff々〆]+)"
)
# A technical word: T2w, B30f, FC13, Br40d, b1000, 3D, 5mm, TR500, Qr40. At most three letters
# and four digits: too short for the numbers by which a person or an examination is known.
_TECHNICAL = re.compile(r"[A-Za-z]{1,3}\d{1,3}[A-Za-z]{0,2}|b\d{1,4}|\d{1,2}[A-Za-z]{1,2}")
_UNIT = re.compile(
    r"(?:mm|cm|m|um|ml|cc|l|s|sec|ms|min|h|hr|kv|kvp|ma|mas|mgy|kev|hu|mhz|hz|mg|g|kg|mbq|gbq|bq|"
    r"mci|t|tesla|deg|x|d|w|st|nd|rd|th|%|bpm|mbar|ppm|ch|row|rows)",
    re.IGNORECASE,
)
# Two numbers that could be a day of a month.
_DAY = re.compile(r"(?<![\d.])(?:0?[1-9]|1[0-2])[/月](?:0?[1-9]|[12]\d|3[01])日?(?![\d.])")
_DATE = re.compile(
    r"(?<!\d)(?:(?:19|20)?\d\d[-/.年]\d{1,2}[-/.月]\d{1,2}日?|\d{1,2}[-/.]\d{1,2}[-/.](?:19|20)?\d\d"
    r"|[RHSrhs]\d{1,2}[./]\d{1,2}[./]\d{1,2})(?!\d)"
)
_UID = re.compile(r"\d+(?:\.\d+){3,}")
# Groups of digits with only hyphens or brackets between them, as in a phone number.
_GROUPS = re.compile(r"(?<![\d.])\(?\d+(?:[-‐ー−()]{1,2}\d+)+\)?(?![\d.])")
_CAMEL = re.compile(r"[A-Z]?[a-zà-ɏ'’]+|[A-Z]+(?![a-z])")
_JOINS = re.compile(r"[-+_./,:;()\[\]*&%=<>^×~#\s]+")
_KATAKANA = re.compile(r"[ァ-ヶー]")
_DIGITS = 4


class Region(Enum):
    """What a word says of the part of the body that is shown."""

    HEAD = "head"
    TRUNK = "trunk"
    NONE = "none"


@cache
def _words() -> dict[str, Region]:
    words: dict[str, Region] = {}
    region = Region.NONE
    text = files(__package__).joinpath("vocabulary.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        if line.startswith("["):
            name = line.strip("[]")
            region = Region(name) if name in ("head", "trunk") else Region.NONE
            continue
        for word in line.split():
            words.setdefault(_form(word), region)
    return words


@cache
def _longest() -> int:
    return max(len(word) for word in _words() if not word.isascii())


def _form(word: str) -> str:
    return unicodedata.normalize("NFKC", word).casefold()


@cache
def _japanese() -> str:
    """All Japanese words in one line, katakana as hiragana, to look for parts of words."""
    text = "\n".join(word for word in _words() if not word.isascii())
    return text + "\n" + "".join(chr(ord(c) - 0x60) if "ァ" <= c <= "ヶ" else c for c in text)


def contains(word: str) -> bool:
    """Say whether a word, or a part of a Japanese word, is in the vocabulary."""
    form = _form(word)
    return _known(form) or (not form.isascii() and form in _japanese())


def _known(form: str) -> bool:
    words = _words()
    return form in words or (
        len(form) > 3 and form.endswith("s") and form[:-1] in words and form.isascii()
    )


def regions(text: str) -> set[Region]:
    """Return what the words of a text say of the part of the body."""
    return {region for _, region in _kept(unicodedata.normalize("NFKC", text)) if region}


@lru_cache(maxsize=65536)
def clean(text: str) -> str:
    """Keep of a description only the words of the vocabulary, numbers and technical words.

    Numbers have at most four digits; dates go. Signs stay where what stands on both sides of
    them stays.

    Returns
    -------
    str
        In NFKC; empty if nothing is left.
    """
    text = unicodedata.normalize("NFKC", text)
    text = _UID.sub("\n", text)
    text = _GROUPS.sub(_unless_long, _DAY.sub("\n", _DATE.sub("\n", text)))
    return " ".join("".join(part for part, _ in _kept(text)).split()).strip(" -_,.:;/^&=")


def _unless_long(groups: re.Match[str]) -> str:
    return "\n" if sum(letter.isdigit() for letter in groups[0]) > 6 else groups[0]


@lru_cache(maxsize=65536)
def _kept(text: str) -> tuple[tuple[str, Region | None], ...]:
    out: list[tuple[str, Region | None]] = []
    pieces = _joined(text)
    for place, (kind, piece) in enumerate(pieces):
        if kind == "other":
            inner = 0 < place < len(pieces) - 1 and _JOINS.fullmatch(piece) and "\n" not in piece
            # A sign beside a word that went would show its length and kind.
            kept = inner and _stays(*pieces[place - 1]) and _stays(*pieces[place + 1])
            out.append((piece if kept else " ", None))
        elif kind == "japanese":
            out += _segments(piece)
        elif kind == "technical":
            out.append((piece, None))
        else:
            out += _latin(piece)
    return tuple(out)


def _joined(text: str) -> list[tuple[str, str]]:
    """Divide a text into words; letters and digits that touch are one word."""
    raw = [(str(match.lastgroup), match[0]) for match in _PIECE.finditer(text)]
    out: list[tuple[str, str]] = []
    place = 0
    while place < len(raw):
        kind, piece = raw[place]
        end = place + 1
        if kind in ("latin", "number"):
            while end < len(raw) and raw[end][0] in ("latin", "number"):
                piece += raw[end][1]
                end += 1
            out += _alnum(piece, raw[place:end])
        else:
            out.append((kind, piece))
        place = end
    return out


def _alnum(whole: str, parts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    if len(parts) == 1 and parts[0][0] == "latin":
        return [("latin", whole)]
    if _known(_form(whole)) or _TECHNICAL.fullmatch(whole):
        return [("technical", whole)]
    out: list[tuple[str, str]] = []
    for kind, part in parts:
        good = (
            len(part.split(".")[0]) <= _DIGITS
            if kind == "number"
            else _known(_form(part)) or _UNIT.fullmatch(part)
        )
        # Of ID12345 or room7b nothing stays: half of a number is a hint at the whole.
        if not good:
            return [("latin", "")]
        out.append(("technical", part))
    return out


def _stays(kind: str, piece: str) -> bool:
    if kind == "technical":
        return True
    if kind == "japanese":
        return all(region for _, region in _segments(piece))
    return kind == "latin" and bool(_latin(piece)) and _latin(piece)[0][1] is not None


def _latin(piece: str) -> list[tuple[str, Region | None]]:
    form = _form(piece)
    if not form:
        return []
    if _known(form):
        return [(piece, _region(form))]
    parts = [part for part in _CAMEL.findall(piece) if part]
    if len(parts) > 1 and all(_known(_form(part)) and len(part) > 1 for part in parts):
        return [(part, _region(_form(part))) for part in parts]
    if joined := _compound(form):
        at = 0
        out: list[tuple[str, Region | None]] = []
        for part in joined:
            out.append((piece[at : at + len(part)], _region(part)))
            at += len(part)
        return out
    return [(" ", None)]


def _region(form: str) -> Region:
    words = _words()
    return words.get(form) or words.get(form[:-1]) or Region.NONE


@lru_cache(maxsize=65536)
def _compound(form: str) -> tuple[str, ...] | None:
    """Divide CHESTABDOMEN into words of four letters or more; None if that is not possible."""
    if not form:
        return ()
    for end in range(len(form), 3, -1):
        if _known(form[:end]) and (rest := _compound(form[end:])) is not None:
            return (form[:end], *rest)
    return None


@lru_cache(maxsize=65536)
def _segments(run: str) -> tuple[tuple[str, Region | None], ...]:
    """Divide Japanese by longest match; what is no word of the vocabulary becomes a space."""
    words, longest = _words(), _longest()
    parts: list[tuple[str, Region | None]] = []
    place = 0
    while place < len(run):
        for end in range(min(len(run), place + longest), place, -1):
            if (region := words.get(run[place:end].casefold())) is not None:
                parts.append((run[place:end], region))
                place = end
                break
        else:
            if parts and parts[-1][1] is None:
                parts[-1] = (parts[-1][0] + run[place], None)
            else:
                parts.append((run[place], None))
            place += 1
    out: list[tuple[str, Region | None]] = []
    for at, (part, known) in enumerate(parts):
        beside = [parts[k] for k in (at - 1, at + 1) if 0 <= k < len(parts)]
        # 下 of 山下 and ライン of ラインハルト are pieces of names, not words.
        torn = any(r is None and (len(part) == 1 or _one_script(part, p)) for p, r in beside)
        out.append((" ", None) if known is None or torn else (part, known))
    return tuple(out)


def _one_script(part: str, other: str) -> bool:
    return bool(_KATAKANA.match(part) and _KATAKANA.search(other)) or (
        "ぁ" <= part[0] <= "ん" and any("ぁ" <= letter <= "ん" for letter in other)
    )
