"""Private elements that are known to say nothing of a person: PS3.15 Table E.3.10-1.

Of the table only what CT, MR and PET have. The entries were compared with three copies of the
table in public programs (GDCM's Cleaner, PixelMed's ClinicalTrialsAttributes and a list in
Python made after it), types and numbers of values with pydicom's private dictionaries. Three
kinds of entries differ and say so below.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydicom.dataelem import DataElement, RawDataElement
from pydicom.multival import MultiValue

from kakehashi.store.deidentify.actions import words_of
from kakehashi.store.deidentify.numbers import SIZES, is_decimal, is_numeric, unpacked
from kakehashi.store.deidentify.report import shows_identity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kakehashi.store.deidentify.names import Matcher
    from kakehashi.store.deidentify.tree import Node

CODE_STRINGS = words_of(
    "P O I NONE NO DIRECTIONAL BMATRIX ISOTROPIC PHASE_SLICE READ_SLICE HEAD BODY "
    "SPIRAL AXIAL HELIX CARDIAC SURVIEW DYNAMIC GATED CCT"
)
"""Values that a code string among them may have."""

# What GE calls the programs of its scanners; other names of a program may be anybody's.
_PROGRAMS = words_of(
    "SE GRE SPGR FSPGR FGRE EFGRE EFGRE3D FGRE3D FSE FSE-XL FSEXL FRFSE FRFSEXL FRFSE-XL FSEMSTIR "
    "SSFSE SSFSEIP 3DFSE 3DFRFSE CUBE EPI EPI2 EPIRT FIESTA FIESTA-C 3DFIESTA BRAVO MPRAGE LAVA "
    "LAVAFLEX DISCO VIBRANT PROPELLER PROP MEMP VEMP MERGE COSMIC SWAN ASL 3DASL TOF3D TOF2D 2DTOF "
    "3DTOF PC3D PC2D FASTCINE FASTCARD MDE FLAIR T1FLAIR T2FLAIR DWI ZTE SILENZ MAGIC 2DFAST 3DFAST"
)
_PITCH = re.compile(r"\d{1,2}(?:\.\d{1,4})?:1")


@dataclass(frozen=True, slots=True)
class Safe:
    """What a private element may be.

    Attributes
    ----------
    vrs : tuple of str
        Of several the one that the value came in; where that is not said, the one it fits.
    most : int
        Values that it may have.
    """

    vrs: tuple[str, ...]
    most: int = 1


SAFE: dict[tuple[str, int, int], Safe] = {
    # (private creator, group, last byte of the element)
    ("Philips PET Private Group", 0x7053, 0x00): Safe(("DS",)),  # SUV scale factor
    ("Philips PET Private Group", 0x7053, 0x09): Safe(("DS",)),  # activity scale factor
    ("Philips Imaging DD 001", 0x2001, 0x03): Safe(("FL",)),  # diffusion b-value
    ("Philips Imaging DD 001", 0x2001, 0x04): Safe(("CS",)),  # diffusion direction
    ("Philips MR Imaging DD 001", 0x2005, 0x0D): Safe(("FL",)),  # scale intercept
    ("Philips MR Imaging DD 001", 0x2005, 0x0E): Safe(("FL",)),  # scale slope
    # In no copy of the table: diffusion direction, right - left, anterior - posterior, feet -
    # head, by pydicom's dictionary. Single numbers, without which a b-value is of little use.
    ("Philips MR Imaging DD 001", 0x2005, 0xB0): Safe(("FL",)),
    ("Philips MR Imaging DD 001", 0x2005, 0xB1): Safe(("FL",)),
    ("Philips MR Imaging DD 001", 0x2005, 0xB2): Safe(("FL",)),
    ("ELSCINT1", 0x00E1, 0x21): Safe(("DS",)),  # dose length product
    # Duration of the acquisition: GDCM has it in group 00E1, as pydicom's dictionary, the other
    # copies in 01E1.
    ("ELSCINT1", 0x00E1, 0x50): Safe(("DS",)),
    ("ELSCINT1", 0x01E1, 0x50): Safe(("DS",)),
    ("ELSCINT1", 0x01E1, 0x26): Safe(("CS",)),  # phantom type
    ("ELSCINT1", 0x01F1, 0x01): Safe(("CS",)),  # acquisition type
    ("ELSCINT1", 0x01F1, 0x07): Safe(("DS",)),  # table velocity
    ("ELSCINT1", 0x01F1, 0x26): Safe(("DS", "FD")),  # pitch; the dictionary has both
    ("ELSCINT1", 0x01F1, 0x27): Safe(("DS",)),  # rotation time
    ("SIEMENS MR HEADER", 0x0019, 0x0C): Safe(("IS",)),  # b-value
    ("SIEMENS MR HEADER", 0x0019, 0x0D): Safe(("CS",)),  # diffusion directionality
    ("SIEMENS MR HEADER", 0x0019, 0x0E): Safe(("FD",), 3),  # diffusion gradient direction
    ("SIEMENS MR HEADER", 0x0019, 0x27): Safe(("FD",), 6),  # b-matrix
    ("GEMS_ACQU_01", 0x0019, 0x23): Safe(("DS",)),  # table speed
    ("GEMS_ACQU_01", 0x0019, 0x24): Safe(("DS",)),  # mid-scan time
    ("GEMS_ACQU_01", 0x0019, 0x27): Safe(("DS",)),  # rotation speed
    ("GEMS_ACQU_01", 0x0019, 0x9E): Safe(("LO",)),  # internal name of the pulse sequence
    # In no copy of the table: in diffusion series the direction's x, y and z; the dictionary
    # knows them as user data. Single numbers.
    ("GEMS_ACQU_01", 0x0019, 0xBB): Safe(("DS",)),
    ("GEMS_ACQU_01", 0x0019, 0xBC): Safe(("DS",)),
    ("GEMS_ACQU_01", 0x0019, 0xBD): Safe(("DS",)),
    ("GEMS_SERS_01", 0x0025, 0x07): Safe(("SL",)),  # images in the series
    ("GEMS_PARM_01", 0x0043, 0x27): Safe(("SH",)),  # pitch, as 0.938:1
    ("GEMS_PARM_01", 0x0043, 0x39): Safe(("IS",), 4),  # b-value
    ("GEMS_PARM_01", 0x0043, 0x6F): Safe(("DS",), 4),  # table entry and gradient coil
    ("GEMS_HELIOS_01", 0x0045, 0x01): Safe(("SS",)),  # rows of the detector
    ("GEMS_HELIOS_01", 0x0045, 0x02): Safe(("FL",)),  # width of a row at the isocentre
}


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
        safe = SAFE.get((owner, group, element & 0xFF), Safe(()))
        for vr in safe.vrs:
            value = _private_value(node.private[tag], vr, safe.most, matcher, little=little)
            if value is not None:
                yield DataElement(int(creator.tag), "LO", owner)
                made = DataElement(tag, vr, value)
                made.private_creator = owner
                yield made
                break


def _private_text(source: DataElement | RawDataElement) -> str:
    value: Any = source.value
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace")
    return str(value or "").strip(" \0")


def _private_value(
    source: DataElement | RawDataElement, vr: str, most: int, matcher: Matcher, *, little: bool
) -> list[Any] | None:
    value: Any = source.value
    if source.VR not in (None, "UN", vr) or value in (None, b"", ""):
        return None
    if vr in SIZES:
        if not is_numeric(value, vr, most=most, little=little):
            return None
        if isinstance(value, bytes):
            value = unpacked(value, vr, little=little)
    elif isinstance(value, bytes):
        value = [part.strip(" \0") for part in value.decode("ascii", "replace").split("\\")]
    values = list(value) if isinstance(value, (list, tuple, MultiValue)) else [value]
    good = len(values) <= most and all(
        _is_safe(str(one).strip(), vr) and not matcher.is_number(str(one)) for one in values
    )
    return values if good else None


def _is_safe(text: str, vr: str) -> bool:
    if vr in SIZES:
        return True
    if vr == "CS":
        return text in CODE_STRINGS
    if vr == "LO":
        return text.upper() in _PROGRAMS
    if vr == "SH":
        return _PITCH.fullmatch(text) is not None
    return bool(text) and is_decimal(text) and not shows_identity(text)
