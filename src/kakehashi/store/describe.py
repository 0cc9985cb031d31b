"""A series' row in the catalogue, from its DICOM attributes and its grid."""

from __future__ import annotations

import datetime as dt
import re
from typing import TYPE_CHECKING

from kakehashi.imaging.geometry import Grid, orientation_of
from kakehashi.store.catalogue import SeriesFacts

if TYPE_CHECKING:
    import pydicom

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
    return SeriesFacts(
        series_uid=str(first.SeriesInstanceUID),
        study_uid=str(first.StudyInstanceUID),
        patient_id=_text(first, "PatientID") or "",
        modality=_text(first, "Modality") or "OT",
        body_part=_text(first, "BodyPartExamined"),
        manufacturer=_text(first, "Manufacturer"),
        model=_text(first, "ManufacturerModelName"),
        kernel=_text(first, "ConvolutionKernel"),
        description=_text(first, "SeriesDescription"),
        study_date=_date(_text(first, "StudyDate")),
        rows=int(first.Rows),
        columns=int(first.Columns),
        slices=slices,
        spacing_z=z,
        spacing_y=y,
        spacing_x=x,
        thickness=_number(_text(first, "SliceThickness")),
        orientation=orientation_of(grid.affine_lps),
        kvp=_number(_text(first, "KVP")),
        contrast=bool(
            _text(first, "ContrastBolusAgent") or first.get("ContrastBolusAgentSequence")
        ),
        sex=_text(first, "PatientSex"),
        age=_age(_text(first, "PatientAge")),
        transfer_syntax=str(first.file_meta.TransferSyntaxUID),
        flags=(*grid.flags, *(("lossy",) if lossy else ())),
    )


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
