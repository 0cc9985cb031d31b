"""What tissues look like: HU by contrast phase and tube voltage, MR signal, uptake in PET.

The means of neighbouring organs lie closer together than people differ and than noise and
texture spread, so that no threshold tells them apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from random import Random

PHASES = ("plain", "arterial", "portal", "delayed")
"""Phases of contrast, in the order in which they are scanned."""


@dataclass(frozen=True, slots=True)
class Tissue:
    """One tissue.

    Attributes
    ----------
    hu : float
        Without contrast.
    spread : float
        Standard deviation of that between people.
    enhancement : tuple of float
        HU added in the arterial, portal and delayed phase at 120 kVp.
    texture : float
        Standard deviation within the tissue, HU.
    kind : str
        ``soft``, ``lung`` (vessels in air) or ``bowel`` (loops in fat).
    t1, t2, dwi : float
        MR signal, T1- and T2-weighted and diffusion-weighted without diffusion gradient.
    adc : float
        Apparent diffusion coefficient, 1e-3 mm2/s.
    suv : float
        Uptake of FDG.
    """

    hu: float
    spread: float = 0.0
    enhancement: tuple[float, float, float] = (0.0, 0.0, 0.0)
    texture: float = 0.0
    kind: str = "soft"
    t1: float = 0.0
    t2: float = 0.0
    dwi: float = 0.0
    adc: float = 0.8
    suv: float = 0.0


TISSUES: Mapping[str, Tissue] = {
    "air": Tissue(-1000),
    "fat": Tissue(-102, 5, texture=7, t1=900, t2=600, dwi=60, adc=0.1, suv=0.3),
    "visceral": Tissue(-98, 6, (1, 2, 2), 9, "bowel", suv=0.7),
    "muscle": Tissue(53, 5, (6, 14, 16), 6, t1=380, t2=210, dwi=150, adc=1.4, suv=0.7),
    "bone": Tissue(560, 80, texture=60, t1=40, t2=30, dwi=10, suv=0.6),
    "marrow": Tissue(190, 40, (4, 10, 12), 40, t1=500, t2=260, dwi=40, suv=1.0),
    "rib": Tissue(330, 60, (3, 8, 8), 60, suv=0.8),
    "vertebra": Tissue(420, 60, (4, 8, 8), 40, suv=0.9),
    "vertebra_core": Tissue(165, 45, (6, 14, 14), 30, suv=1.6),
    "disc": Tissue(82, 10, (1, 2, 3), 6, suv=0.7),
    "arch": Tissue(260, 50, (3, 6, 6), 90, suv=0.8),
    "diploe": Tissue(620, 60, texture=70, t1=300, t2=150, dwi=20),
    "csf": Tissue(7, 3, texture=2, t1=130, t2=1000, dwi=900, adc=3.0, suv=0.4),
    "cord": Tissue(36, 2, texture=2, suv=1.8),
    "grey": Tissue(38, 1.5, (3, 4, 4), 2, t1=420, t2=460, dwi=520, adc=0.85, suv=9),
    "white": Tissue(29, 1.5, (1, 2, 2), 2, t1=560, t2=350, dwi=470, adc=0.75, suv=4),
    "eye": Tissue(12, 4, texture=2, t1=150, t2=950, dwi=700, adc=2.8, suv=0.6),
    "aorta": Tissue(42, 4, (285, 115, 75), 3, suv=1.7),
    "vein": Tissue(41, 4, (55, 118, 80), 4, suv=1.7),
    "blood": Tissue(42, 4, (235, 112, 74), 4, suv=1.8),
    "myocardium": Tissue(48, 4, (65, 62, 45), 5, suv=3.0),
    "liver": Tissue(58, 9, (14, 52, 40), 6, suv=2.2),
    "spleen": Tissue(50, 5, (82, 72, 48), 6, suv=1.9),
    "cortex": Tissue(35, 4, (145, 135, 105), 5, suv=2.6),
    "medulla": Tissue(33, 4, (55, 120, 112), 6, suv=4.5),
    "pancreas": Tissue(40, 7, (68, 55, 40), 9, suv=1.6),
    "stomach": Tissue(30, 8, (10, 18, 16), 12, suv=2.0),
    "bile": Tissue(9, 4, texture=2, suv=0.8),
    "urine": Tissue(6, 3, (0, 0, 35), 2, suv=22),
    "stool": Tissue(35, 12, (2, 4, 4), 40, suv=1.2),
    "lung": Tissue(-858, 22, (4, 6, 5), 12, "lung", suv=0.5),
    "nodule": Tissue(34, 8, (28, 38, 42), 6, suv=6.5),
    "metastasis": Tissue(41, 6, (18, 30, 34), 7, suv=7.5),
    "carcinoma": Tissue(46, 6, (78, 26, 12), 8, suv=3.6),
    "cyst": Tissue(6, 3, texture=2, suv=0.7),
    "bleeding": Tissue(66, 4, texture=5, t1=500, t2=300, dwi=300, adc=0.6),
    "infarct": Tissue(23, 2, texture=3, t1=330, t2=640, dwi=760, adc=0.45),
}
"""Tissues by name. The values are typical of textbooks and made up within their range."""


def person_shift(rng: Random) -> dict[str, float]:
    """Draw by how many HU each tissue of one person differs from the table."""
    return {name: max(-2.0, min(2.0, rng.gauss(0, 1))) * t.spread for name, t in TISSUES.items()}


def hounsfield(shift: Mapping[str, float], phase: str, kvp: float) -> dict[str, float]:
    """Return the mean HU of each tissue.

    Parameters
    ----------
    shift : mapping
        From :func:`person_shift`.
    phase : str
        One of :data:`PHASES`.
    kvp : float
        Iodine is brighter at a lower voltage: as its power of -1.3, an approximation.
    """
    place = PHASES.index(phase)
    iodine = (120 / kvp) ** 1.3
    return {
        name: tissue.hu + shift[name] + (tissue.enhancement[place - 1] * iodine if place else 0.0)
        for name, tissue in TISSUES.items()
    }
