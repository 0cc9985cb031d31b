"""Which SOP classes and transfer syntaxes are taken."""

from __future__ import annotations

from pydicom._uid_dict import UID_dictionary

VERIFICATION = "1.2.840.10008.1.1"

_COMPOSITE = ("1.2.840.10008.5.1.4.1.1.", "1.2.840.10008.5.1.4.34.")
# Protocols and inventories are of no patient; baggage and castings are none of a hospital's.
_FOREIGN = (
    "1.2.840.10008.5.1.4.1.1.200.1",
    "1.2.840.10008.5.1.4.1.1.200.3",
    "1.2.840.10008.5.1.4.1.1.200.7",
    "1.2.840.10008.5.1.4.1.1.201.",
    "1.2.840.10008.5.1.4.1.1.501.",
    "1.2.840.10008.5.1.4.1.1.601.",
)

STORAGE = frozenset(
    uid
    for uid, (name, kind, *_) in UID_dictionary.items()
    if kind == "SOP Class"
    and "Storage" in name
    and uid.startswith(_COMPOSITE)
    and not uid.startswith(_FOREIGN)
)
"""Storage SOP classes of a patient's objects, retired ones too: old devices send them."""

_NOT_WHOLE = (
    "1.2.840.10008.1.2.4.94",
    "1.2.840.10008.1.2.4.95",
    "1.2.840.10008.1.2.4.204",
    "1.2.840.10008.1.2.4.205",
    "1.2.840.10008.1.2.6.",
    "1.2.840.10008.1.2.7.",
    "1.2.840.10008.1.20",
)

TRANSFER = frozenset(
    uid
    for uid, (_, kind, *_) in UID_dictionary.items()
    if kind == "Transfer Syntax" and not uid.startswith(_NOT_WHOLE)
)
"""Registered transfer syntaxes, retired ones too; objects are kept in the one they came in.

Not those whose pixels lie elsewhere (JPIP, SMPTE 2110), and none for other uses than a network.
"""
