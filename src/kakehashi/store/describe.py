"""A series' row in the catalogue, from its DICOM attributes and its grid."""

from __future__ import annotations

import datetime as dt
import re
import unicodedata
from typing import TYPE_CHECKING

from kakehashi.imaging.geometry import Grid, axial_angle, orientation_of, slice_distance
from kakehashi.store.catalogue import SeriesFacts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pydicom

USABLE_SLICES = 32
"""Slices across the body's axis from which a volume counts as usable in 3D."""

USABLE_DEGREES = 30.0
"""How far their normal may be from the body's axis: as far as a CT's gantry tilts."""

THICKNESS_TOLERANCE = 0.1
"""By which part of it the thickness may differ from the distance of slices: senders round it."""

# Makers have changed their names, and each is spelled in several ways: what begins with the
# left is the right. The CT of Toshiba is Canon's since 2018, that of Hitachi Fujifilm's since 2021;
# both stay under the name that the machine says, as their kernels differ.
_VENDORS = {
    "CANON": "CANON",
    "FUJI": "FUJIFILM",
    "GE": "GE",
    "GEMS": "GE",
    "HITACHI": "HITACHI",
    "PHILIPS": "PHILIPS",
    "SIEMENS": "SIEMENS",
    "SHIMADZU": "SHIMADZU",
    "TOSHIBA": "TOSHIBA",
    "UNITED IMAGING": "UNITED IMAGING",
    "UIH": "UNITED IMAGING",
    "キヤノン": "CANON",
    "富士": "FUJIFILM",
    "島津": "SHIMADZU",
    "日立": "HITACHI",
    "東芝": "TOSHIBA",
}
_AGE = re.compile(r"(\d{3})([DWMY])")
_YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}


def describe(first: pydicom.Dataset, grids: Sequence[Grid]) -> SeriesFacts:
    """Return what the catalogue says about a series.

    Parameters
    ----------
    first : pydicom.Dataset
        The instance of the first slice.
    grids : sequence of Grid
        One a volume.

    Returns
    -------
    SeriesFacts
        Size, spacing and orientation are those of the first volume. What an image does not say,
        or says in a form that DICOM does not allow, is None.
    """
    grid = grids[0]
    z, y, x = grid.spacing_mm
    thickness = _number(_text(first, "SliceThickness"))
    flags = {
        **dict.fromkeys(flag for grid in grids for flag in grid.flags),
        **dict.fromkeys(_steps(grid, thickness)),
        **({"lossy": None} if _text(first, "LossyImageCompression") == "01" else {}),
        **({"synthetic": None} if _text(first, "SyntheticData") == "YES" else {}),
    }
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
        slices=sum(len(grid.order) for grid in grids),
        volumes=len(grids),
        usable_3d=any(usable_in_3d(_text(first, "Modality"), grid) for grid in grids),
        spacing_z=z,
        spacing_y=y,
        spacing_x=x,
        thickness=thickness,
        orientation=orientation_of(grid.affine_lps),
        kvp=_number(_text(first, "KVP")),
        exposure=_exposure(first),
        contrast=bool(
            _text(first, "ContrastBolusAgent") or first.get("ContrastBolusAgentSequence")
        ),
        sex=_text(first, "PatientSex"),
        age=_age(_text(first, "PatientAge")),
        transfer_syntax=str(first.file_meta.TransferSyntaxUID),
        flags=tuple(flags),
    )


def usable_in_3d(modality: str | None, grid: Grid) -> bool:
    """Say whether a volume is usable in 3D, by the rule of the federated study.

    That is a CT, MR or PET volume on a regular grid with at least 32 slices across the body's
    axis. A tilted gantry does no harm, as the affine has the tilt. Localizers are never packed.
    """
    return (
        modality in {"CT", "MR", "PT"}
        and len(grid.order) >= USABLE_SLICES
        and axial_angle(grid.affine_lps) <= USABLE_DEGREES
    )


def _steps(grid: Grid, thickness: float | None) -> Iterator[str]:
    """Yield the flags of slices that leave something out between them, or overlap."""
    if not thickness or len(grid.order) == 1:
        return
    share = slice_distance(grid.affine_lps) / thickness
    if share > 1 + THICKNESS_TOLERANCE:
        yield "spaced-slices"
    elif share < 1 - THICKNESS_TOLERANCE:
        yield "overlapping-slices"


def vendor_of(manufacturer: str | None) -> str | None:
    """Return a manufacturer's one name; one that is not known is its first word, in capitals."""
    words = unicodedata.normalize("NFKC", manufacturer or "").upper().replace("_", " ").split()
    name = " ".join(words)
    for start, vendor in _VENDORS.items():
        if re.match(rf"{start}(?![A-Z])" if len(start) < 4 else start, name):
            return vendor
    return words[0].strip(",.;") or None if words else None


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
