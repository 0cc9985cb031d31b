"""What is true of a synthetic study, as plain values for ``truth.json``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kakehashi.store.synthetic.headers import address_of, telephone_of
from kakehashi.store.synthetic.images import suv_factor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Protocol

    from numpy.typing import NDArray

    from kakehashi.store.synthetic.plan import Plan
    from kakehashi.store.synthetic.protocols import SeriesPlan
    from kakehashi.store.synthetic.render import Body
    from kakehashi.store.synthetic.scan import Grid

    class Drawn(Protocol):
        """What the writer counted in a series."""

        grid: Grid | None
        files: int
        counts: NDArray[np.float64]
        cut: set[int]
        sums: dict[str, NDArray[np.float64]]
        noise: float


_USABLE_SLICES = 32


def organ_truth(body: Body) -> dict[str, dict[str, Any]]:
    """Return label and volume of each organ; volumes are integrals, less lesions."""
    volumes = body.anatomy.volumes_ml()
    for lesion in body.lesions:
        volumes[lesion.organ] -= lesion.volume_ml
    return {
        name: {"label": label, "volume_ml": round(volumes[name], 3)}
        for name, label in body.anatomy.labels.items()
    }


def lesion_truth(body: Body, offset: Sequence[float]) -> list[dict[str, Any]]:
    """Return place and size of each lesion, in patient coordinates."""
    first = len(body.anatomy.labels) + 1
    return [
        {
            "name": f"lesion_{place + 1}",
            "label": first + place,
            "organ": lesion.organ,
            "kind": lesion.tissue,
            "centre_lps_mm": [round(a + b, 3) for a, b in zip(lesion.centre, offset, strict=True)],
            "diameters_mm": [round(2 * radius, 3) for radius in lesion.radii],
            "volume_ml": round(lesion.volume_ml, 4),
        }
        for place, lesion in enumerate(body.lesions)
    ]


def series_truth(
    plan: Plan, series: SeriesPlan, drawn: Drawn, names: Mapping[int, str]
) -> dict[str, Any]:
    """Return what is expected of a series, and what is in it."""
    grid = drawn.grid
    found: dict[str, Any] = {
        "number": series.number,
        "uid": plan.series_uid(series),
        "kind": series.kind,
        "modality": series.modality,
        "description": series.description,
        "files": drawn.files,
        "packable": series.packable,
    }
    if grid is None:
        return found
    found |= {
        "volumes": len(series.phases),
        "phases": list(series.phases),
        "slices": grid.slices,
        "tilt_deg": series.tilt_deg if series.kind == "ct" else 0.0,
        "affine_lps": np.round(grid.affine, 9).tolist(),
        "usable_3d": series.kind in {"ct", "mr", "pet"} and grid.slices >= _USABLE_SLICES,
    }
    if series.kernel:
        found |= {"kernel": series.kernel.name, "noise_hu": round(drawn.noise, 3)}
    if series.kind == "pet":
        found["bq_per_suv"] = suv_factor(plan)
    voxel_ml = abs(float(np.linalg.det(grid.affine[:3, :3]))) / 1000
    if series.packable:
        found["organs"] = {
            name: {
                "grid_ml": round(float(drawn.counts[label]) * voxel_ml, 4),
                "whole": label not in drawn.cut,
                "mean": {
                    phase: round(float(sums[label] / drawn.counts[label]), 3)
                    for phase, sums in drawn.sums.items()
                },
            }
            for label, name in names.items()
            if drawn.counts[label]
        }
    return found


def identifiers(plan: Plan) -> list[dict[str, str]]:
    """Return every value in the files that names the person, the hospital or its staff."""
    who = plan.person
    found = [
        ("patient_id", plan.patient_id),
        ("birth_date", f"{who.birth:%Y%m%d}"),
        ("birth_date", f"{who.birth:%Y年%m月%d日}"),
        ("birth_date", f"{who.birth:%Y-%m-%d}"),
        ("address", address_of(plan)),
        ("telephone", telephone_of(plan)),
        ("accession", plan.accession),
        ("hospital", plan.hospital.name),
        ("hospital_address", plan.hospital.address),
        ("station", plan.machine.station),
        ("study_uid", plan.study_uid),
    ]
    people = [
        ("patient", who.name),
        ("referring", plan.referring),
        ("reading", plan.reading),
        ("operator", plan.operator),
    ]
    for role, name in people:
        found += [(f"{role}_kanji", part) for part in name.kanji]
        found += [(f"{role}_kana", part) for part in name.kana]
        found += [(f"{role}_romaji", part) for part in name.romaji]
        if plan.hospital.half_width:
            found += [(f"{role}_half_width", part) for part in name.half_width]
    return [{"kind": kind, "value": value} for kind, value in found]
