"""Which machines stand in which hospital: vendors, models, kernels, and how they write images.

Model and kernel names are of the form that the makers use. **How the vendors are spread over
the ten facilities is made up**: it has the shape of what a federated study reports (all four
large makers, each facility with its own mix, one maker missing in most), not its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

FACILITIES = tuple(f"F{number:02d}" for number in range(1, 11))

SHARE: Mapping[str, int] = dict(zip(FACILITIES, (17, 15, 13, 12, 11, 10, 8, 6, 5, 3), strict=True))
"""Percent of all studies that come from a facility; made up."""

CT_SHARE: Mapping[str, Mapping[str, int]] = {
    "F01": {"CANON": 55, "SIEMENS": 35, "GE": 10},
    "F02": {"GE": 60, "CANON": 30, "PHILIPS": 10},
    "F03": {"SIEMENS": 70, "CANON": 20, "TOSHIBA": 10},
    "F04": {"CANON": 45, "TOSHIBA": 25, "PHILIPS": 30},
    "F05": {"GE": 45, "SIEMENS": 45, "FUJIFILM": 10},
    "F06": {"TOSHIBA": 50, "GE": 50},
    "F07": {"PHILIPS": 65, "CANON": 35},
    "F08": {"CANON": 80, "HITACHI": 20},
    "F09": {"SIEMENS": 50, "HITACHI": 30, "FUJIFILM": 20},
    "F10": {"HITACHI": 40, "TOSHIBA": 60},
}
"""Percent of a facility's CT studies by vendor; made up."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A reconstruction kernel.

    Attributes
    ----------
    name : str
        Convolution Kernel; several values are split by a backslash.
    use : str
        ``soft``, ``lung``, ``bone`` or ``head``.
    blur : float
        Standard deviation of the point spread, mm.
    boost : float
        How much edges are enhanced; 0 for none.
    noise : float
        Relative to a standard soft-tissue kernel.
    peak : float
        Where the noise power is highest, per mm.
    """

    name: str
    use: str
    blur: float
    boost: float
    noise: float
    peak: float


@dataclass(frozen=True, slots=True)
class Model:
    """A kind of CT scanner.

    Attributes
    ----------
    vendor : str
    manufacturer : str
        As the machine writes it.
    model, software : str
    years : tuple of int
        First and last year in which it is used here.
    kernels : tuple of Kernel
    signed : bool
        Whether values are stored signed.
    intercept : float
        Rescale Intercept.
    padding : int or None
        Stored value outside the field of view, where the maker writes one.
    first_at_head : bool
        Whether Instance Number 1 is the slice nearest to the head.
    """

    vendor: str
    manufacturer: str
    model: str
    software: str
    years: tuple[int, int]
    kernels: tuple[Kernel, ...]
    signed: bool
    intercept: float
    padding: int | None = None
    first_at_head: bool = True

    def kernel(self, use: str) -> Kernel:
        """Return the kernel for a use."""
        return next(kernel for kernel in self.kernels if kernel.use == use)


def _set(soft: str, lung: str, bone: str, head: str, quiet: float = 1.0) -> tuple[Kernel, ...]:
    """Return a vendor's kernels; iterative and learned ones have less noise, at lower peaks."""
    lower = quiet**0.35
    return (
        Kernel(soft, "soft", 0.62, 0.0, 1.0 * quiet, 0.24 * lower),
        Kernel(lung, "lung", 0.34, 0.55, 3.6 * quiet, 0.55 * lower),
        Kernel(bone, "bone", 0.36, 0.4, 3.0 * quiet, 0.5 * lower),
        Kernel(head, "head", 0.55, 0.05, 1.05 * quiet, 0.26 * lower),
    )


_CANON = ("CANON", "CANON MEDICAL SYSTEMS")
_TOSHIBA = ("TOSHIBA", "TOSHIBA")
_SIEMENS = ("SIEMENS", "SIEMENS")
_HEALTHINEERS = ("SIEMENS", "Siemens Healthineers")
_GE = ("GE", "GE MEDICAL SYSTEMS")
_PHILIPS = ("PHILIPS", "Philips")
_HITACHI = ("HITACHI", "Hitachi, Ltd.")
_FUJI = ("FUJIFILM", "FUJIFILM Healthcare Corporation")

MODELS: tuple[Model, ...] = (
    Model(
        *_CANON,
        "Aquilion ONE",
        "V8.90ER003",
        (2018, 2026),
        _set("FC08", "FC51", "FC30", "FC26"),
        signed=True,
        intercept=0.0,
    ),
    Model(
        *_CANON,
        "Aquilion ONE",
        "V10.10ER001",
        (2019, 2026),
        _set("AiCE_BODY", "AiCE_LUNG", "FC30", "AiCE_BRAIN", 0.5),
        signed=True,
        intercept=0.0,
    ),
    Model(
        *_CANON,
        "Aquilion Precision",
        "V8.98ER002",
        (2019, 2026),
        _set("FC13", "FC52", "FC81", "FC21"),
        signed=True,
        intercept=0.0,
    ),
    Model(
        *_CANON,
        "Aquilion Prime SP",
        "V8.93ER001",
        (2018, 2026),
        _set("FIRST_BODY", "FIRST_LUNG", "FC35", "FC68", 0.6),
        signed=True,
        intercept=0.0,
    ),
    Model(
        *_TOSHIBA,
        "Aquilion ONE",
        "V4.74ER004",
        (2012, 2022),
        _set("FC11", "FC50", "FC30", "FC64"),
        signed=True,
        intercept=0.0,
    ),
    Model(
        *_TOSHIBA,
        "Aquilion/CXL",
        "V3.35ER009",
        (2010, 2020),
        _set("FC03", "FC56", "FC31", "FC23"),
        signed=True,
        intercept=0.0,
    ),
    Model(
        *_SIEMENS,
        "SOMATOM Definition AS+",
        "syngo CT 2012B",
        (2011, 2022),
        _set("B30f", "B70f", "B60s", "H31s"),
        signed=False,
        intercept=-1024.0,
    ),
    Model(
        *_SIEMENS,
        "SOMATOM Definition Flash",
        "syngo CT VA48A",
        (2013, 2024),
        _set("I31f\\3", "I70f\\2", "B60f", "J37s\\2", 0.65),
        signed=False,
        intercept=-1024.0,
    ),
    Model(
        *_SIEMENS,
        "SOMATOM Force",
        "syngo CT VB10A",
        (2017, 2026),
        _set("Br40d\\3", "Bl57d\\3", "Br59d\\3", "Hr40f\\3", 0.7),
        signed=False,
        intercept=-8192.0,
    ),
    Model(
        *_HEALTHINEERS,
        "NAEOTOM Alpha",
        "syngo CT VA50A",
        (2023, 2026),
        _set("Qr40f\\3", "Bl64f\\3", "Br68f\\2", "Hr40f\\3", 0.55),
        signed=False,
        intercept=-8192.0,
    ),
    Model(
        *_GE,
        "LightSpeed VCT",
        "07MW18.4",
        (2010, 2021),
        _set("STANDARD", "LUNG", "BONE", "SOFT"),
        signed=True,
        intercept=-1024.0,
        padding=-2000,
    ),
    Model(
        *_GE,
        "Discovery CT750 HD",
        "gmp_hde.90",
        (2013, 2024),
        _set("STANDARD", "LUNG", "BONEPLUS", "SOFT", 0.8),
        signed=True,
        intercept=-1024.0,
        padding=-2000,
    ),
    Model(
        *_GE,
        "Revolution CT",
        "revo_ct_22bc.50",
        (2017, 2026),
        _set("STANDARD", "CHST", "BONEPLUS", "STND", 0.6),
        signed=True,
        intercept=-1024.0,
        padding=-2000,
        first_at_head=True,
    ),
    Model(
        *_PHILIPS,
        "Brilliance 64",
        "3.6.9",
        (2010, 2021),
        _set("B", "L", "D", "UB"),
        signed=False,
        intercept=-1024.0,
        first_at_head=False,
    ),
    Model(
        *_PHILIPS,
        "iCT 256",
        "4.1.6",
        (2013, 2024),
        _set("YA", "YB", "YD", "UA", 0.75),
        signed=False,
        intercept=-1024.0,
        first_at_head=False,
    ),
    Model(
        *_PHILIPS,
        "IQon - Spectral CT",
        "4.7.7",
        (2018, 2026),
        _set("A", "L", "YC", "UB", 0.65),
        signed=False,
        intercept=-1024.0,
        first_at_head=False,
    ),
    Model(
        *_HITACHI,
        "SCENARIA",
        "V1.70",
        (2012, 2022),
        _set("32", "56", "43", "H22"),
        signed=True,
        intercept=0.0,
    ),
    Model(
        *_HITACHI,
        "Supria",
        "V3.10",
        (2014, 2024),
        _set("22", "53", "41", "H21"),
        signed=True,
        intercept=0.0,
    ),
    Model(
        *_FUJI,
        "SCENARIA View",
        "V3.22",
        (2021, 2026),
        _set("31", "54", "42", "H23", 0.6),
        signed=True,
        intercept=0.0,
    ),
)
"""CT scanners. FUJIFILM bought Hitachi's in 2021, Canon Toshiba's in 2018."""

MR_MODELS: tuple[tuple[str, str, str, float], ...] = (
    ("SIEMENS", "MAGNETOM Skyra", "syngo MR E11", 3.0),
    ("GE MEDICAL SYSTEMS", "SIGNA Architect", "29\\LX\\MR Software release:DV29.1", 3.0),
    ("Philips", "Ingenia", "5.6.1\\5.6.1.0", 1.5),
    ("CANON_MEC", "Vantage Titan 3T", "V4.5", 3.0),
)
"""Manufacturer, model, software and field strength in tesla."""

PET_MODELS: tuple[tuple[str, str, str], ...] = (
    ("SIEMENS", "Biograph64_Vision 600", "VG76B"),
    ("GE MEDICAL SYSTEMS", "Discovery MI", "pet_mi.10"),
    ("Philips", "Vereos PET/CT", "2.0.0"),
)
"""Manufacturer, model and software."""


def models_of(vendor: str, year: int) -> tuple[Model, ...]:
    """Return a vendor's scanners; those of that year, or all where there was none."""
    own = tuple(model for model in MODELS if model.vendor == vendor)
    return tuple(model for model in own if model.years[0] <= year <= model.years[1]) or own
