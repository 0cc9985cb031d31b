"""The elements of a data set, read once, without changing it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydicom.dataelem import DataElement, RawDataElement, convert_raw_data_element
from pydicom.multival import MultiValue

from kakehashi.store.deidentify.actions import Rule, rule_of, words_of
from kakehashi.store.deidentify.charset import encodings_of, is_guess, readings, redecode, undone

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydicom import Dataset

_CHARSET = 0x00080005
_TEXT = words_of("LO LT PN SH ST UC UT")

_SINGLE = words_of("LT ST UR UT")
# VRs that devices use for one another; a value in a VR of another kind is not what it should be.
_KINDS = (
    _TEXT,
    frozenset(("US", "SS", "OW")),
    frozenset(("UL", "SL")),
    frozenset(("OB", "OW", "OF", "OD", "OL", "OV")),
    frozenset(("CS", "SH", "LO")),
    frozenset(("DS", "IS")),
    frozenset(("AE", "SH", "LO")),
    frozenset(("UR", "UT")),
    frozenset(("FL", "FD")),
)


@dataclass(slots=True)
class Element:
    """An element that is not private.

    Attributes
    ----------
    tag : int
    rule : Rule
    vr : str
        As it came; empty where the transfer syntax does not say.
    source : RawDataElement or DataElement
    items : list of Node or None
        Of a sequence.
    """

    tag: int
    rule: Rule
    vr: str
    source: RawDataElement | DataElement
    items: list[Node] | None = None

    @property
    def sound(self) -> bool:
        """Whether the VR is one that the attribute may have."""
        known = self.rule.vr
        return self.vr in ("", "UN", known) or any(
            self.vr in kind and known in kind for kind in _KINDS
        )

    @property
    def empty(self) -> bool:
        """Whether it has no value."""
        value = self.source.value
        return value is None or (isinstance(value, (bytes, str, list, MultiValue)) and not value)


@dataclass(slots=True)
class Node:
    """A data set or an item of a sequence.

    Attributes
    ----------
    elements : dict of int to Element
        Those that are not private, in the order of their tags.
    private : dict of int to RawDataElement or DataElement
    encodings : tuple of str
        In which its text is written.
    """

    encodings: tuple[str, ...]
    elements: dict[int, Element] = field(default_factory=dict)
    private: dict[int, RawDataElement | DataElement] = field(default_factory=dict)

    def walk(self) -> Iterator[tuple[Node, Element]]:
        """Yield all elements at any depth, each with what it is in."""
        for element in self.elements.values():
            yield self, element
            for item in element.items or ():
                yield from item.walk()

    def texts(self, tag: int) -> list[str]:
        """Return the values of a text element; none if it is absent or unreadable."""
        element = self.elements.get(tag)
        return (texts_of(element, self.encodings) or []) if element else []

    def text(self, tag: int) -> str:
        """Return the first value of a text element, empty if there is none."""
        return next(iter(self.texts(tag)), "")


def read_tree(
    dataset: Dataset, inherited: tuple[str, ...] = (), problems: list[str] | None = None
) -> Node:
    """Read a data set and all sequences in it.

    Parameters
    ----------
    dataset : pydicom.Dataset
        It is not changed.
    inherited : tuple of str
        Encodings of what it is in.
    problems : list of str, optional
        Gets a line for each sequence that cannot be read; its element is left out.
    """
    problems = [] if problems is None else problems
    node = Node(_declared(dataset) or inherited or encodings_of(()))
    for tag in sorted(int(tag) for tag in dataset.keys()):  # noqa: SIM118 - items convert
        source = dataset.get_item(tag)
        if source is None:
            continue
        if tag >> 16 & 1:
            node.private[tag] = source
            continue
        rule = rule_of(tag)
        element = Element(tag, rule, source.VR or "", source)
        if rule.vr == "SQ":
            element.items = _items(dataset, element, node.encodings, problems)
            if element.items is None:
                continue
        node.elements[tag] = element
    return node


def _items(
    dataset: Dataset, element: Element, encodings: tuple[str, ...], problems: list[str]
) -> list[Node] | None:
    source = element.source
    try:
        if isinstance(source, RawDataElement):
            source = convert_raw_data_element(source, encoding=list(encodings), ds=dataset)
        if source.VR == "SQ":
            return [read_tree(item, encodings, problems) for item in source.value or ()]
    except Exception as error:  # pydicom raises many kinds for a damaged sequence
        problems.append(f"a sequence ({element.tag:08X}) is damaged: {type(error).__name__}")
        return None
    problems.append(f"a sequence ({element.tag:08X}) came as {source.VR}")
    return None


def _declared(dataset: Dataset) -> tuple[str, ...] | None:
    source = dataset.get_item(_CHARSET)
    if source is None or not source.value:
        return None
    value = source.value
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace").split("\\")
    names = [value] if isinstance(value, str) else list(value)
    return encodings_of(tuple(str(name or "").strip(" \0") for name in names))


def texts_of(element: Element, encodings: tuple[str, ...]) -> list[str] | None:
    """Return the values of a text element, None if they cannot be decoded.

    An empty element has no values.
    """
    return next(iter(readings_of(element, encodings)), None)


def readings_of(element: Element, encodings: tuple[str, ...]) -> list[list[str]]:
    """Return the values of a text element in every way to read them, the likeliest first."""
    vr = element.vr if element.vr not in ("", "UN") else element.rule.vr
    value = element.source.value
    if value is None:
        return [[]]
    if isinstance(value, bytes):
        return _split(value, vr, encodings)
    values = list(value) if isinstance(value, (list, tuple, MultiValue)) else [value]
    found = [_readings(one, vr, encodings) for one in values]
    if not all(found):
        return []
    count = max(map(len, found), default=1)
    return [[one[min(number, len(one) - 1)] for one in found] for number in range(count)]


def is_guessed(element: Element, encodings: tuple[str, ...]) -> bool:
    """Say whether the values of a text element are only what their bytes may be."""
    value = element.source.value
    values = list(value) if isinstance(value, (list, tuple, MultiValue)) else [value]
    raws = [one if isinstance(one, bytes) else undone(str(one), encodings) for one in values]
    return any(raw is not None and is_guess(raw, encodings) for raw in raws)


def _split(value: bytes, vr: str, encodings: tuple[str, ...]) -> list[list[str]]:
    if vr not in _TEXT and not value.isascii():
        return []
    out = []
    for text in readings(value, encodings, person=vr == "PN"):
        parts = [text] if vr in _SINGLE else [part.strip(" \0") for part in text.split("\\")]
        out.append(parts if any(parts) else [])
    return out


def _readings(value: Any, vr: str, encodings: tuple[str, ...]) -> list[str]:
    original = getattr(value, "original_string", None) if vr == "PN" else None
    if isinstance(original, bytes):
        return readings(original, encodings, person=True)
    # Of a name, components that pydicom decoded; its own str() leaves out what is empty.
    return redecode(str(value), encodings) if value is not None else [""]
