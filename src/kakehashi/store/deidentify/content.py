"""Items of structured reports (ContentSequence): which go, and which stay with their codes."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

from kakehashi.store.deidentify.actions import tags_of, words_of
from kakehashi.store.deidentify.kept import meaning_of

if TYPE_CHECKING:
    from pydicom import Dataset

    from kakehashi.store.deidentify.tree import Node

(_CONTENT,) = tags_of("ContentSequence")
(_TYPE,) = tags_of("ValueType")
(_CONCEPT,) = tags_of("ConceptNameCodeSequence")
(_CODE_VALUE,) = tags_of("CodeValue")
(_SCHEME,) = tags_of("CodingSchemeDesignator")
(_MEANING,) = tags_of("CodeMeaning")
(_REFERENCE,) = tags_of("ReferencedContentItemIdentifier")

_TYPES = words_of(
    "TEXT NUM CODE DATETIME DATE TIME UIDREF COMPOSITE IMAGE WAVEFORM SCOORD SCOORD3D TCOORD "
    "CONTAINER TABLE"
)
IDENTIFYING = words_of(
    "121008 121009 128774 128775 121017 121022 121029 121030 121031 121036 121040 121041 "
    "113870 111700 111705 111706 111724 113512 113514 113516 113871 113872 113873 121020 121021 "
    "121043 121114 121121 121148 121149 121197 121434 121435 126070 130203 130264"
)
"""Concepts of PS3.16 annex D that name a person, a place or an examination.

Observer's name, organisation, login and identifier; device's place; orders, accession number,
slide; subject's name, id, date of birth and point in time; mother; specimen's and container's
numbers and issuers; vial, lot, unit and prescription; participant's name, id, its issuer,
organisation; performer; room and place of service; phases of giving an agent.
"""

_MAY_IDENTIFY = re.compile(
    r"\b(?:identif\w*|ids?|numbers?|names?|physicians?|doctors?|persons?|operators?|performers?|"
    r"technologists?|radiologists?|readers?|authors?|staff|locations?|rooms?|wards?|departments?|"
    r"institutions?|organi[sz]ations?|hospitals?|address\w*|(?:tele)?phones?|telephone|fax|e-?mail|"
    r"contact|login|accession|issuers?|initials|signature|no\.)(?![a-z])"
    "|氏名|名前|姓名|患者名|医師|医員|技師|看護師|担当|主治|読影者|報告者|記載者|依頼者|署名|"
    "施設|病院|医院|機関|病棟|病室|部屋|診療科|住所|所在|電話|連絡先|番号|識別"
)
# A device's model and serial number, and the name of an algorithm: what devices are called stays.
_DEVICE = words_of("111001 113879 113880 121015 121016 121195 121196")
_AGE = "121033"
_OLDEST = 89
_UNITS = {"a": 1.0, "mo": 12.0, "wk": 52.0, "d": 365.0}
_EXACT = ("FloatingPointValue", "RationalNumeratorValue", "RationalDenominatorValue")


def identifies(item: Node) -> bool:
    """Say whether an item of the content goes as a whole: names, and what is no known type."""
    kind = item.text(_TYPE).strip()
    if not kind:
        # An item that only refers to another one has no type.
        return _REFERENCE not in item.elements
    return kind not in _TYPES or _concept(item) in IDENTIFYING or is_identifier(item)


def is_identifier(item: Node) -> bool:
    """Say whether an item is text under a concept that is an identifier by its meaning.

    By the meaning that it came with, and by the standard's. Measurements and codes under such
    a concept (a number of lesions, a location in the body) are none.
    """
    if item.text(_TYPE).strip() != "TEXT" or is_device(item):
        return False
    if _concept(item) in IDENTIFYING:
        return True
    texts = (_concept(item, _MEANING), meaning_of(_concept(item, _SCHEME), _concept(item)))
    return any(
        _MAY_IDENTIFY.search(unicodedata.normalize("NFKC", text).casefold()) for text in texts
    )


def is_device(item: Node) -> bool:
    """Say whether an item tells what a device is called."""
    return _concept(item) in _DEVICE


def by_reference(node: Node) -> bool:
    """Say whether items refer to others by their places, which removal would shift."""
    return any(element.tag == _REFERENCE for _, element in node.walk())


def finish(item: Node, done: Dataset) -> None:
    """Blank what identifies in an item that had to keep its place, and limit an age."""
    if identifies(item):
        for keyword in ("TextValue", "Date", "DateTime", "PersonName", "UID"):
            if keyword in done:
                del done[keyword]
    elif _concept(item) == _AGE:
        for measured in done.get("MeasuredValueSequence") or ():
            _limit_age(measured)


def _limit_age(measured: Dataset) -> None:
    """Make an age over 89 years 90, in whatever unit it is."""
    units = measured.get("MeasurementUnitsCodeSequence") or [None]
    in_a_year = _UNITS.get(str(units[0].get("CodeValue")) if units[0] is not None else "a", 1.0)
    try:
        years = float(measured.get("NumericValue") or 0) / in_a_year
    except (TypeError, ValueError):
        years = _OLDEST + 1.0
    if years > _OLDEST:
        measured.NumericValue = f"{(_OLDEST + 1) * in_a_year:g}"
        for keyword in _EXACT:
            if keyword in measured:
                del measured[keyword]


def _concept(item: Node, tag: int = _CODE_VALUE) -> str:
    element = item.elements.get(_CONCEPT)
    return element.items[0].text(tag) if element and element.items else ""
