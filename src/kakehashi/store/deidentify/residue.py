"""The last look at what was written: whether anything of the input is still in it."""

from __future__ import annotations

import copy
import io
import re
import unicodedata
from functools import lru_cache
from typing import TYPE_CHECKING

from pydicom import FileDataset, dcmwrite
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from kakehashi.store.deidentify import vocabulary
from kakehashi.store.deidentify.deidentifier import Outcome
from kakehashi.store.deidentify.elements import UTF8
from kakehashi.store.dicom import tolerant

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydicom.dataelem import DataElement, RawDataElement
    from pydicom.tag import BaseTag

    from kakehashi.store.deidentify.names import Names

_BULK = (0x7FE00008, 0x7FE00009, 0x7FE00010)
# In ISO 2022 two bytes of a kanji look like ASCII; they count only after an escape sequence.
_JIS = re.compile(rb"\x1b\$[@B]([^\x1b]*)")
_RUN = re.compile(
    "[\t\n\r -~\u00a0-\u024f\u2010-\u203f\u3000-\u30ff\u3400-\u9fff\uac00-\ud7af"
    "\uf900-\ufaff\uff00-\uffef]{2,}"
)
_KATAKANA = {chr(code): chr(code + 0x60) for code in range(0x3041, 0x3097)}


def residue(output: Outcome | bytes, names: Names) -> list[str]:
    """Search what was written for identifiers of the input.

    Searched are the ids, the original UIDs and dates literally, and persons and places by
    the same rules as when they were removed, in UTF-8, Shift-JIS, EUC-JP, ISO-2022-JP and
    UTF-16. The bytes are looked at, not the elements, so that nothing hides in what a parser
    would not show.

    Parameters
    ----------
    output : Outcome or bytes
        Of an outcome, the header is written for it; bytes are a header, without pixel data
        (whose noise could spell a short name).
    names : Names
        Of the outcome, or of the study.

    Returns
    -------
    list of str
        Kinds of what was found, such as ``"id"``, never the identifier itself; empty if
        all is well. With anything found the object must not go into the store.
    """
    data = _header(output) if isinstance(output, Outcome) else output
    found = {kind for kind, pattern in _literal(names) if pattern.search(data)}
    jis = b"\n".join(match[1] for match in _JIS.finditer(data))
    if jis and (pattern := _jis(names)) and pattern.search(jis):
        found.add("name")
    runs = _RUN.findall(data.decode("utf-8", "replace"))
    for ascii_only in (True, False):
        text = "\n".join(run for run in runs if run.isascii() is ascii_only)
        found.update(hit.kind for hit in names.matcher.find(text))
    return sorted(found)


def _header(outcome: Outcome) -> bytes:
    dataset = outcome.dataset
    # A copy of the elements: a copied data set would share them with the outcome.
    elements: dict[BaseTag, DataElement | RawDataElement] = {
        tag: element for tag, element in dataset.items() if tag not in _BULK
    }
    implicit, little = dataset.original_encoding
    meta = copy.copy(dataset.file_meta)
    if meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian:
        # What is compressed cannot be looked at.
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
    bare = FileDataset("", elements, dataset.preamble, meta)
    bare.set_original_encoding(implicit, little, UTF8)
    buffer = io.BytesIO()
    with tolerant():
        dcmwrite(buffer, bare, enforce_file_format=True)
    return buffer.getvalue()


@lru_cache(maxsize=256)
def _literal(names: Names) -> tuple[tuple[str, re.Pattern[bytes]], ...]:
    """Return patterns for what is not looked for as UTF-8 text."""
    out = []
    if names.uids:
        uids = b"|".join(sorted(re.escape(uid.encode()) for uid in names.uids if uid))
        out.append(("uid", re.compile(rb"(?<![\d.])(?:" + uids + rb")(?![\d.])")))
    if names.days:
        days = b"|".join(sorted(day.encode() for day in names.days))
        out.append(("date", re.compile(rb"(?<![\d.])(?:" + days + rb")(?:\d{2,6})?(?!\d)")))
    for kind, texts in (
        ("name", _written(names.persons)),
        ("place", _written(names.places)),
        ("id", {text for text in names.ids if len(text) >= 4}),
    ):
        raw = {
            re.escape(text.encode(encoding))
            for text in texts
            for encoding in ("cp932", "euc_jp", "utf-16-le", "utf-16-be")
            if (not text.isascii() or encoding.startswith("utf-16")) and _can(text, encoding)
        }
        if raw:
            out.append((kind, re.compile(b"|".join(sorted(raw)))))
    return tuple(out)


@lru_cache(maxsize=256)
def _jis(names: Names) -> re.Pattern[bytes] | None:
    raw = {
        re.escape(text.encode("iso2022_jp")[3:-3])
        for text in _written(names.persons) | _written(names.places)
        if not any(letter.isascii() for letter in text) and _can(text, "iso2022_jp")
    }
    return re.compile(b"|".join(sorted(raw))) if raw else None


def _written(values: Iterable[str]) -> set[str]:
    """Return the parts of names that stand for a person by themselves, as they may be written."""
    parts = {
        part
        for value in values
        for part in re.split(r"[\^=\s　,、]+", unicodedata.normalize("NFKC", value))
        # Of katakana three, as in the text itself; of Latin letters more, as in any case.
        if len(part) >= (4 if part.isascii() else 2) and not vocabulary.contains(part)
    }
    kana = {part for part in parts if re.fullmatch(r"[\u3041-\u30ff]+", part)}
    parts -= {part for part in kana if len(part) < 3}
    katakana = {"".join(_KATAKANA.get(letter, letter) for letter in part) for part in kana}
    return parts | katakana | {part.upper() for part in parts} | {part.lower() for part in parts}


def _can(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
