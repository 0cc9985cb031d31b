"""Items of structured reports (ContentSequence): which go, and which stay with their codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kakehashi.store.deidentify.actions import tags_of, words_of

if TYPE_CHECKING:
    from pydicom import Dataset

    from kakehashi.store.deidentify.tree import Node

(_CONTENT,) = tags_of("ContentSequence")
(_TYPE,) = tags_of("ValueType")
(_CONCEPT,) = tags_of("ConceptNameCodeSequence")
(_CODE_VALUE,) = tags_of("CodeValue")
(_REFERENCE,) = tags_of("ReferencedContentItemIdentifier")

_TYPES = words_of(
    "TEXT NUM CODE DATETIME DATE TIME UIDREF COMPOSITE IMAGE WAVEFORM SCOORD SCOORD3D TCOORD "
    "CONTAINER TABLE"
)
# Concepts of PS3.16 annex D that name a person, a place or an examination: observer's name,
# organisation, login and identifier; device's place; orders, accession number, slide; subject's
# name, id and date of birth; mother; specimen's numbers; participant's name, id, its issuer,
# organisation.
_IDENTIFYING = words_of(
    "121008 121009 128774 128775 121017 121022 121029 121030 121031 121036 121040 121041 "
    "113870 113871 113872 113873 121020 121021 121043 121114 121197"
)
_NUMBERS = words_of("121020 121021 121022 121043 121030 121040 121041 128774 128775 113871")
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
    return kind not in _TYPES or _concept(item) in _IDENTIFYING


def is_number_of_person(item: Node) -> bool:
    """Say whether an item holds an id of the person or of the examination as text."""
    return _concept(item) in _NUMBERS


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


def _concept(item: Node) -> str:
    element = item.elements.get(_CONCEPT)
    return element.items[0].text(_CODE_VALUE) if element and element.items else ""
