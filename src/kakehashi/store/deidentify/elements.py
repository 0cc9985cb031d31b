"""What is done with each element of a data set, and of the items in it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from pydicom import Dataset, Sequence
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.multival import MultiValue

from kakehashi.store.deidentify import content, kept, vocabulary
from kakehashi.store.deidentify.actions import Action, tags_of
from kakehashi.store.deidentify.dates import age_of, shift_date, shift_datetime, time_of
from kakehashi.store.deidentify.numbers import SIZES, is_decimal, is_numeric, looks_like_text
from kakehashi.store.deidentify.pixels import OFFSETS, PIXELS, fits_pixels, only_pixels
from kakehashi.store.deidentify.private import safe_private
from kakehashi.store.deidentify.report import clean_report, shows_identity, without_identity
from kakehashi.store.deidentify.tree import Element, Node, is_guessed, texts_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from kakehashi.store.deidentify.key import Pseudonyms
    from kakehashi.store.deidentify.names import Matcher, Names

UTF8 = ["UTF8"]
_DUMMY = "REMOVED"
(_PATIENT_ID,) = tags_of("PatientID")
(_CONTENT,) = tags_of("ContentSequence")
(_MEANING,) = tags_of("CodeMeaning")
(_SCHEME,) = tags_of("CodingSchemeDesignator")
(_ZONE_TAG,) = tags_of("TimezoneOffsetFromUTC")
_VALUES = [tag for keyword in ("CodeValue", "LongCodeValue") for tag in tags_of(keyword)]
_REPLACED = tags_of(
    "PatientIdentityRemoved DeidentificationMethod DeidentificationMethodCodeSequence "
    "LongitudinalTemporalInformationModified SpecificCharacterSet"
)
# If no word of these is left they get one that says nothing: they must have a value.
_REQUIRED = tags_of(
    "SegmentLabel StructureSetLabel CodeMeaning UserContentLabel EntityLabel RTPlanLabel "
    "AcquisitionFieldOfViewLabel TreatmentSite"
)
_UID_LIKE = re.compile(r"\d+(?:\.\d+){5}")
# A UID of a device has a registered root and parts below it; fewer dots may be any number.
_DEVICE_UID = re.compile(r"\d+(?:\.\d+){4,}")
_ZONE = re.compile(r"[+-]\d{4}")


@dataclass
class Elements:
    """What is the same for all elements of one object.

    Attributes
    ----------
    pseudonyms : Pseudonyms
    facility : str
    days : int
        By which the person's dates are moved.
    names : Names
    matcher : Matcher
        Of the names.
    encoding : tuple of bool or None
        Whether the VR is implicit, and the byte order little-endian, in values not read yet.
    by_reference : bool
        Items of the content refer to others by their places.
    report : bool
        The object is a report, whose text is free; such are of the second tier.
    top : Node
        The object, as opposed to an item in it.
    syntax : str
        Its transfer syntax.
    problems : list of str
        Gets why the object must be held.
    uids : set of str
        Gets the original UIDs that were replaced.
    """

    pseudonyms: Pseudonyms
    facility: str
    days: int
    names: Names
    matcher: Matcher
    encoding: tuple[bool | None, bool | None]
    by_reference: bool
    report: bool
    top: Node
    syntax: str
    problems: list[str]
    uids: set[str] = field(default_factory=set)

    def items(self, node: Node) -> Dataset:
        """Return a data set or item as it is after de-identification."""
        out = Dataset(parent_encoding=UTF8)
        out.set_original_encoding(self.encoding[0], self.encoding[1], UTF8)
        for tag, element in node.elements.items():
            if tag in _REPLACED or not element.sound:
                continue
            made = self._element(element, node)
            if made is not None:
                out[made.tag] = made
        for safe in safe_private(node, self.matcher, little=self.encoding[1] is not False):
            out[safe.tag] = safe
        return out

    def _element(self, element: Element, node: Node) -> DataElement | RawDataElement | None:
        action, vr = element.rule.action, element.rule.vr
        made: DataElement | RawDataElement | None = None
        if action is Action.EMPTY:
            made = DataElement(element.tag, vr, [] if vr == "SQ" else None)
        elif element.tag in PIXELS:
            made = self._pixels(element, node)
        elif action is Action.BULK:
            made = self._bulk(element, node)
        elif action is Action.NUMBER:
            made = self._number(element)
        elif action is Action.ITEMS:
            made = self._sequence(element)
        elif action is not Action.REMOVE:
            made = self._text(element, node)
        return made

    def _pixels(self, element: Element, node: Node) -> DataElement | RawDataElement | None:
        """Keep the pixels of the object itself; in items there are thumbnails."""
        if node is not self.top:
            return None
        little = self.encoding[1] is not False
        value, problem = only_pixels(element, node, self.syntax, little=little)
        if problem:
            self.problems.append(problem)
            return None
        made = _as_it_is(element)
        if isinstance(made, RawDataElement):
            return made._replace(value=value, length=made.length and len(value))
        made.value = value
        return made

    def _bulk(self, element: Element, node: Node) -> DataElement | RawDataElement | None:
        if element.tag in OFFSETS:
            # Both or none.
            good = all(
                tag in node.elements and fits_pixels(node.elements[tag], node) for tag in OFFSETS
            )
        else:
            value = element.source.value
            good = not (isinstance(value, bytes) and looks_like_text(value))
        return _as_it_is(element) if good else None

    def _text(self, element: Element, node: Node) -> DataElement | None:
        action, vr, tag = element.rule.action, element.rule.vr, element.tag
        if element.empty:
            return DataElement(tag, vr, None)
        texts = texts_of(element, node.encodings)
        # The text of a report is kept, so not in a character set that is only a guess.
        free = action is Action.REPORT and self.report
        if texts is None or (free and is_guessed(element, node.encodings)):
            return None
        if action in (Action.PATIENT_ID, Action.PATIENT_NAME):
            done = self._patient(texts if action is Action.PATIENT_ID else [], node)
        elif action is Action.DUMMY:
            done = [_DUMMY if vr != "AS" else ""]
        elif action is Action.CODE:
            done = [self._code(tag, text, node) for text in texts]
        else:
            one = self._each[
                Action.DEVICE if action is Action.REPORT and content.is_device(node) else action
            ]
            done = [one(text, vr) for text in texts]
        if not any(done):
            done = [_DUMMY] if tag in _REQUIRED else []
            # A date that was none goes; other attributes may stay with nothing in them.
            if not done and action in (Action.DAY, Action.AGE):
                return None
        return DataElement(tag, vr, done if len(done) > 1 else next(iter(done), None))

    @cached_property
    def _each(self) -> dict[Action, Callable[[str, str], str]]:
        return {
            Action.AGE: lambda text, _: age_of(text),
            Action.UID: lambda text, _: self._uid(text),
            Action.DAY: self._day,
            Action.CLEAN: lambda text, _: self.clean(text),
            Action.DEVICE: lambda text, _: self._device(text),
            Action.REPORT: lambda text, _: self._free(text),
            Action.TEXT: lambda text, _: self._kept(text),
        }

    def _patient(self, ids: list[str], node: Node) -> list[str]:
        # An id in an item (of a group of persons) is somebody else's.
        number = next(iter(ids), "") or node.text(_PATIENT_ID)
        return [self.pseudonyms.patient_id(self.facility, number)] if number else []

    def clean(self, text: str) -> str:
        """Clean a description: known names first, so that no piece of one is left.

        Then days and numbers of telephones, which are made of words and numbers that may stay.
        """
        for hit in reversed(self.matcher.find(text)):
            text = f"{text[: hit.start]}\n{text[hit.end :]}"
        return vocabulary.clean(without_identity(text))

    def _kept(self, text: str) -> str:
        """Keep what a maker wrote, unless it holds or shows something of a person."""
        if self._tells(text) or shows_identity(text):
            return ""
        # In Japanese a name without a title has no form by which it could be told.
        return text if text.isascii() else self.clean(text)

    def _device(self, text: str) -> str:
        """Keep what the people on site call a device, if no word of it may be a name."""
        if self._tells(text):
            return ""
        return text if kept.is_designation(text) else self.clean(text)

    def _free(self, text: str) -> str:
        return clean_report(text, self.names, self.days) if self.report else self.clean(text)

    def _tells(self, text: str) -> bool:
        """Say whether a text holds a known name, number or date, or any UID."""
        return (
            self.matcher.hits(text)
            or any(day in text for day in self.names.days)
            or _UID_LIKE.search(text) is not None
        )

    def _uid(self, text: str) -> str:
        made = self.pseudonyms.uid(text)
        if made != text:
            self.uids.add(text)
        return made

    def _day(self, text: str, vr: str) -> str:
        if vr == "DA":
            return shift_date(text, self.days)
        return shift_datetime(text, self.days) if vr == "DT" else time_of(text)

    def _code(self, tag: int, text: str, node: Node) -> str:
        scheme = node.text(_SCHEME)
        value = next((found for found in map(node.text, _VALUES) if found), "")
        if self._tells(text):
            return _DUMMY
        if tag == _MEANING:
            if kept.is_clean_meaning(text, scheme=scheme, value=value):
                return text
            return kept.meaning_of(scheme, value) or self.clean(text)
        good = kept.is_scheme(text) if tag == _SCHEME else kept.is_code(text, scheme=scheme)
        return text if good else _DUMMY

    def _number(self, element: Element) -> DataElement | RawDataElement | None:
        """Keep a number, code string or UID of a device if it is what its VR says."""
        vr = element.rule.vr
        if element.empty:
            return DataElement(element.tag, vr, None)
        if vr in SIZES:
            little = self.encoding[1] is not False
            good = is_numeric(element.source.value, vr, most=element.rule.most, little=little)
            return _as_it_is(element) if good else None
        texts = texts_of(element, ("ascii",))
        if texts is None or not all(self._is_plain(text, element) for text in texts):
            if vr != "CS" or texts is None:
                return None
            # The places of an image type have meanings: what goes leaves its place empty.
            left = [text if self._is_plain(text, element) else "" for text in texts]
            return DataElement(element.tag, vr, left) if any(left) else None
        return _as_it_is(element)

    def _is_plain(self, text: str, element: Element) -> bool:
        vr = element.rule.vr
        if vr in ("DS", "IS"):
            # Only what is written as an id would be: a position or a rescale may have its digits.
            number = text.strip(" \0")
            return is_decimal(number) and not (
                number.isdigit()
                and (self.matcher.is_number(number) or (len(number) > 7 and shows_identity(number)))
            )
        if element.tag == _ZONE_TAG:
            return _ZONE.fullmatch(text.strip()) is not None
        if vr == "UI":
            known = self.matcher.hits(text) or any(day in text for day in self.names.days)
            return _DEVICE_UID.fullmatch(text) is not None and not known
        return kept.is_code_string(text) and not self.matcher.hits(text)

    def _sequence(self, element: Element) -> DataElement:
        items = element.items or []
        if element.tag == _CONTENT and not self.by_reference:
            items = [item for item in items if not content.identifies(item)]
        made = [self.items(item) for item in items]
        if element.tag == _CONTENT:
            for item, done in zip(items, made, strict=True):
                content.finish(item, done)
        return DataElement(element.tag, "SQ", Sequence(made))


def _as_it_is(element: Element) -> DataElement | RawDataElement:
    source = element.source
    if isinstance(source, RawDataElement):
        # UN would hide what it is; the bytes are those of the attribute's own VR. In a sequence
        # that came as UN elements have none, and could not be written with one.
        return source._replace(VR=element.rule.vr) if source.VR in (None, "UN") else source
    value = list(source.value) if isinstance(source.value, MultiValue) else source.value
    made = DataElement(source.tag, source.VR, value, already_converted=True)
    made.is_undefined_length = source.is_undefined_length
    return made
