"""De-identified objects of series that are not complete yet: a folder a series.

What lies here is known from the files alone, so that an intake that was cut off goes on where
it was, with the records' database in reach or not.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from kakehashi.errors import StoreError
from kakehashi.store.dicom import UID
from kakehashi.store.ingest import Origin
from kakehashi.store.intake.packer import FOLDER, clear
from kakehashi.store.layout import PART, replacing, sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_ORIGIN = "origin.json"
_ASIDE = ".aside"

_log = logging.getLogger("kakehashi.intake")


@dataclass(frozen=True, slots=True)
class Staged:
    """A series as far as it has come.

    Attributes
    ----------
    series : str
        SeriesInstanceUID, de-identified.
    folder : Path
    origin : Origin
    patient : str
        De-identified id.
    objects : int
    last : float
        When the newest object came, seconds since 1970.
    """

    series: str
    folder: Path
    origin: Origin
    patient: str
    objects: int
    last: float


class Staging:
    """The folders under ``ROOT/staging``, readable by root only.

    Parameters
    ----------
    root : Path
        ``store.root``.
    """

    def __init__(self, root: Path) -> None:
        self._folder = root / "staging"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        # As they were listed, by when their folders had changed: thousands may wait for hours.
        self._listed: dict[str, tuple[int, Staged]] = {}
        for folder in self._folder.glob(f"*{PART}"):
            shutil.rmtree(folder)

    def put(self, series: str, sop: str, origin: Origin, patient: str, content: bytes) -> str:
        """Add an object, or find that it is there.

        Parameters
        ----------
        series, sop : str
            De-identified UIDs.
        origin : Origin
            The series gets the highest tier of its objects.
        patient : str
            De-identified id.
        content : bytes
            The file.

        Returns
        -------
        str
            Why it was not taken: the series is another person's or hospital's, or other content
            is there under the same UID, which stays. Empty if it was.

        Raises
        ------
        StoreError
            A UID is none, so that a path must not be made of it.
        """
        for uid in (series, sop):
            if not UID.fullmatch(uid):
                raise StoreError(f"{uid!r} is not a valid UID")
        # Within one tick of the file system's clock its time says nothing.
        self._listed.pop(series, None)
        folder = self._folder / series
        folder.mkdir(mode=0o700, exist_ok=True)
        before = _origin(folder)
        if before is not None and (before.facility, before.patient) != (origin.facility, patient):
            return "its series is another person's, or came from another hospital"
        if before is None or origin.tier > before.tier:
            with replacing(folder / _ORIGIN, mode=0o600) as file:
                file.write(json.dumps(asdict(origin) | {"patient": patient}).encode())
            sync_folder(self._folder)
        target = folder / f"{sop}.dcm"
        if target.exists():
            same = target.read_bytes() == content
            return "" if same else "other content under a UID that came before"
        with replacing(target, mode=0o600) as file:
            file.write(content)
        return ""

    def list(self) -> Iterator[Staged]:
        """Yield the series that are here, sorted by UID; of each is read what has changed."""
        # The others are the lock, and series that are being removed.
        names = sorted(filter(UID.fullmatch, (path.name for path in self._folder.iterdir())))
        here = set(names)
        self._listed = {name: one for name, one in self._listed.items() if name in here}
        for name in names:
            staged = self._look(self._folder / name)
            if staged is not None:
                yield staged

    def _look(self, folder: Path) -> Staged | None:
        """Return the series in a folder, read anew if that has changed; None if there is none."""
        try:
            changed = folder.stat().st_mtime_ns
        except FileNotFoundError:
            return None  # withdrawn a moment ago
        if folder.name in self._listed and self._listed[folder.name][0] == changed:
            return self._listed[folder.name][1]
        try:
            origin = _origin(folder)
        except StoreError as error:
            _log.error("%s is set aside: %s", folder.name, error)
            self.set_aside(folder)
            return None
        objects = [path.stat().st_mtime for path in folder.glob("*.dcm")]
        if origin is None or not objects:
            return None
        known = Origin(origin.facility, origin.tier)
        staged = Staged(folder.name, folder, known, origin.patient, len(objects), max(objects))
        self._listed[folder.name] = changed, staged
        return staged

    def withdraw(self, patient_id: str) -> int:
        """Remove the series of a person; return how many there were.

        What was set aside and does not say whose it is goes too: it could be theirs.
        """
        # A run may have been cut off while it packed.
        clear(self._folder / FOLDER)
        gone = 0
        for folder in (self._folder / _ASIDE).glob("*"):
            try:
                origin = _origin(folder)
            except StoreError:
                origin = None
            if origin is None or origin.patient == patient_id:
                shutil.rmtree(folder)
                gone += 1
        for staged in list(self.list()):
            if staged.patient == patient_id:
                self.remove(staged)
                gone += 1
        return gone

    def set_aside(self, folder: Path) -> None:
        """Keep a series where nobody looks for it, until somebody has seen to it."""
        aside = self._folder / _ASIDE
        aside.mkdir(mode=0o700, exist_ok=True)
        folder.rename(aside / f"{folder.name}.{secrets.token_hex(4)}")
        sync_folder(self._folder)

    def remove(self, series: Staged) -> None:
        """Forget a series that the store has taken over."""
        gone = series.folder.with_name(series.folder.name + PART)
        # First out of sight as a whole: half a series would be packed as if it were one.
        series.folder.rename(gone)
        shutil.rmtree(gone)


@dataclass(frozen=True, slots=True)
class _Known(Origin):
    patient: str = ""


def _origin(folder: Path) -> _Known | None:
    try:
        return _Known(**json.loads((folder / _ORIGIN).read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{folder / _ORIGIN}: cannot be read ({error})") from error
