"""What scanners send besides volumes: a localizer, and a dose report with names in its pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydicom import Dataset, uid

from kakehashi.store.synthetic.headers import common, image_pixels
from kakehashi.store.synthetic.images import ct_base, ct_slice
from kakehashi.store.synthetic.render import Planes
from kakehashi.store.synthetic.scan import Grid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from kakehashi.store.synthetic.plan import Plan
    from kakehashi.store.synthetic.protocols import SeriesPlan
    from kakehashi.store.synthetic.render import Body, Renderer

# Our own letters, five dots wide and seven high; each number is one row.
_FONT = {
    "A": (14, 17, 17, 31, 17, 17, 17), "B": (30, 17, 17, 30, 17, 17, 30),
    "C": (14, 17, 16, 16, 16, 17, 14), "D": (30, 17, 17, 17, 17, 17, 30),
    "E": (31, 16, 16, 30, 16, 16, 31), "F": (31, 16, 16, 30, 16, 16, 16),
    "G": (14, 17, 16, 23, 17, 17, 14), "H": (17, 17, 17, 31, 17, 17, 17),
    "I": (14, 4, 4, 4, 4, 4, 14), "J": (7, 2, 2, 2, 2, 18, 12),
    "K": (17, 18, 20, 24, 20, 18, 17), "L": (16, 16, 16, 16, 16, 16, 31),
    "M": (17, 27, 21, 21, 17, 17, 17), "N": (17, 25, 21, 19, 17, 17, 17),
    "O": (14, 17, 17, 17, 17, 17, 14), "P": (30, 17, 17, 30, 16, 16, 16),
    "Q": (14, 17, 17, 17, 21, 18, 13), "R": (30, 17, 17, 30, 20, 18, 17),
    "S": (15, 16, 16, 14, 1, 1, 30), "T": (31, 4, 4, 4, 4, 4, 4),
    "U": (17, 17, 17, 17, 17, 17, 14), "V": (17, 17, 17, 17, 17, 10, 4),
    "W": (17, 17, 17, 21, 21, 27, 17), "X": (17, 17, 10, 4, 10, 17, 17),
    "Y": (17, 17, 10, 4, 4, 4, 4), "Z": (31, 1, 2, 4, 8, 16, 31),
    "0": (14, 17, 19, 21, 25, 17, 14), "1": (4, 12, 4, 4, 4, 4, 14),
    "2": (14, 17, 1, 6, 8, 16, 31), "3": (30, 1, 1, 14, 1, 1, 30),
    "4": (2, 6, 10, 18, 31, 2, 2), "5": (31, 16, 30, 1, 1, 17, 14),
    "6": (14, 16, 30, 17, 17, 17, 14), "7": (31, 1, 2, 4, 8, 8, 8),
    "8": (14, 17, 17, 14, 17, 17, 14), "9": (14, 17, 17, 15, 1, 1, 14),
    " ": (0, 0, 0, 0, 0, 0, 0), ":": (0, 4, 0, 0, 4, 0, 0), "-": (0, 0, 0, 14, 0, 0, 0),
    ".": (0, 0, 0, 0, 0, 4, 4), "/": (1, 1, 2, 4, 8, 16, 16), "*": (0, 21, 14, 31, 14, 21, 0),
}  # fmt: skip
_SCREEN = 512


def draw_text(text: str, scale: int = 2) -> NDArray[np.uint8]:
    """Draw a line of text.

    Parameters
    ----------
    text : str
        Capital letters, digits and a few signs.
    scale : int
        Pixels a dot.

    Returns
    -------
    ndarray of uint8, shape (7 * scale, 6 * scale * letters)
        255 where there is ink.
    """
    rows = ["".join(f"{_FONT[letter][row]:05b}0" for letter in text) for row in range(7)]
    dots = np.array([[letter == "1" for letter in row] for row in rows], np.uint8) * 255
    return np.kron(dots, np.ones((scale, scale), np.uint8))


def dose_report(plan: Plan, series: SeriesPlan) -> Dataset:
    """Return the dose report: a secondary capture with name and number in its pixels."""
    found = common(plan, series, uid.SecondaryCaptureImageStorage, plan.machine)
    found.SOPInstanceUID = plan.uid("dose")
    found.InstanceNumber = 1
    found.ImageType = ["DERIVED", "SECONDARY", "SCREEN SAVE"]
    found.BodyPartExamined = series.body_part
    found.ConversionType = "WSD"
    found.BurnedInAnnotation = "YES"
    found.ContentDate, found.ContentTime = found.SeriesDate, found.SeriesTime
    found.PatientOrientation = ""
    scans = [item for item in plan.series if item.kind == "ct"]
    lines = [
        "DOSE REPORT   ***SYNTHETIC***",
        f"NAME: {' '.join(plan.person.name.romaji)}",
        f"ID: {plan.patient_id}",
        f"BIRTH: {plan.person.birth:%Y-%m-%d}  SEX: {plan.person.sex}",
        f"DATE: {plan.moment:%Y-%m-%d}  ACC: {plan.accession}",
        "",
        *(
            f"SER {scan.number}  {scan.kvp:.0f} KV  {scan.mas:.0f} MAS  CTDI {scan.mas * 0.068:.2f}"
            for scan in scans
        ),
    ]
    screen = np.zeros((_SCREEN, _SCREEN), np.uint8)
    for row, line in enumerate(lines):
        ink = draw_text(line)[:, : _SCREEN - 24]
        top = 20 + row * 24
        screen[top : top + ink.shape[0], 12 : 12 + ink.shape[1]] = ink
    image_pixels(found, _SCREEN, _SCREEN, stored=8, signed=False)
    found.PixelData = screen.tobytes()
    return found


def localizer(
    plan: Plan, series: SeriesPlan, body: Body, renderer: Renderer, values: Mapping[str, float]
) -> tuple[Dataset, Grid]:
    """Return the localizer: the body seen from in front, as the sum along y.

    Returns
    -------
    dataset : Dataset
    grid : Grid
        Of its one plane.
    """
    low, high = series.heights
    low, high = (height * body.anatomy.scale[2] + plan.offset[2] for height in (low, high))
    spacing = 4.0 if plan.size == 128 else 2.0
    columns = round(series.fov_mm / spacing)
    rows = round((high - low) / spacing)
    grid = Grid(
        (round(plan.offset[0] - (columns - 1) / 2 * spacing, 6), plan.offset[1], round(high, 6)),
        (0.0, 0.0, -1.0),
        (0.0, 1.0, 0.0),
        spacing,
        1,
        rows,
        columns,
    )
    depth = np.arange(-150, 150, 8.0)
    first = grid.planes(0, 1, plan.offset)
    planes = Planes(
        first.x,
        np.broadcast_to(depth[:, None], (len(depth), rows)),
        np.broadcast_to(first.z, (len(depth), rows)),
    )
    through = (renderer.draw(planes, values, texture=False) + 1000).clip(0).sum(axis=0) * 8.0
    # As a scanner shows it: the logarithm of what passes is the attenuation, to some HU.
    seen = np.clip(through / 250 - 1000, -1024, 3071)
    base = ct_base(plan, series, grid)
    base.SOPInstanceUID = plan.uid("localizer")
    base.InstanceNumber = 1
    base.ImagePositionPatient = list(grid.position(0))
    base.SliceLocation = plan.offset[1]
    ct_slice(base, plan, series, np.rint(seen).astype(np.int16), 0)
    return base, grid
