"""A series' row in the catalogue, from its DICOM attributes and its grid."""

from __future__ import annotations

import datetime as dt
import re
import unicodedata
from typing import TYPE_CHECKING

from kakehashi.imaging.geometry import Grid, orientation_of
from kakehashi.store.catalogue import SeriesFacts

if TYPE_CHECKING:
    import pydicom

USABLE_SLICES = 32
"""Slices across the body's axis from which a volume counts as usable in 3D."""

# Makers have changed their names, and each is spelled in several ways: what begins with the
# left is the right. The CT of Toshiba is Canon's since 2018, that of Hitachi Fujifilm's since 2021;
# both stay under the name that the machine says, as their kernels differ.
_VENDORS = {
    "CANON": "CANON",
    "FUJI": "FUJIFILM",
    "GE": "GE",
    "HITACHI": "HITACHI",
    "PHILIPS": "PHILIPS",
    "SIEMENS": "SIEMENS",
    "SHIMADZU": "SHIMADZU",
    "TOSHIBA": "TOSHIBA",
    "UNITED IMAGING": "UNITED IMAGING",
    "UIH": "UNITED IMAGING",
}
_AGE = re.compile(r"(\d{3})([DWMY])")
_YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}


def describe(first: pydicom.Dataset, grid: Grid, slices: int) -> SeriesFacts:
    """Return what the catalogue says about a series.

    Parameters
    ----------
    first : pydicom.Dataset
        The instance of the first slice.
    grid : Grid
    slices : int

    Returns
    -------
    SeriesFacts
        What an image does not say, or says in a form that DICOM does not allow, is None.
    """
    lossy = _text(first, "LossyImageCompression") == "01"
    z, y, x = grid.spacing_mm
    orientation = orientation_of(grid.affine_lps)
    return SeriesFacts(
        series_uid=str(first.SeriesInstanceUID),
        study_uid=str(first.StudyInstanceUID),
        patient_id=_text(first, "PatientID") or "",
        modality=_text(first, "Modality") or "OT",
        body_part=_text(first, "BodyPartExamined"),
        manufacturer=_text(first, "Manufacturer"),
        vendor=vendor_of(_text(first, "Manufacturer")),
        model=_text(first, "ManufacturerModelName"),
        kernel=_text(first, "ConvolutionKernel"),
        description=_text(first, "SeriesDescription"),
        study_date=_date(_text(first, "StudyDate")),
        rows=int(first.Rows),
        columns=int(first.Columns),
        slices=slices,
        volumes=1,
        usable_3d=orientation == "axial" and slices >= USABLE_SLICES,
        spacing_z=z,
        spacing_y=y,
        spacing_x=x,
        thickness=_number(_text(first, "SliceThickness")),
        orientation=orientation,
        kvp=_number(_text(first, "KVP")),
        exposure=_exposure(first),
        contrast=bool(
            _text(first, "ContrastBolusAgent") or first.get("ContrastBolusAgentSequence")
        ),
        sex=_text(first, "PatientSex"),
        age=_age(_text(first, "PatientAge")),
        transfer_syntax=str(first.file_meta.TransferSyntaxUID),
        flags=(*grid.flags, *(("lossy",) if lossy else ())),
    )


def vendor_of(manufacturer: str | None) -> str | None:
    """Return a manufacturer's one name; one that is not known is its first word, in capitals."""
    words = unicodedata.normalize("NFKC", manufacturer or "").upper().replace("_", " ").split()
    name = " ".join(words)
    for start, vendor in _VENDORS.items():
        if re.match(rf"{start}(?![A-Z])" if len(start) < 4 else start, name):
            return vendor
    return words[0] if words else None


def _exposure(first: pydicom.Dataset) -> float | None:
    """Return mAs: as such, in thousandths, or as the product of current and time."""
    if (exposure := _number(_text(first, "Exposure"))) is not None:
        return exposure
    if (micro := _number(_text(first, "ExposureInuAs"))) is not None:
        return micro / 1000
    current = _number(_text(first, "XRayTubeCurrent"))
    time = _number(_text(first, "ExposureTime"))
    return None if current is None or time is None else current * time / 1000


def _text(dataset: pydicom.Dataset, name: str) -> str | None:
    value = dataset.get(name)
    if value is None:
        return None
    parts = [value] if isinstance(value, (str, float, int)) else list(value)
    # PostgreSQL refuses the character NUL, which some senders pad with.
    return "\\".join(str(part) for part in parts).replace("\0", "").strip() or None


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _date(text: str | None) -> dt.date | None:
    try:
        return None if text is None else dt.date.fromisoformat(text.replace(".", "-"))
    except ValueError:
        return None


def _age(text: str | None) -> float | None:
    found = _AGE.fullmatch(text or "")
    return float(found[1]) * _YEARS[found[2]] if found else None
