"""Synthetic rows of the catalogue, as many as are asked for: no person, no hospital, no image.

Ten facilities with scanners of six makers, whose models and kernels have names of the usual
form. The shares (of makers in each facility, of kernels, of body parts) are made up, with a long
tail as in practice; they are not those of a published table. The same seed gives the same rows.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from kakehashi.store.facets.export import schema_of
from kakehashi.store.facets.identifiers import UID_LENGTH
from kakehashi.store.facets.library import load
from kakehashi.store.query import COLUMNS

BATCH = 500_000
FIRST, LAST = dt.date(2018, 4, 1), dt.date(2026, 9, 1)
SERIES_OF_STUDY = 3.5
FACILITIES = tuple(f"F{number:02d}" for number in range(1, 11))
SHARES = (0.17, 0.15, 0.13, 0.12, 0.11, 0.10, 0.08, 0.06, 0.05, 0.03)
MAKERS = {
    "CANON": ("CANON_MEC", "Canon Medical Systems", "キヤノンメディカルシステムズ"),
    "SIEMENS": ("SIEMENS", "Siemens Healthineers"),
    "GE": ("GE MEDICAL SYSTEMS", "GE HealthCare"),
    "PHILIPS": ("Philips", "Philips Medical Systems"),
    "FUJIFILM": ("FUJIFILM Corporation",),
    "HITACHI": ("Hitachi Medical Corporation", "Hitachi, Ltd."),
}
FAMILIES = {
    "CANON": ("Aquilion", "Aquilion Prime", "Aquilion ONE", "Vantage"),
    "SIEMENS": ("SOMATOM Definition", "SOMATOM Force", "SOMATOM Drive", "MAGNETOM"),
    "GE": ("Revolution", "Discovery CT", "Optima CT", "SIGNA"),
    "PHILIPS": ("Ingenuity", "iCT", "IQon", "Ingenia"),
    "FUJIFILM": ("SCENARIA", "Supria"),
    "HITACHI": ("SCENARIA", "ECLOS"),
}
KERNELS = {
    "CANON": (*(f"FC{n:02d}" for n in range(1, 60)), "AiCE Body", "AiCE Lung", "FIRST Body"),
    "SIEMENS": tuple(
        f"{kind}{sharp}{speed}"
        for kind in ("B", "Br", "Bl", "Hr", "I")
        for sharp in (20, 26, 30, 31, 36, 40, 44, 50, 56, 60, 64, 70)
        for speed in "fds"
    )[:120],
    "GE": (
        *("STANDARD", "SOFT", "DETAIL", "BONE", "BONEPLUS", "LUNG", "CHST", "EDGE", "ULTRA"),
        *(f"{a} {b}" for a in ("STANDARD", "LUNG", "BONE") for b in ("SS30", "SS50", "AR30", "DL")),
    ),
    "PHILIPS": (*"ABCDEFL", "YA", "YB", "YC", "YD", "UA", "UB", "EB", "EC", "IMR1", "IMR2"),
    "FUJIFILM": tuple(f"{n:02d}" for n in range(1, 20)),
    "HITACHI": tuple(f"{n:02d}A" for n in range(1, 25)),
}
BODY_PARTS = (
    *("CHEST", "ABDOMEN", "HEAD", "CHESTABDPELVIS", "NECK", "PELVIS", "SPINE", "HEART"),
    *("EXTREMITY", "KNEE", "SHOULDER", "LIVER", "BREAST", "PROSTATE", "ANKLE"),
)
WORDS = (
    ("胸部", "腹部", "頭部", "骨盤", "Chest", "Abdomen", "Head", "C-A-P"),
    (
        "単純",
        "造影 動脈相",
        "造影 平衡相",
        "plain",
        "CE early",
        "CE delayed",
        "結節精査",
        "follow-up",
    ),
    tuple(f"{mm}mm" for mm in ("0.5", "0.625", "1.0", "1.25", "2.0", "3.0", "5.0", "10.0")),
    ("", "肺野", "縦隔", "骨", "MPR cor", "MPR sag", "thin", "MIP", *(f"#{n}" for n in range(40))),
)
FLAGS = ((), ("tilted",), ("uneven-spacing",), ("single-slice",), ("lossy",), ("tilted", "lossy"))
SYNTAXES = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.90")


@dataclass(frozen=True)
class _Scanners:
    """What stands where: drawn once for a seed."""

    models: list[str]
    maker_of: np.ndarray[Any, Any]
    kernels: list[str]
    of_model: list[np.ndarray[Any, Any]]
    of_facility: list[np.ndarray[Any, Any]]


def batches(rows: int, seed: int = 7) -> Iterator[pa.RecordBatch]:
    """Yield rows in order of the studies' dates, with all columns of the query language."""
    scanners = _scanners(np.random.default_rng(seed))
    for number, start in enumerate(range(0, rows, BATCH)):
        chance = np.random.default_rng([seed, number])
        yield _batch(chance, scanners, start, min(BATCH, rows - start), rows)


def _scanners(chance: np.random.Generator) -> _Scanners:
    models: list[str] = []
    maker_of: list[int] = []
    kernels = sorted({kernel for names in KERNELS.values() for kernel in names})
    of_model = []
    for maker, (vendor, families) in enumerate(FAMILIES.items()):
        for family in families:
            for year in range(1, 5 if len(families) > 2 else 4):
                models.append(f"{family} {16 * 2**year if year < 4 else 'Edge'}")
                maker_of.append(maker)
                names = KERNELS[vendor]
                own = chance.permutation(names)[: chance.integers(min(17, len(names)), 48)]
                of_model.append(np.searchsorted(kernels, own))
    mixes = chance.dirichlet([0.9, 0.9, 0.9, 0.6, 0.2, 0.2], len(FACILITIES))
    makers = np.array(maker_of)
    of_facility = [
        np.array(
            [
                chance.choice(np.flatnonzero(makers == maker))
                for maker in chance.choice(len(MAKERS), chance.integers(5, 12), p=mix)
            ]
        )
        for mix in mixes
    ]
    return _Scanners(models, makers, kernels, of_model, of_facility)


def _falling(count: int, power: float = 1.0) -> np.ndarray[Any, Any]:
    weights = 1 / np.arange(1, count + 1) ** power
    shares: np.ndarray[Any, Any] = weights / weights.sum()
    return shares


def _picked(chance: np.random.Generator, values: Any, shares: Any, size: int) -> Any:
    return np.array(values)[chance.choice(len(values), size, p=np.array(shares) / sum(shares))]


def _batch(
    chance: np.random.Generator, scanners: _Scanners, start: int, size: int, rows: int
) -> pa.RecordBatch:
    study = np.sort(chance.integers(0, max(1, int(size / SERIES_OF_STUDY)), size))
    studies = int(study[-1]) + 1
    facility = chance.choice(len(FACILITIES), studies, p=SHARES)
    model = np.empty(studies, np.int64)
    for number, own in enumerate(scanners.of_facility):
        here = np.flatnonzero(facility == number)
        model[here] = chance.choice(own, len(here), p=_falling(len(own)))
    # The years' growth: the density rises from the first day on.
    place = (start + size * (np.arange(studies) + 0.5) / studies) / rows
    days = (FIRST.toordinal() - 719163) + ((LAST - FIRST).days * np.sqrt(place)).astype(np.int32)
    magnetic = (chance.random(studies) < 0.16)[study]
    patients = max(1, int(rows / 8))
    return _table(
        chance,
        scanners,
        study=study,
        model=model[study],
        magnetic=magnetic,
        columns={
            "series_uid": _uids(chance.integers(0, 2**64, (size, 2), dtype=np.uint64)),
            "study_uid": _uids(chance.integers(0, 2**64, (studies, 2), dtype=np.uint64)).take(
                pa.array(study)
            ),
            "patient_id": _uids(
                np.stack(
                    [np.full(studies, 77, np.uint64), chance.integers(0, patients, studies)], axis=1
                ).astype(np.uint64)
            ).take(pa.array(study)),
            "facility": _coded(facility[study], FACILITIES),
            "body_part": _coded(
                chance.choice(len(BODY_PARTS) + 1, studies, p=_falling(len(BODY_PARTS) + 1, 0.9))[
                    study
                ],
                (*BODY_PARTS, None),
            ),
            "study_date": pa.array(days[study].astype(np.int32), pa.int32()).cast(pa.date32()),
            "sex": _coded(
                chance.choice(4, studies, p=[0.53, 0.45, 0.01, 0.01])[study], ["M", "F", "O", None]
            ),
            "age": pa.array(np.clip(chance.normal(63, 18, studies), 0, 100).round()[study]),
            "tier": pa.array(_picked(chance, (1, 2, 3), (0.7, 0.25, 0.05), studies)[study]),
            "contrast": pa.array((chance.random(studies) < 0.35)[study]),
            "added_at": pa.array(days[study].astype(np.int32) + 1, pa.int32()).cast(pa.date32()),
        },
    )


def _table(
    chance: np.random.Generator,
    scanners: _Scanners,
    *,
    study: np.ndarray[Any, Any],
    model: np.ndarray[Any, Any],
    magnetic: np.ndarray[Any, Any],
    columns: dict[str, pa.Array],
) -> pa.RecordBatch:
    """Add what differs from series to series."""
    size = len(study)
    kernel = np.full(size, len(scanners.kernels))
    for number, own in enumerate(scanners.of_model):
        here = np.flatnonzero((model == number) & ~magnetic)
        kernel[here] = chance.choice(own, len(here), p=_falling(len(own), 1.1))
    thickness = np.where(
        magnetic,
        _picked(chance, (1.0, 3.0, 4.0, 5.0, 6.0, 7.0), (1, 1, 1, 1, 1, 1), size),
        _picked(
            chance,
            (0.5, 0.625, 1.0, 1.25, 2.0, 3.0, 5.0, 10.0),
            (0.06, 0.06, 0.2, 0.08, 0.08, 0.12, 0.36, 0.04),
            size,
        ),
    )
    thin = thickness <= 1.25
    normal = chance.normal(0, 1, size)
    slices = np.maximum(1, np.where(thin, 380 + 140 * normal, 70 + 35 * normal)).astype(np.int64)
    orientation = np.where(
        magnetic,
        chance.choice(4, size, p=[0.4, 0.2, 0.25, 0.15]),
        chance.choice(4, size, p=[0.8, 0.09, 0.08, 0.03]),
    )
    maker = scanners.maker_of[model]
    spelled = [name for names in MAKERS.values() for name in names]
    first = np.cumsum([0, *(len(names) for names in MAKERS.values())])[:-1]
    ways = np.array([len(names) for names in MAKERS.values()])
    spacing = chance.normal(0.72, 0.1, size).clip(0.2, 1.5).round(3)
    words = [chance.choice(len(part), size, p=_falling(len(part))) for part in WORDS]
    text = words[0]
    for part, picked in zip(WORDS[1:], words[1:], strict=True):
        text = text * len(part) + picked
    texts = [
        f"{a} {b} {c} {d}".strip()
        for a in WORDS[0]
        for b in WORDS[1]
        for c in WORDS[2]
        for d in WORDS[3]
    ]
    matrix = _picked(chance, (256, 320, 512, 1024), (0.05, 0.05, 0.88, 0.02), size)
    columns |= {
        "modality": _coded(magnetic.astype(int), ("CT", "MR")),
        "manufacturer": _coded(first[maker] + model % ways[maker], spelled),
        "vendor": _coded(maker, tuple(MAKERS)),
        "model": _coded(model, scanners.models),
        "kernel": _coded(kernel, [*scanners.kernels, None]),
        "description": _coded(text, texts),
        "rows": pa.array(matrix),
        "columns": pa.array(matrix),
        "slices": pa.array(slices),
        "volumes": pa.array(_picked(chance, (1, 2, 3), (0.97, 0.02, 0.01), size)),
        "usable_3d": pa.array((orientation == 0) & (slices >= 32)),
        "spacing_z": pa.array(thickness * _picked(chance, (0.5, 0.8, 1.0), (1, 1, 1), size)),
        "spacing_y": pa.array(spacing),
        "spacing_x": pa.array(spacing),
        "thickness": pa.array(thickness),
        "orientation": _coded(orientation, ("axial", "coronal", "sagittal", "oblique")),
        "kvp": pa.array(
            _picked(chance, (80.0, 100.0, 120.0, 140.0), (0.05, 0.25, 0.65, 0.05), size),
            mask=magnetic,
        ),
        "exposure": pa.array(chance.integers(20, 400, size).astype(float), mask=magnetic),
        "transfer_syntax": _coded(chance.choice(3, size, p=[0.7, 0.2, 0.1]), SYNTAXES),
        "flags": _flags(chance.choice(6, size, p=[0.94, 0.02, 0.02, 0.01, 0.009, 0.001])),
        "size": pa.array(slices * chance.integers(180_000, 240_000, size)),
    }
    return pa.RecordBatch.from_arrays(
        [columns[name].cast(schema_of([name]).field(0).type) for name in COLUMNS],
        schema=schema_of(list(COLUMNS)),
    )


def _coded(codes: np.ndarray[Any, Any], values: Any) -> pa.Array:
    """Return text by its number in ``values``; None is not known."""
    known = pa.array([value for value in values if value is not None], pa.large_string())
    gone = np.isin(codes, [n for n, value in enumerate(values) if value is None])
    return pa.DictionaryArray.from_arrays(
        pa.array(np.where(gone, 0, codes).astype(np.int32), mask=gone), known
    )


def _flags(codes: np.ndarray[Any, Any]) -> pa.Array:
    return pa.array(FLAGS, pa.list_(pa.string())).take(pa.array(codes))


def _uids(keys: np.ndarray[Any, Any]) -> pa.Array:
    keys = np.ascontiguousarray(keys)
    text, offsets = np.empty(len(keys) * UID_LENGTH, np.uint8), np.empty(len(keys) + 1, np.int64)
    load().facets_uid_text(keys.ctypes.data, len(keys), text.ctypes.data, offsets.ctypes.data)
    text = text[: offsets[-1]].copy()
    return pa.LargeStringArray.from_buffers(len(keys), pa.py_buffer(offsets), pa.py_buffer(text))
