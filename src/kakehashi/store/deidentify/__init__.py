"""De-identification of DICOM objects and reports, by DICOM PS3.15 Annex E and a key.

One call takes an object apart, decides for each element by the table of the standard and by
default-deny for all that the table does not name, and puts together another object, which
says in itself what was done. What must not go into the store is held with the reason.
"""

from __future__ import annotations

from kakehashi.store.deidentify.deidentifier import Deidentifier, Outcome
from kakehashi.store.deidentify.key import load_key
from kakehashi.store.deidentify.names import Names
from kakehashi.store.deidentify.residue import residue

__all__ = ["Deidentifier", "Names", "Outcome", "load_key", "residue"]
