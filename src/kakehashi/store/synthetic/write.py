"""Draw a planned study and write it as DICOM files, with what is true of it beside them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kakehashi.errors import StoreError
from kakehashi.store.layout import PART
from kakehashi.store.synthetic import images
from kakehashi.store.synthetic.annotations import contours, segmentation
from kakehashi.store.synthetic.chance import generator
from kakehashi.store.synthetic.headers import save
from kakehashi.store.synthetic.plan import VERSION, body_of
from kakehashi.store.synthetic.render import Renderer
from kakehashi.store.synthetic.reports import structured, text_of
from kakehashi.store.synthetic.scan import (
    Grid,
    Noise,
    add_metal,
    add_table,
    blurred,
    ct_slices,
    draw_thick,
    grid_of,
    noise_hu,
)
from kakehashi.store.synthetic.screens import dose_report, localizer
from kakehashi.store.synthetic.tissue import TISSUES, hounsfield
from kakehashi.store.synthetic.truth import identifiers, lesion_truth, organ_truth, series_truth

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from pydicom import Dataset

    from kakehashi.store.synthetic.plan import Plan
    from kakehashi.store.synthetic.protocols import SeriesPlan
    from kakehashi.store.synthetic.render import Floats, Labels, Planes

TRUTH = "truth.json"
"""Name of the file that says what is true of a study."""

_CHUNK = 8
_IMPLICIT = frozenset({"F06", "F10"})
_RLE = frozenset({"F05"})
_MR_NOISE = 14.0
_PET_SIZE = 168


def write_study(plan: Plan, folder: Path) -> dict[str, Any]:
    """Draw and write one study.

    Parameters
    ----------
    plan : Plan
        From :func:`plan_studies`.
    folder : Path
        Made by this call: one folder a series (``S002/IM0001.dcm``), the report as text under
        the name of the Study Instance UID, and ``truth.json``. It appears when it is complete.

    Returns
    -------
    dict
        What is in ``truth.json``; docs/data-manager.md lists the fields.

    Raises
    ------
    StoreError
        The folder is there already, or cannot be written.
    """
    if folder.exists():
        raise StoreError(f"{folder} is there already; remove it, or choose another folder")
    part = folder.with_name(folder.name + PART)
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        truth = _Writer(plan, part).write()
        (part / f"{plan.study_uid}.txt").write_text(text_of(plan), encoding="utf-8")
        text = json.dumps(truth, ensure_ascii=False, indent=1)
        (part / TRUTH).write_text(text + "\n", encoding="utf-8")
        part.rename(folder)
    except OSError as error:
        raise StoreError(f"{error.filename}: {error.strerror}; {folder} is not written") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return truth


@dataclass
class _Drawn:
    """What is known of a series once its slices are written.

    Attributes
    ----------
    grid : Grid or None
    files : int
    source : list of (SOP class, SOP instance)
        Of each slice of the first volume.
    counts : ndarray, shape (256,)
        Voxels of each label.
    cut : set of int
        Labels that touch the border of the volume.
    sums : dict
        Phase to the sum of values without noise of each label.
    labels : ndarray or None
        Kept where a SEG is made of them.
    noise : float
    """

    grid: Grid | None = None
    files: int = 0
    source: list[tuple[str, str]] = field(default_factory=list)
    counts: NDArray[np.float64] = field(default_factory=lambda: np.zeros(256))
    cut: set[int] = field(default_factory=set)
    sums: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    labels: Labels | None = None
    noise: float = 0.0


class _Writer:
    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder
        self._body = body_of(plan)
        self._renderer = Renderer(self._body)
        self._drawn = {series.number: _Drawn() for series in plan.series}
        self._labelled = {series.source for series in plan.series if series.kind == "seg"}
        self._back = self._renderer.back()

    def write(self) -> dict[str, Any]:
        plan, body = self._plan, self._body
        for group in self._groups():
            self._ct(group)
        for series in plan.series:
            if series.kind == "mr":
                self._mr(series)
            elif series.kind == "pet":
                self._pet(series)
        for series in plan.series:
            self._other(series)
        names = dict(zip(body.anatomy.labels.values(), body.anatomy.labels, strict=True))
        return {
            "version": VERSION,
            "seed": plan.seed,
            "index": plan.index,
            "size": plan.size,
            "synthetic": True,
            "facility": plan.facility,
            "protocol": plan.protocol,
            "study_uid": plan.study_uid,
            "study_date": f"{plan.moment:%Y-%m-%d}",
            "person": plan.person.number,
            "age": plan.age,
            "sex": plan.person.sex,
            "vendor": plan.machine.ct.vendor if plan.machine.ct else None,
            "metal": [(np.array(rod.centre) + plan.offset).round(3).tolist() for rod in body.metal],
            "organs": organ_truth(body),
            "lesions": lesion_truth(body, plan.offset),
            "series": [
                series_truth(plan, series, self._drawn[series.number], {**names, **self._lesions()})
                for series in plan.series
            ],
            "identifiers": identifiers(plan),
            "report": f"{plan.study_uid}.txt",
        }

    def _lesions(self) -> dict[int, str]:
        first = len(self._body.anatomy.labels) + 1
        return {first + place: f"lesion_{place + 1}" for place in range(len(self._body.lesions))}

    def _groups(self) -> list[list[SeriesPlan]]:
        """Put CT series together that differ in the kernel only: they are drawn once."""
        found: dict[tuple[object, ...], list[SeriesPlan]] = {}
        for series in self._plan.series:
            if series.kind in {"ct", "reformat"}:
                key = (
                    series.kind,
                    series.phases,
                    series.thickness,
                    series.interval,
                    series.tilt_deg,
                    series.kvp,
                )
                found.setdefault(key, []).append(series)
        return list(found.values())

    def _start(self, series: SeriesPlan, size: int) -> Grid:
        plan = self._plan
        grid = grid_of(series, size, self._body.anatomy.scale, plan.offset)
        drawn = self._drawn[series.number]
        drawn.grid = grid
        drawn.source = [("", "")] * grid.slices
        if series.number in self._labelled:
            drawn.labels = np.zeros((grid.slices, grid.rows, grid.columns), np.uint8)
        (self._folder / f"S{series.number:03d}").mkdir()
        return grid

    def _chunks(self, grid: Grid) -> Iterator[tuple[int, int, Planes]]:
        for first in range(0, grid.slices, _CHUNK):
            count = min(_CHUNK, grid.slices - first)
            yield first, count, grid.planes(first, count, self._plan.offset)

    def _ct(self, group: list[SeriesPlan]) -> None:
        plan, body = self._plan, self._body
        bases, noises = [], []
        for series in group:
            grid = self._start(series, plan.size)
            assert series.kernel is not None  # noqa: S101 # CT has a kernel
            sigma = noise_hu(series, plan.person.weight_kg)
            self._drawn[series.number].noise = sigma
            bases.append(images.ct_base(plan, series, grid))
            key = f"{plan.key}/noise/{series.number}"
            shape = (grid.rows, grid.columns)
            noises.append(Noise(key, shape, grid.spacing, series.kernel.peak))
        first_series = group[0]
        for volume, phase in enumerate(first_series.phases):
            values = hounsfield(body.shift, phase, first_series.kvp)
            for first, count, planes in self._chunks(grid):
                where = (first, count, plan.offset)
                clean = draw_thick(self._renderer, grid, first_series, where, values)
                add_table(clean, planes, self._back)
                add_metal(clean, planes, body.metal, plan.key)
                labels = self._renderer.labels(planes)
                for series, base, noise in zip(group, bases, noises, strict=True):
                    assert series.kernel is not None  # noqa: S101 # CT has a kernel
                    self._count(series, volume, first, labels, clean)
                    made = ct_slices(
                        clean,
                        planes,
                        series.kernel,
                        noise,
                        sigma=self._drawn[series.number].noise,
                        spacing=grid.spacing,
                        first=volume * grid.slices + first,
                    )
                    for k in range(count):
                        images.ct_slice(base, plan, series, made[k], volume)
                        self._slice(base, series, grid, volume, first + k)

    def _mr(self, series: SeriesPlan) -> None:
        plan = self._plan
        grid = self._start(series, min(plan.size, 256))
        base = images.mr_base(plan, series, grid)
        for volume, phase in enumerate(series.phases):
            values = {name: _mr_signal(name, phase) for name in TISSUES}
            for first, count, planes in self._chunks(grid):
                where = (first, count, plan.offset)
                clean = draw_thick(self._renderer, grid, series, where, values, texture=False)
                self._count(series, volume, first, self._renderer.labels(planes), clean)
                # A coil nearer to the front left, and noise as in a magnitude image.
                gain = 1 + 0.0008 * (planes.x[None, None, :] - planes.y[..., None])
                seen = blurred(clean, grid.spacing, 0.7) * gain.astype(np.float32)
                draw = generator(plan.key, "mr", series.number, volume, first)
                one, two = draw.standard_normal((2, *seen.shape), dtype=np.float32) * _MR_NOISE
                magnitude = np.hypot(seen + one, two)
                for k in range(count):
                    images.mr_slice(base, plan, series, magnitude[k], volume)
                    self._slice(base, series, grid, volume, first + k)

    def _pet(self, series: SeriesPlan) -> None:
        plan = self._plan
        grid = self._start(series, min(plan.size, _PET_SIZE))
        base = images.pet_base(plan, series, grid)
        factor = images.suv_factor(plan)
        values = {name: tissue.suv for name, tissue in TISSUES.items()}
        for first, count, planes in self._chunks(grid):
            where = (first, count, plan.offset)
            clean = draw_thick(self._renderer, grid, series, where, values, texture=False)
            self._count(series, 0, first, self._renderer.labels(planes), clean)
            seen = blurred(clean, grid.spacing, 2.6)
            draw = generator(plan.key, "pet", first)
            noise = blurred(draw.standard_normal(seen.shape, dtype=np.float32), grid.spacing, 2.0)
            seen = seen + noise * np.float32(0.3) * np.sqrt(seen + np.float32(0.02))
            for k in range(count):
                self._name(base, series, grid, 0, first + k)
                images.pet_slice(base, seen[k], factor)
                self._slice(base, series, grid, 0, first + k)

    def _count(
        self, series: SeriesPlan, volume: int, first: int, labels: Labels, clean: Floats
    ) -> None:
        drawn = self._drawn[series.number]
        assert drawn.grid is not None  # noqa: S101 # set when the series was started
        sums = drawn.sums.setdefault(series.phases[volume], np.zeros(256))
        sums += np.bincount(labels.ravel(), clean.ravel(), 256)
        if volume:
            return
        drawn.counts += np.bincount(labels.ravel(), minlength=256)
        border = [labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]]
        if first == 0:
            border.append(labels[0])
        if first + len(labels) == drawn.grid.slices:
            border.append(labels[-1])
        for part in border:
            drawn.cut.update(np.unique(part).tolist())
        if drawn.labels is not None:
            drawn.labels[first : first + len(labels)] = labels

    def _name(self, base: Dataset, series: SeriesPlan, grid: Grid, volume: int, k: int) -> None:
        images.place(base, self._plan, series, grid, (volume, k))

    def _slice(self, base: Dataset, series: SeriesPlan, grid: Grid, volume: int, k: int) -> None:
        self._name(base, series, grid, volume, k)
        drawn = self._drawn[series.number]
        if volume == 0:
            drawn.source[k] = (str(base.SOPClassUID), str(base.SOPInstanceUID))
        self._save(base, series)

    def _save(self, found: Dataset, series: SeriesPlan) -> None:
        folder = self._folder / f"S{series.number:03d}"
        folder.mkdir(exist_ok=True)
        facility = self._plan.facility
        save(
            found,
            folder / f"IM{int(found.InstanceNumber):04d}.dcm",
            implicit=facility in _IMPLICIT,
            compress=series.kind == "mr" and facility in _RLE,
        )
        self._drawn[series.number].files += 1

    def _other(self, series: SeriesPlan) -> None:
        plan, body = self._plan, self._body
        source = self._drawn.get(series.source, _Drawn())
        if series.kind == "dose":
            self._save(dose_report(plan, series), series)
        elif series.kind == "sr":
            self._save(structured(plan, series), series)
        elif series.kind == "localizer":
            values = hounsfield(body.shift, "plain", 120)
            found, grid = localizer(plan, series, body, self._renderer, values)
            self._drawn[series.number].grid = grid
            self._save(found, series)
        elif series.kind == "seg" and source.grid and source.labels is not None:
            labels = body.anatomy.labels
            names = dict(zip(labels.values(), labels, strict=True)) | self._lesions()
            found = segmentation(
                plan, series, source.labels, source.grid, names=names, source=source.source
            )
            self._save(found, series)
        elif series.kind == "rtstruct" and source.grid:
            self._save(contours(plan, series, body, source.grid, source.source), series)


def _mr_signal(name: str, phase: str) -> float:
    tissue = TISSUES[name]
    if phase.startswith("b"):
        return tissue.dwi * float(np.exp(-float(phase[1:]) * tissue.adc / 1000))
    return tissue.t1 if phase == "t1" else tissue.t2
