"""Private elements that are known to say nothing of a person: PS3.15 Table E.3.10-1."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Any

from pydicom.dataelem import DataElement, RawDataElement
from pydicom.multival import MultiValue

from kakehashi.store.deidentify.actions import words_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kakehashi.store.deidentify.names import Matcher
    from kakehashi.store.deidentify.tree import Node

SAFE: dict[tuple[str, int, int], str] = {
    # (private creator, group, last byte of the element): VR
    ("Philips PET Private Group", 0x7053, 0x00): "DS",  # SUV scale factor
    ("Philips PET Private Group", 0x7053, 0x09): "DS",  # activity concentration scale factor
    ("Philips Imaging DD 001", 0x2001, 0x03): "FL",  # diffusion b-value
    ("Philips Imaging DD 001", 0x2001, 0x04): "CS",  # diffusion direction
    ("Philips MR Imaging DD 001", 0x2005, 0xB0): "FL",  # diffusion direction, right - left
    ("Philips MR Imaging DD 001", 0x2005, 0xB1): "FL",  # anterior - posterior
    ("Philips MR Imaging DD 001", 0x2005, 0xB2): "FL",  # feet - head
    ("ELSCINT1", 0x00E1, 0x21): "DS",  # dose length product
    ("ELSCINT1", 0x01E1, 0x50): "DS",  # duration of the acquisition
    ("ELSCINT1", 0x01F1, 0x01): "CS",  # acquisition type
    ("ELSCINT1", 0x01F1, 0x07): "DS",  # table velocity
    ("ELSCINT1", 0x01F1, 0x26): "DS",  # pitch
    ("ELSCINT1", 0x01F1, 0x27): "DS",  # rotation time
    ("SIEMENS MR HEADER", 0x0019, 0x0C): "IS",  # b-value
    ("SIEMENS MR HEADER", 0x0019, 0x0D): "CS",  # diffusion directionality
    ("SIEMENS MR HEADER", 0x0019, 0x0E): "FD",  # diffusion gradient direction
    ("SIEMENS MR HEADER", 0x0019, 0x27): "FD",  # b-matrix
    ("GEMS_ACQU_01", 0x0019, 0x23): "DS",  # table speed
    ("GEMS_ACQU_01", 0x0019, 0x24): "DS",  # mid-scan time
    ("GEMS_ACQU_01", 0x0019, 0x27): "DS",  # rotation speed
    ("GEMS_ACQU_01", 0x0019, 0xBB): "DS",  # diffusion direction, x
    ("GEMS_ACQU_01", 0x0019, 0xBC): "DS",  # y
    ("GEMS_ACQU_01", 0x0019, 0xBD): "DS",  # z
    ("GEMS_SERS_01", 0x0025, 0x07): "SL",  # images in the series
    ("GEMS_PARM_01", 0x0043, 0x39): "IS",  # b-value
    ("GEMS_PARM_01", 0x0043, 0x6F): "DS",  # table entry and gradient coil
    ("GEMS_HELIOS_01", 0x0045, 0x01): "SS",  # rows of the detector
    ("GEMS_HELIOS_01", 0x0045, 0x02): "FL",  # width of a row at the isocentre
}

CODE_STRINGS = words_of(
    "P O I NONE NO DIRECTIONAL BMATRIX ISOTROPIC PHASE_SLICE READ_SLICE HEAD BODY "
    "SPIRAL AXIAL HELIX CARDIAC SURVIEW DYNAMIC GATED CCT"
)
"""Values that a code string among them may have."""

_CODES = {"SS": ("h", 2), "SL": ("i", 4), "FL": ("f", 4), "FD": ("d", 8)}
_MOST = 16
_NUMBER = re.compile(r"[+-]?\d{1,10}(?:\.\d{0,16})?(?:[eE][+-]?\d{1,3})?")


def safe_private(node: Node, matcher: Matcher, *, little: bool) -> Iterator[DataElement]:
    """Yield the private elements of an item that are known to be safe, each with its creator.

    Parameters
    ----------
    node : Node
    matcher : Matcher
        A number that is one of the person's goes all the same.
    little : bool
        The byte order of values that were not read yet.
    """
    for tag in node.private:
        group, element = tag >> 16, tag & 0xFFFF
        creator = node.private.get(group << 16 | element >> 8) if element > 0xFF else None
        if creator is None:
            continue
        owner = _private_text(creator)
        vr = SAFE.get((owner, group, element & 0xFF))
        if vr is None:
            continue
        value = _private_value(node.private[tag], vr, matcher, little=little)
        if value is not None:
            yield DataElement(int(creator.tag), "LO", owner)
            made = DataElement(tag, vr, value)
            made.private_creator = owner
            yield made


def _private_text(source: DataElement | RawDataElement) -> str:
    value: Any = source.value
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace")
    return str(value or "").strip(" \0")


def _private_value(
    source: DataElement | RawDataElement, vr: str, matcher: Matcher, *, little: bool
) -> list[Any] | None:
    value: Any = source.value
    if source.VR not in (None, "UN", vr):
        return None
    if isinstance(value, bytes):
        value = _numbers(value, vr, little=little)
    if value is None:
        return None
    values = list(value) if isinstance(value, (list, tuple, MultiValue)) else [value]
    good = all(_is_safe(one, vr) and not matcher.is_number(str(one)) for one in values)
    return values if values and good else None


def _numbers(raw: bytes, vr: str, *, little: bool) -> list[Any] | None:
    if vr not in _CODES:
        return [part.strip(" \0") for part in raw.decode("ascii", "replace").split("\\")]
    code, size = _CODES[vr]
    if not raw or len(raw) % size or len(raw) > _MOST * size:
        return None
    return list(struct.unpack(f"{'<' if little else '>'}{len(raw) // size}{code}", raw))


def _is_safe(value: Any, vr: str) -> bool:
    if vr == "CS":
        return str(value).strip() in CODE_STRINGS
    if vr in ("DS", "IS"):
        return bool(_NUMBER.fullmatch(str(value)))
    return isinstance(value, (int, float))
