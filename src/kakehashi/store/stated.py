"""How many objects there should be, by what images say of their series, acquisition and study."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from kakehashi.store.dicom import attribute

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pydicom

IN_SERIES = "NumberOfSeriesRelatedInstances"
IN_STUDY = "NumberOfStudyRelatedInstances"
_IN_ACQUISITION = "ImagesInAcquisition"


def objects_stated(datasets: Sequence[pydicom.Dataset], name: str) -> int | None:
    """Return how many objects a series or study has, the largest number that is stated.

    Parameters
    ----------
    datasets : sequence of pydicom.Dataset
        Of one series.
    name : str
        :data:`IN_SERIES` or :data:`IN_STUDY`.

    Returns
    -------
    int or None
        None where none of them says it.
    """
    return max((found for found in (_count(one, name) for one in datasets) if found), default=None)


def images_acquired(datasets: Sequence[pydicom.Dataset]) -> int | None:
    """Return how many images the acquisitions have together that a series' images are of.

    Returns
    -------
    int or None
        None where one of them does not say it.
    """
    stated: Counter[str] = Counter()
    for dataset in datasets:
        count = _count(dataset, _IN_ACQUISITION)
        if count is None:
            return None
        number = str(attribute(dataset, "AcquisitionNumber"))
        stated[number] = max(stated[number], count)
    return stated.total() or None


def _count(dataset: pydicom.Dataset, name: str) -> int | None:
    value = attribute(dataset, name)
    return int(value) if isinstance(value, int) and value > 0 else None
