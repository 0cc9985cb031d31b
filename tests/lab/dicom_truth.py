"""What a series looks like, from its original DICOM files and without the project's own code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom

REPOSITORY = Path(__file__).resolve().parents[2]


def planes(uid: str, data: Path = REPOSITORY / "tests" / "data") -> npt.NDArray[np.float64]:
    """Return a series' rescaled values, axes z, y, x, sorted along the slices' normal."""
    found = []
    for path in sorted(data.rglob("*")):
        if not path.is_file():
            continue
        try:
            dataset = pydicom.dcmread(path)
        except pydicom.errors.InvalidDicomError:
            continue
        if dataset.get("SeriesInstanceUID") == uid:
            found.append(dataset)

    def along(dataset: pydicom.Dataset) -> float:
        row, column = np.reshape(dataset.ImageOrientationPatient, (2, 3)).astype(float)
        return float(np.dot(np.cross(row, column), np.asarray(dataset.ImagePositionPatient, float)))

    found.sort(key=along)
    return np.stack(
        [
            item.pixel_array * float(item.get("RescaleSlope", 1))
            + float(item.get("RescaleIntercept", 0))
            for item in found
        ]
    )


def windowed(plane: npt.NDArray[np.float64], window: float, level: float) -> npt.NDArray[np.int64]:
    """Return 8-bit grey by DICOM PS3.3 C.11.2.1.3.2 (LINEAR_EXACT), halves rounded up."""
    grey = np.floor(((plane - level) / window + 0.5) * 255 + 0.5)
    return np.clip(grey, 0, 255).astype(np.int64)
