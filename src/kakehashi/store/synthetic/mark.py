"""The mark by which made-up data are known, also after de-identification.

DICOM has an attribute for it: Synthetic Data (0008,001C) of the SOP Common Module (PS3.3
C.12.1), a code string, ``YES`` or ``NO``. It is allowed in every object and names nobody, so that
a de-identifier which keeps codes has no reason to take it away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydicom import Dataset

_KEYWORD = "SyntheticData"


def mark(dataset: Dataset) -> None:
    """Say of an object that it is made up."""
    setattr(dataset, _KEYWORD, "YES")


def is_synthetic(dataset: Dataset) -> bool:
    """Tell whether an object says of itself that it is made up.

    Parameters
    ----------
    dataset : pydicom.Dataset
        Original or de-identified; the attributes up to group 0008 are enough.
    """
    return str(dataset.get(_KEYWORD) or "").strip().upper() == "YES"
