"""Small synthetic studies, each made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from kakehashi.store.synthetic import Plan, plan_studies, write_study

SEED = 7


def find(protocol: str, *, having: str = "") -> Plan:
    """The first plan of a protocol, with a lesion and, where asked, a kind of series."""
    return next(
        plan
        for plan in plan_studies(400, seed=SEED, size=128)
        if plan.protocol == protocol
        and plan.findings
        and (not having or any(series.kind == having for series in plan.series))
    )


@dataclass
class Study:
    plan: Plan
    folder: Path
    truth: dict[str, Any]

    def series(self, kind: str, number: int | None = None) -> dict[str, Any]:
        return next(
            series
            for series in self.truth["series"]
            if series["kind"] == kind and number in {None, series["number"]}
        )

    def files(self, series: dict[str, Any]) -> list[Path]:
        return sorted((self.folder / f"S{series['number']:03d}").iterdir())

    def volume(self, series: dict[str, Any], volume: int = 0) -> np.ndarray:
        """Rescaled values of one volume, by our own arithmetic, slices from low to high."""
        slices = [pydicom.dcmread(path) for path in self.files(series)]
        slices = [item for item in slices if item.get("AcquisitionNumber", 1) == volume + 1]
        normal = np.cross(
            slices[0].ImageOrientationPatient[:3], slices[0].ImageOrientationPatient[3:]
        )
        slices.sort(key=lambda item: float(normal @ np.array(item.ImagePositionPatient, float)))
        return np.stack(
            [
                item.pixel_array.astype(float) * float(item.get("RescaleSlope", 1))
                + float(item.get("RescaleIntercept", 0))
                for item in slices
            ]
        )

    def labels(self) -> np.ndarray:
        """The SEG as labels on the grid of its source, read by its own attributes."""
        seg = pydicom.dcmread(self.files(self.series("seg"))[0])
        label_of = {name: about["label"] for name, about in self.truth["organs"].items()} | {
            lesion["name"]: lesion["label"] for lesion in self.truth["lesions"]
        }
        names = {item.SegmentNumber: item.SegmentLabel for item in seg.SegmentSequence}
        source = next(item.source for item in self.plan.series if item.kind == "seg")
        about = self.series("ct", source)
        heights = np.array(
            [
                about["affine_lps"][2][3] + k * about["affine_lps"][2][2]
                for k in range(about["slices"])
            ]
        )
        found = np.zeros((about["slices"], seg.Rows, seg.Columns), int)
        for frame, pixels in zip(
            seg.PerFrameFunctionalGroupsSequence, seg.pixel_array, strict=True
        ):
            z = float(frame.PlanePositionSequence[0].ImagePositionPatient[2])
            k = int(np.abs(heights - z).argmin())
            number = frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
            found[k][pixels > 0] = label_of[names[number]]
        return found


@pytest.fixture(scope="session")
def study(tmp_path_factory) -> Callable[[str], Study]:
    """Give a small study of a protocol."""
    having = {"chest": "seg", "two-phase": "rtstruct"}

    @cache
    def get(protocol: str) -> Study:
        plan = find(protocol, having=having.get(protocol, ""))
        folder = tmp_path_factory.mktemp("synthetic") / protocol
        return Study(plan, folder, write_study(plan, folder))

    return get
