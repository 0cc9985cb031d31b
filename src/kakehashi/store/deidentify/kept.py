"""What may stay as it is of texts that are kept: names of devices, code strings, codes."""

from __future__ import annotations

import re
import unicodedata
from functools import cache, lru_cache
from typing import Any, cast

from kakehashi.store.deidentify import vocabulary
from kakehashi.store.deidentify.actions import words_of
from kakehashi.store.deidentify.report import shows_identity

# PS3.5: capital letters, digits, space and underscore, at most 16.
_CODE_STRING = re.compile(r"[A-Z0-9 _]{0,16}")
_MOST_DIGITS = 6
_LONG_NUMBER = re.compile(r"\d{5}")
_CODE = re.compile(r"[A-Za-z0-9._\-^/+]{1,64}")
_UNIT = re.compile(r"[!-~]{1,16}")
_LETTERS = re.compile(r"[A-Za-z]+")
# Makers, what they call their devices, and words for devices and rooms. Also names of people are
# among them (Sola, Vida), so this is no vocabulary for descriptions.
_DEVICE_WORDS = words_of(
    "siemens healthineers healthcare ge gehc gems medical medpc systems philips canon toshiba "
    "hitachi fujifilm shimadzu konica minolta hologic elekta varian accuray neusoft united mindray "
    "esaote samsung carestream agfa kodak neurologica "
    "somatom definition flash edge force drive naeotom alpha perspective emotion sensation "
    "biograph vision horizon magnetom avanto skyra prisma vida sola lumina trio verio aera espree "
    "symphony syngo awp ctawp mrc discovery revolution lightspeed brightspeed optima signa "
    "architect premier pioneer explorer voyager ingenuity brilliance icon iqon incisive ingenia "
    "achieva intera elition ambition vereos gemini aquilion prime precision genesis vantage titan "
    "galan orian centurian cartesion celesteion scenaria supria echelon oval aperto trillium "
    "station scanner console workstation host room suite unit system serial number model type "
    "version detector det panel tube gantry generator cassette plate source linac table modality "
    "main sub east west north south new old first second ct mr mri pet spect xray dr cr rt nm"
)
# Coding schemes of PS3.16 section 8, and those of Japan.
_SCHEMES = words_of(
    "DCM SCT SRT SNM3 99SDM LN UCUM RADLEX FMA ICD9 ICD9CM ICD10 I9 I9C I10 I10P ISO3166_1 "
    "ISO639_1 ISO639_2 UMLS MSH NCIT NCI ACR BI BARI CD3 HL7 ITIS_TSN MA MDC MDNS NDC NICIP NMMDS "
    "PATHLEX POS RXNORM RO RFC3066 RFC5646 SCPECG SNM2 UBERON UNS V3 JJ1017 JJ1017T JJ1017P"
)


def is_code_string(text: str) -> bool:
    """Say whether a value is a code string, or at least made of words of the vocabulary.

    Not if it has the digits of a phone number or of a date.
    """
    text = text.strip(" ")
    return (
        (_CODE_STRING.fullmatch(text) is not None or _is_clean(text))
        and sum(letter.isdigit() for letter in text) <= _MOST_DIGITS
        and not _LONG_NUMBER.search(text)
        and not shows_identity(text)
    )


@lru_cache(maxsize=65536)
def is_designation(text: str) -> bool:
    """Say whether a text is what devices are called: known words, numbers, and short letters.

    Letters by themselves are at most two, beside a digit three, or a word of the vocabulary, a
    maker's or a device's.
    """
    return (
        text.isascii()
        and not shows_identity(text)
        and all(_is_known(run, text) for run in _LETTERS.finditer(text))
    )


def _is_known(run: re.Match[str], text: str) -> bool:
    word = run[0].casefold()
    beside = text[run.start() - 1 : run.start()] + text[run.end() : run.end() + 1]
    return (
        len(word) <= (3 if any(letter.isdigit() for letter in beside) else 2)
        or word in _DEVICE_WORDS
        or vocabulary.clean(word) == word
    )


def is_scheme(text: str) -> bool:
    """Say whether a Coding Scheme Designator is of the standard, or has the form of one."""
    return text.upper() in _SCHEMES or is_code(text, scheme="")


def is_code(text: str, *, scheme: str) -> bool:
    """Say whether a value is a code of its scheme, or has the form of one."""
    if _meanings().get((scheme.upper(), text.upper())):
        return True
    if scheme.upper() == "UCUM":
        short = all(len(run) <= 3 or _is_clean(run) for run in _LETTERS.findall(text))
        return short and _UNIT.fullmatch(text) is not None and not shows_identity(text)
    return _CODE.fullmatch(text) is not None and is_designation(text)


def meaning_of(scheme: str, value: str) -> str:
    """Return the meaning of a code by the standard's own lists, empty if they do not have it.

    They are pydicom's copy of the context groups of PS3.16.
    """
    return _meanings().get((scheme.upper(), value.upper()), "")


def is_clean_meaning(text: str, *, scheme: str, value: str) -> bool:
    """Say whether a meaning is that of the standard, or made of words of the vocabulary."""
    return text.casefold() == meaning_of(scheme, value).casefold() or _is_clean(text)


def _is_clean(text: str) -> bool:
    return vocabulary.clean(text) == unicodedata.normalize("NFKC", text)


@cache
def _meanings() -> dict[tuple[str, str], str]:
    from pydicom.sr._concepts_dict import concepts  # noqa: PLC0415 - a second, only for codes
    from pydicom.sr._snomed_dict import mapping  # noqa: PLC0415 - the same

    known = cast("dict[str, dict[str, dict[str, tuple[str, Any]]]]", concepts)
    found = {
        (scheme.upper(), value.upper()): meaning
        for scheme, keywords in known.items()
        for codes in keywords.values()
        for value, (meaning, *_) in codes.items()
    }
    # The older ids of SNOMED, under the three names that they go by.
    for old, new in mapping["SRT"].items():
        if meaning := found.get(("SCT", new)):
            for scheme in ("SRT", "SNM3", "99SDM"):
                found[scheme, old.upper()] = meaning
    return found
