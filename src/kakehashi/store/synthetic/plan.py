"""Who is examined where, when, with what and how: everything but the pixels."""

from __future__ import annotations

import datetime as dt
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kakehashi.errors import StoreError
from kakehashi.store.synthetic.anatomy import head, torso
from kakehashi.store.synthetic.chance import stream
from kakehashi.store.synthetic.people import HOSPITALS, Hospital, Name, Person, person, physician
from kakehashi.store.synthetic.place import place
from kakehashi.store.synthetic.protocols import PROTOCOLS, SeriesPlan, Site, series_of
from kakehashi.store.synthetic.render import Body, Metal
from kakehashi.store.synthetic.scanners import (
    CT_SHARE,
    FACILITIES,
    MR_MODELS,
    PET_MODELS,
    SHARE,
    Model,
    models_of,
)
from kakehashi.store.synthetic.tissue import person_shift

if TYPE_CHECKING:
    from collections.abc import Mapping
    from random import Random

VERSION = "1"
"""Of the generator; another version gives other bytes for the same seed."""

SIZES = (512, 256, 128)
"""Rows and columns that can be asked for."""

_NAMESPACE = uuid.UUID("4c0c9a9e-6c0b-5d0e-9a5e-1d7f8e0b2a61")
_FIRST_DAY = dt.date(2016, 4, 1)
_DAYS = 3600


@dataclass(frozen=True, slots=True)
class Finding:
    """What a study shall show.

    Attributes
    ----------
    organ, tissue : str
    diameter_mm : float
    """

    organ: str
    tissue: str
    diameter_mm: float


@dataclass(frozen=True, slots=True)
class Machine:
    """The scanner of a study.

    Attributes
    ----------
    manufacturer, model, software, station, serial : str
    ct : Model or None
        None for MR and for PET's own images.
    tesla : float
        0 but for MR.
    """

    manufacturer: str
    model: str
    software: str
    station: str
    serial: str
    ct: Model | None
    tesla: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """One study, before anything is drawn.

    Attributes
    ----------
    seed, index, size : int
    scope : str
        The facility that was asked for, or ``all``.
    facility : str
        ``F01`` to ``F10``.
    hospital : Hospital
    person : Person
    patient_id : str
        This person's at this hospital.
    protocol : str
        One of ``protocols.PROTOCOLS``.
    moment : datetime
        Begin of the study.
    accession : str
    referring, reading, operator : Name
    machine : Machine
    pet_machine : Machine or None
    findings : tuple of Finding
    metal : bool
    series : tuple of SeriesPlan
    offset : tuple of float
        From phantom to patient coordinates, mm.
    """

    seed: int
    index: int
    size: int
    scope: str
    facility: str
    hospital: Hospital
    person: Person
    patient_id: str
    protocol: str
    moment: dt.datetime
    accession: str
    referring: Name
    reading: Name
    operator: Name
    machine: Machine
    pet_machine: Machine | None
    findings: tuple[Finding, ...]
    metal: bool
    series: tuple[SeriesPlan, ...]
    offset: tuple[float, float, float]

    @property
    def key(self) -> str:
        """What all UIDs and random numbers of the study are made from."""
        return f"{VERSION}/{self.seed}/{self.scope}/{self.index}/{self.size}"

    def uid(self, *parts: object) -> str:
        """Return a UID that depends on this study and the parts only."""
        name = "/".join(str(part) for part in (self.key, *parts))
        return f"2.25.{uuid.uuid5(_NAMESPACE, name).int}"

    @property
    def study_uid(self) -> str:
        """Study Instance UID."""
        return self.uid("study")

    def series_uid(self, series: SeriesPlan) -> str:
        """Series Instance UID."""
        return self.uid("series", series.number)

    def frame_uid(self, series: SeriesPlan) -> str:
        """Frame of Reference UID: one for a patient who stays on one table."""
        return self.uid("frame", "pet" if series.kind == "pet" else "table")

    @property
    def age(self) -> int:
        """Age in years at the study."""
        return self.person.age_on(self.moment.date())


def plan_studies(
    count: int, *, seed: int, size: int = 512, facility: str | None = None
) -> list[Plan]:
    """Plan studies; the same arguments give the same plans, and a longer list begins alike.

    Parameters
    ----------
    count : int
    seed : int
    size : int
        Rows and columns of CT images: 512, 256 or 128. Fields of view and thickness stay;
        thin slices lie further apart in smaller images.
    facility : str, optional
        ``F01`` to ``F10``; without it, all in the proportions of ``scanners.SHARE``.

    Raises
    ------
    StoreError
        An argument is out of its range.
    """
    if count < 0:
        raise StoreError(f"{count} studies cannot be made; ask for 0 or more")
    if size not in SIZES:
        raise StoreError(f"size {size} is not one of {', '.join(map(str, SIZES))}")
    if facility is not None and facility not in FACILITIES:
        raise StoreError(f"no facility {facility!r}; there are {', '.join(FACILITIES)}")
    return [_plan(index, seed, size, facility) for index in range(count)]


def _draw(rng: Random, shares: Mapping[str, float]) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]


def _first_visit(index: int, key: str) -> int:
    """Return the study in which this one's person was first seen."""
    while index:
        rng = stream(key, "visit", index)
        if rng.random() > 0.25:
            return index
        index = rng.randrange(index)
    return 0


def _plan(index: int, seed: int, size: int, wanted: str | None) -> Plan:
    scope = wanted or "all"
    run = f"{VERSION}/{seed}/{scope}"
    number = _first_visit(index, run)
    origin = stream(run, "person", number)
    home = wanted or _draw(origin, SHARE)
    day = _FIRST_DAY + dt.timedelta(days=origin.randrange(_DAYS))
    who = person(origin, number, day)

    rng = stream(run, "study", index)
    facility = home
    if index != number:
        day += dt.timedelta(days=rng.randrange(1, 720))
        if wanted is None and rng.random() < 0.05:
            facility = _draw(rng, SHARE)
    hospital = HOSPITALS[facility]
    # 7919 shares no factor with 10, so that two people never get the same number.
    offset = stream(run, "numbers", facility).randrange(10**6)
    patient_id = hospital.id_format.format((number * 7919 + offset) % 10**6)
    moment = dt.datetime.combine(day, dt.time(8)) + dt.timedelta(seconds=rng.randrange(36_000))
    protocol = _draw(rng, {name: about.share for name, about in PROTOCOLS.items()})
    machine, pet = _machines(rng, run, facility, protocol, day.year)
    findings = _findings(rng, protocol)
    site = Site(
        ct=machine.ct,
        japanese=rng.random() < 0.35,
        adult=who.age_on(day) > 15,
        weight_kg=who.weight_kg,
        size=size,
        lesion=bool(findings),
    )
    return Plan(
        seed=seed,
        index=index,
        size=size,
        scope=scope,
        facility=facility,
        hospital=hospital,
        person=who,
        patient_id=patient_id,
        protocol=protocol,
        moment=moment,
        accession=f"{hospital.code}{day:%y%m%d}{index % 100000:05d}",
        referring=physician(rng),
        reading=physician(rng),
        operator=physician(rng),
        machine=machine,
        pet_machine=pet,
        findings=findings,
        metal=protocol != "brain-mr" and rng.random() < 0.08,
        series=series_of(rng, protocol, site),
        offset=(
            round(rng.uniform(-8, 8), 1),
            round(rng.uniform(-30, 10), 1),
            round(rng.uniform(-900, 300), 1),
        ),
    )


def _machines(
    rng: Random, run: str, facility: str, protocol: str, year: int
) -> tuple[Machine, Machine | None]:
    hospital = HOSPITALS[facility]
    # A facility has few machines, and keeps them: their choice depends on it, not on the study.
    kept = stream(run, "machines", facility)
    mr, tomograph = kept.choice(MR_MODELS), kept.choice(PET_MODELS)
    rooms = stream(run, "rooms", facility, year // 4)

    def serial(what: str) -> str:
        return str(stream(run, "serial", facility, what).randrange(10_000, 99_999))

    if protocol == "brain-mr":
        maker, model, software, tesla = mr
        station = f"{hospital.code}MR1"
        return Machine(maker, model, software, station, serial(model), None, tesla), None
    vendor = _draw(rng, CT_SHARE[facility])
    ct = rooms.choice(models_of(vendor, year))
    room = list(CT_SHARE[facility]).index(vendor) + 1
    name = f"{ct.model}/{ct.software}"
    ours = Machine(
        ct.manufacturer, ct.model, ct.software, f"{hospital.code}CT{room}", serial(name), ct
    )
    if protocol != "pet-ct":
        return ours, None
    maker, model, software = tomograph
    return ours, Machine(maker, model, software, f"{hospital.code}PET1", serial(model), None)


def _findings(rng: Random, protocol: str) -> tuple[Finding, ...]:
    def some(organs: tuple[str, ...], tissues: tuple[str, ...], low: float, high: float) -> Finding:
        return Finding(rng.choice(organs), rng.choice(tissues), round(rng.uniform(low, high), 1))

    lungs = ("lung_right", "lung_left")
    found: list[Finding] = []
    if protocol in {"chest", "trunk", "pet-ct"} and rng.random() < 0.6:
        found += [some(lungs, ("nodule",), 8, 28) for _ in range(rng.choice((1, 1, 2, 3)))]
    if protocol in {"abdomen", "two-phase", "trunk"} and rng.random() < 0.6:
        kinds = (
            ("metastasis", "cyst") if protocol == "trunk" else ("carcinoma", "metastasis", "cyst")
        )
        found += [some(("liver",), kinds, 10, 38) for _ in range(rng.choice((1, 1, 2)))]
    if protocol in {"head", "brain-mr"} and rng.random() < 0.5:
        sides = ("hemisphere_right", "hemisphere_left")
        found.append(some(sides, ("bleeding", "infarct"), 12, 34))
    return tuple(found)


def body_of(plan: Plan) -> Body:
    """Build the body of a plan's person, with the study's lesions.

    The anatomy of one person is the same in all studies of one run; lesions are not.
    """
    who = plan.person
    rng = stream(VERSION, plan.seed, plan.scope, "body", who.number)
    shift = person_shift(rng)
    tall = who.height_cm / 168
    mass = who.weight_kg / (who.height_cm / 100) ** 2
    if PROTOCOLS[plan.protocol].body == "head":
        scale = tuple((0.7 + 0.3 * min(tall, 1.1)) * rng.uniform(0.97, 1.03) for _ in range(3))
        atrophy = min(1.0, max(0.0, (plan.age - 30) / 60))
        anatomy = head(rng, scale=(scale[0], scale[1], scale[2]), atrophy=atrophy)
    else:
        wide = tall**0.6 * (mass / 23) ** 0.15
        scale_z = tall * rng.uniform(0.97, 1.03)
        fat = min(34.0, max(4.0, 4 + (mass - 17) * 2.1)) * (1.15 if who.sex == "F" else 0.9)
        anatomy = torso(rng, sex=who.sex, scale=(wide, wide, scale_z), fat=fat)
    lesions = place(
        stream(plan.key, "lesions"),
        anatomy,
        [(finding.organ, finding.tissue, finding.diameter_mm) for finding in plan.findings],
    )
    key = f"{plan.seed}/{plan.scope}/{who.number}"
    return Body(key, anatomy, lesions, _metal(plan, anatomy.scale), shift)


def _metal(plan: Plan, scale: tuple[float, float, float]) -> tuple[Metal, ...]:
    if not plan.metal:
        return ()
    sx, sy, sz = scale
    if PROTOCOLS[plan.protocol].body == "head":
        # A clip on a vessel at the base of the brain.
        return (Metal((14 * sx, -18 * sy, -26 * sz), 1.6, 4.0),)
    # A pair of screws in a vertebra.
    return tuple(Metal((side * 11 * sx, 62 * sy, -118 * sz), 2.6, 5.0) for side in (-1, 1))
