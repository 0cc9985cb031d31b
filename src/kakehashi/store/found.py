"""Files of one series, divided: images to be packed, broken ones, and what is none of both."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kakehashi.errors import PackError
from kakehashi.store.dicom import UID, Instance, attribute, read_head, read_instance, refusal
from kakehashi.store.stated import IN_SERIES, objects_stated

if TYPE_CHECKING:
    from pathlib import Path

    import pydicom


@dataclass(frozen=True, slots=True)
class Broken:
    """A file that cannot be read, and why not."""

    path: Path
    reason: str
    sop: str


@dataclass(frozen=True, slots=True)
class Found:
    """A series' files, divided; of equal files only one remains.

    Attributes
    ----------
    old : list of Instance
        What is in its pack.
    good : list of Instance
        Further images that can be read.
    broken : list of Broken
        Those that cannot. One whose image came intact too does no harm, and is among the odd.
    odd : list of (Path, str)
        What is not to be packed, with the reason.
    sops : frozenset of str
        SOPInstanceUIDs of all.
    """

    old: list[Instance]
    good: list[Instance]
    broken: list[Broken]
    odd: list[tuple[Path, str]]
    sops: frozenset[str]

    @classmethod
    def of(cls, paths: list[Path], old: list[Instance]) -> Found:
        """Read and divide them."""
        good: dict[str, Instance] = {}
        broken: dict[str, Broken] = {}
        odd: dict[str, tuple[Path, str]] = {}
        sops = {instance.sop for instance in old}
        for path in paths:
            try:
                instance = read_instance(path)
            except PackError as error:
                sop = uid_of(read_head(path), "SOPInstanceUID") or ""
                broken.setdefault(sha256_of(path), Broken(path, str(error), sop))
                continue
            sops.add(instance.sop)
            if reason := refusal(instance.dataset):
                odd.setdefault(instance.sha256, (path, reason))
            else:
                good.setdefault(instance.sha256, instance)
        intact = {instance.sop for instance in [*old, *good.values()]}
        harmless = [(item.path, item.reason) for item in broken.values() if item.sop in intact]
        return cls(
            old=old,
            good=list(good.values()),
            broken=[item for item in broken.values() if item.sop not in intact],
            odd=[*odd.values(), *harmless],
            sops=frozenset(sops | {item.sop for item in broken.values()}),
        )

    @property
    def unreadable(self) -> str | None:
        """Why a series is not packed of which images are broken."""
        if not self.broken:
            return None
        images = len(self.broken) + len(self.good) + len(self.old)
        return (
            f"{len(self.broken)} of {images} images of the series cannot be read; send them "
            f"again ({self.broken[0].reason})"
        )

    @property
    def short(self) -> str:
        """How many objects of how many there are, empty if that is all, or if nobody knows."""
        images = [*self.old, *self.good]
        stated = objects_stated([instance.dataset for instance in images], IN_SERIES)
        came = len(self.sops)
        return f"{came} of {stated} objects" if stated and came < stated else ""


def text_of(head: pydicom.Dataset | None, name: str) -> str | None:
    """Return an attribute as text, None if there is none."""
    return None if head is None else str(attribute(head, name) or "") or None


def uid_of(head: pydicom.Dataset | None, name: str) -> str | None:
    """Return an attribute that is a valid UID, None if there is none."""
    value = text_of(head, name) or ""
    return value if UID.fullmatch(value) else None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
