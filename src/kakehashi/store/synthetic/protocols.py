"""Which series an examination has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from random import Random

    from kakehashi.store.synthetic.scanners import Kernel, Model


@dataclass(frozen=True, slots=True)
class Protocol:
    """A kind of examination.

    Attributes
    ----------
    share : float
        Percent of all examinations; made up.
    body : str
        ``torso`` or ``head``.
    body_part : str
        Body Part Examined (PS3.16 Annex L).
    heights : tuple of float
        Lowest and highest slice, reference mm.
    english, japanese : str
        Study Description.
    """

    share: float
    body: str
    body_part: str
    heights: tuple[float, float]
    english: str
    japanese: str


PROTOCOLS: Mapping[str, Protocol] = {
    "chest": Protocol(32, "torso", "CHEST", (-95, 215), "Chest CT", "胸部単純CT"),
    "trunk": Protocol(
        20, "torso", "CHESTABDPELVIS", (-445, 215), "Chest-Pelvis CT CE", "胸腹部骨盤造影CT"
    ),
    "abdomen": Protocol(
        12, "torso", "ABDOMEN", (-235, 30), "Dynamic liver CT", "腹部ダイナミックCT"
    ),
    "two-phase": Protocol(5, "torso", "LIVER", (-160, 30), "Liver CT 2 phases", "肝二相造影CT"),
    "head": Protocol(14, "head", "HEAD", (-92, 102), "Head CT", "頭部単純CT"),
    "brain-mr": Protocol(13, "head", "BRAIN", (-86, 98), "Brain MRI", "頭部MRI"),
    "pet-ct": Protocol(4, "torso", "CHESTABDPELVIS", (-445, 215), "FDG PET/CT", "FDG PET/CT検査"),
}
"""Kinds of examination."""


@dataclass(frozen=True, slots=True)
class SeriesPlan:
    """One series.

    Attributes
    ----------
    number : int
        Series Number.
    kind : str
        ``ct``, ``reformat``, ``localizer``, ``dose``, ``mr``, ``pet``, ``seg``, ``rtstruct``,
        ``sr``.
    modality, description, body_part : str
    heights : tuple of float
        Lowest and highest slice, reference mm.
    phases : tuple of str
        Contrast phases, one volume each; MR: weightings or b-values, one volume each.
    kernel : Kernel or None
    kvp, mas : float
    thickness, interval : float
        mm
    tilt_deg : float
        Rotation of the planes about x; positive raises their back edge.
    fov_mm : float
    source : int
        Series Number of what it was made from; 0 for none.
    """

    number: int
    kind: str
    modality: str
    description: str
    body_part: str
    heights: tuple[float, float] = (0.0, 0.0)
    phases: tuple[str, ...] = ()
    kernel: Kernel | None = None
    kvp: float = 0.0
    mas: float = 0.0
    thickness: float = 0.0
    interval: float = 0.0
    tilt_deg: float = 0.0
    fov_mm: float = 0.0
    source: int = 0

    @property
    def packable(self) -> bool:
        """Whether the store can make grids of it."""
        return self.kind in {"ct", "reformat", "mr", "pet"}


@dataclass(frozen=True, slots=True)
class Site:
    """What the series depend on besides the protocol.

    Attributes
    ----------
    ct : Model or None
    japanese : bool
        Whether descriptions are in Japanese.
    adult : bool
    weight_kg : float
    size : int
        Rows and columns.
    lesion : bool
    """

    ct: Model | None
    japanese: bool
    adult: bool
    weight_kg: float
    size: int
    lesion: bool


_PHASES = {
    "plain": ("Plain", "単純"),
    "arterial": ("Arterial", "動脈相"),
    "portal": ("Portal", "門脈相"),
    "delayed": ("Delayed", "平衡相"),
    "both": ("Arterial+Portal", "動脈相・門脈相"),
}


class _Builder:
    """Adds series in the order of their numbers."""

    def __init__(self, rng: Random, protocol: Protocol, site: Site) -> None:
        self._rng = rng
        self._protocol = protocol
        self._site = site
        self.series: list[SeriesPlan] = []
        self.kvp = rng.choice((120.0, 120.0, 120.0, 100.0, 80.0 if not site.adult else 120.0))
        heavy = min(2.2, max(0.35, site.weight_kg / 62))
        self.mas = round(rng.uniform(70, 160) * heavy)
        widest = 330 + min(150.0, max(0.0, site.weight_kg - 40) * 2.2)
        self.fov = 235.0 if protocol.body == "head" else float(round(min(500.0, widest)))
        # Small images are for tests and demos: thin slices stay thin, but lie further apart.
        self.thin = {512: 1.0, 256: 2.0, 128: 4.0}[site.size]

    def text(self, phase: str, thickness: float, kernel: Kernel) -> str:
        phase_name = _PHASES[phase][self._site.japanese]
        part = self._protocol.body_part if not self._site.japanese else self._protocol.japanese
        return f"{part} {phase_name} {thickness:g}mm {kernel.name.split(chr(92))[0]}"

    def add(self, number: int, kind: str, modality: str, text: str, **more: object) -> SeriesPlan:
        plan = SeriesPlan(
            number,
            kind,
            modality,
            text,
            self._protocol.body_part,
            **more,  # type: ignore[arg-type]
        )
        self.series.append(plan)
        return plan

    def axial(
        self,
        number: int,
        use: str,
        thickness: float,
        *,
        phases: tuple[str, ...],
        tilt: float = 0.0,
        mas: float | None = None,
    ) -> SeriesPlan:
        assert self._site.ct is not None  # noqa: S101 # narrows the type: all CT protocols have one
        kernel = self._site.ct.kernel(use)
        interval = self.thin if thickness < 2 else thickness
        return self.add(
            number,
            "ct",
            "CT",
            self.text(phases[0] if len(phases) == 1 else "both", thickness, kernel),
            heights=self._protocol.heights,
            phases=phases,
            kernel=kernel,
            kvp=self.kvp,
            mas=mas or self.mas,
            thickness=thickness,
            interval=interval,
            tilt_deg=tilt,
            fov_mm=self.fov,
        )

    def coronal(self, number: int, source: SeriesPlan) -> None:
        self.add(
            number,
            "reformat",
            "CT",
            "冠状断 3mm" if self._site.japanese else "Coronal MPR 3mm",
            heights=source.heights,
            phases=source.phases[:1],
            kernel=source.kernel,
            kvp=source.kvp,
            mas=source.mas,
            thickness=3.0,
            interval=3.0,
            fov_mm=self.fov,
            source=source.number,
        )

    def around(self, thick: SeriesPlan) -> None:
        """Add what most CT examinations have: localizer, dose report, annotations, report."""
        self.add(
            1,
            "localizer",
            "CT",
            "Scano" if not self._site.japanese else "位置決め画像",
            heights=thick.heights,
            phases=("plain",),
            kvp=120.0,
            mas=10.0,
            thickness=1.0,
            fov_mm=500.0,
        )
        self.add(990, "dose", "CT", "Dose Report", source=thick.number)
        if self._rng.random() < 0.5:
            self.add(801, "seg", "SEG", "Organ labels", source=thick.number)
        if self._site.lesion and self._rng.random() < 0.6:
            self.add(802, "rtstruct", "RTSTRUCT", "Lesion contours", source=thick.number)
        self.report()

    def report(self) -> None:
        self.add(900, "sr", "SR", "読影レポート" if self._site.japanese else "Report")


def series_of(rng: Random, protocol: str, site: Site) -> tuple[SeriesPlan, ...]:
    """Plan the series of one examination, by Series Number.

    Parameters
    ----------
    rng : Random
    protocol : str
        One of :data:`PROTOCOLS`.
    site : Site
    """
    builder = _Builder(rng, PROTOCOLS[protocol], site)
    add, axial = builder.add, builder.axial
    if protocol == "chest":
        thick = axial(2, "soft", 5.0, phases=("plain",))
        axial(3, "lung", 1.0, phases=("plain",))
        thin = axial(4, "soft", 1.0, phases=("plain",))
        builder.coronal(5, thin)
        builder.around(thick)
    elif protocol == "trunk":
        thick = axial(2, "soft", 5.0, phases=("portal",))
        thin = axial(3, "soft", 1.0, phases=("portal",))
        builder.coronal(4, thin)
        builder.around(thick)
    elif protocol == "abdomen":
        thick = [
            axial(2 + place, "soft", 5.0, phases=(phase,))
            for place, phase in enumerate(("plain", "arterial", "portal", "delayed"))
        ][2]
        builder.coronal(7, axial(6, "soft", 1.0, phases=("arterial",)))
        builder.around(thick)
    elif protocol == "two-phase":
        thick = axial(2, "soft", 5.0, phases=("arterial", "portal"))
        builder.around(thick)
    elif protocol == "head":
        tilt = round(rng.uniform(12, 21), 1) * rng.choice((1, 1, -1))
        builder.mas *= 2
        thick = axial(2, "head", 5.0, phases=("plain",), tilt=tilt)
        axial(3, "bone", 5.0, phases=("plain",), tilt=tilt)
        builder.around(thick)
    elif protocol == "brain-mr":
        tilt = round(rng.uniform(-14, 14), 1)
        for number, text, volumes in (
            (2, "T1 SE axial", ("t1",)),
            (3, "T2 TSE axial", ("t2",)),
            (4, "DWI axial", ("b0", "b1000")),
        ):
            add(
                number,
                "mr",
                "MR",
                text,
                heights=PROTOCOLS[protocol].heights,
                phases=volumes,
                thickness=5.0,
                interval=6.0 if number < 4 else 5.0,
                tilt_deg=tilt,
                fov_mm=230.0,
            )
        builder.report()
    else:
        thick = axial(2, "soft", 5.0, phases=("plain",), mas=30.0)
        add(
            5,
            "pet",
            "PT",
            "WB FDG AC",
            heights=PROTOCOLS[protocol].heights,
            phases=("suv",),
            thickness=3.27,
            interval=3.27,
            fov_mm=600.0,
        )
        builder.around(thick)
    return tuple(sorted(builder.series, key=lambda plan: plan.number))
