"""Hospitals that send synthetic studies to the store of the demo, over DICOM.

Each hospital calls with AE titles of its own. Not all goes well, as it never does: one hospital's
transfer broke off, one object is damaged, one hospital has announced a study that did not come,
some send no list, and two are silent. What must be seen of that afterwards is in :class:`Sent`.
"""

from __future__ import annotations

import datetime as dt
import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pydicom

from tests.lab import portal as services
from tests.lab.hosts import Host, LabError

FOLDER = "/srv/hospitals"
"""On the demo's host: a folder a hospital, below it one a study."""

PORT = 11112
STUDIES, SEED, SIZE = 10, 2, 128
"""By this seed eight hospitals have studies, of every modality, with few objects."""

SENDERS = {
    "F01": ("F01PACS", "F01CT1"),
    "F02": ("F02PACS",),
    "F03": ("F03PACS",),
    "F04": ("F04PACS", "F04PET"),
    "F05": ("F05PACS",),
    "F06": ("F06PACS",),
    "F07": ("F07PACS",),
    "F08": ("F08PACS",),
    "F09": ("F09MR1",),
    "F10": ("F10PACS",),
}
GRANTED = ("F02", "F05")
"""What the sample project sees of; chests of F08 it does not."""

SHORT, DAMAGED, ABSENT = "F02", "F08", "F06"
UNLISTED = frozenset({"F08", "F10"})
LOST_FILES = 12
# Protocols whose series name a part of the body other than the head: tier 1.
TIER_1 = frozenset({"chest", "abdomen", "two-phase"})


@dataclass
class Hospital:
    """What one hospital sent, and what the store must say of it.

    Attributes
    ----------
    sent : int
        Objects that the receiver takes.
    expected : int or None
        Objects of its list; None where it sends none.
    stopped, held : int
        Objects in quarantine for being damaged, and objects that are held back.
    seen : int
        Series that the sample project finds in the catalogue.
    late : int
        Series of studies that have not come so far.
    """

    sent: int = 0
    expected: int | None = None
    stopped: int = 0
    held: int = 0
    seen: int = 0
    late: int = 0

    @property
    def missing(self) -> int:
        return 0 if self.expected is None else self.expected - self.sent


@dataclass
class Sent:
    """What all hospitals sent."""

    hospitals: dict[str, Hospital] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {name: asdict(one) for name, one in self.hospitals.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Sent:
        return cls({name: Hospital(**one) for name, one in value.items()})


@dataclass(frozen=True)
class Work:
    """Work that is done on the host beside what else goes on there."""

    host: Host
    name: str
    process: subprocess.Popen[bytes]

    def wait(self) -> None:
        """Wait until it is done, or tell what went wrong."""
        if self.process.wait():
            text = self.host.log(self.name).read_text(errors="replace")
            raise LabError(f"{self.name} on {self.host.name} failed:\n{text[-3000:]}")


def make(host: Host) -> Work:
    """Begin to draw the studies."""
    argv = [services.PYTHON, "-m", "kakehashi.cli", "store", "synthetic", FOLDER,
            "--studies", str(STUDIES), "--seed", str(SEED), "--size", str(SIZE)]  # fmt: skip
    return Work(host, "hospitals", host.daemon("hospitals", argv))


def take_in(host: Host) -> Work:
    """Begin to take over all that came, complete or not."""
    argv = services.command("store", "intake", "--once")
    return Work(host, "intake-once", host.daemon("intake-once", argv))


def start_receiver(host: Host) -> None:
    """Start the receiver, as a service of the store."""
    process = host.daemon("receive", services.command("store", "receive"))
    services.await_line(host, "receive", "ready", process)


def start_intake(host: Host) -> None:
    """Start the intake, as a service of the store."""
    process = host.daemon("intake", services.command("store", "intake"))
    services.await_line(host, "intake", "ready", process)


def send(host: Host) -> Sent:
    """Let every hospital give its list, and send; return what must be seen of it."""
    sent = Sent({name: Hospital() for name in SENDERS})
    today = dt.datetime.now().astimezone().date()
    yesterday = today - dt.timedelta(days=1)
    for name, titles in SENDERS.items():
        studies = _studies(host, name)
        if not studies:
            continue
        hospital = sent.hospitals[name]
        if name not in UNLISTED:
            date = yesterday if name == ABSENT else today
            hospital.expected = _give_list(host, name, date, studies)
        if name == ABSENT:
            hospital.late = sum(_packable(study) for study in studies)
            continue
        if name == SHORT:
            _break_off(studies[-1])
        if name == DAMAGED:
            hospital.stopped = _damage(studies[-1])
        for number, study in enumerate(studies):
            transfer(host, titles[number % len(titles)], f"{FOLDER}/{name}/{study.name}")
            hospital.sent += len(_objects(study))
        hospital.sent -= hospital.stopped
        _foresee(hospital, name, studies)
    return sent


def send_absent(host: Host) -> None:
    """Send what was announced and did not come."""
    transfer(host, SENDERS[ABSENT][0], f"{FOLDER}/{ABSENT}")


def transfer(host: Host, title: str, folder: str) -> None:
    """Send all objects of a folder under an AE title."""
    host.run(
        ["dcmsend", "-aet", title, "-aec", "KAKEHASHI", "127.0.0.1", str(PORT),
         "--no-uid-checks", "+sd", "+sp", "*.dcm", "+r", folder]
    )  # fmt: skip


def _studies(host: Host, name: str) -> list[Path]:
    folder = host.path(f"{FOLDER}/{name}")
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _objects(study: Path) -> list[Path]:
    return sorted(study.rglob("*.dcm"))


def _truth(study: Path) -> dict[str, Any]:
    return dict(json.loads((study / "truth.json").read_text(encoding="utf-8")))


def _give_list(host: Host, name: str, date: dt.date, studies: list[Path]) -> int:
    """Hand the hospital's list in, and return how many objects it has."""
    counts = {_truth(study)["study_uid"]: len(_objects(study)) for study in studies}
    lines = [f"{date},{uid},{count}\n" for uid, count in counts.items()]
    path = f"{FOLDER}/{name}.csv"
    host.write(path, "date,study_uid,instances\n" + "".join(lines))
    services.kakehashi(host, ["store", "expect", name, path])
    return sum(counts.values())


def _longest(study: Path) -> list[Path]:
    return max((sorted(one.glob("*.dcm")) for one in study.iterdir() if one.is_dir()), key=len)


def _break_off(study: Path) -> None:
    """Lose the last images of the longest series."""
    for path in _longest(study)[-LOST_FILES:]:
        path.unlink()


def _damage(study: Path) -> int:
    """Spoil the last image of the longest series: nothing says any more whose series it is."""
    path = _longest(study)[-1]
    dataset = pydicom.dcmread(path)
    del dataset.SeriesInstanceUID
    dataset.save_as(path)
    return 1


def _foresee(hospital: Hospital, name: str, studies: list[Path]) -> None:
    """Say, from what is known of the studies, what the store must make of them."""
    for study in studies:
        truth = _truth(study)
        # The dose report is a picture of a screen with the patient's name in it.
        hospital.held += sum(one["kind"] == "dose" for one in truth["series"])
        if name in GRANTED and truth["protocol"] in TIER_1:
            hospital.seen += _packable(study, "CT")


def _packable(study: Path, *modalities: str) -> int:
    """Return how many series of a study become packs."""
    series = _truth(study)["series"]
    return sum(
        one["packable"] and (not modalities or one["modality"] in modalities) for one in series
    )
