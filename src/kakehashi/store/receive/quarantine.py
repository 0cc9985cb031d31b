"""Objects that must not go on by themselves, each with the reason, until a person decides."""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kakehashi.errors import StoreError
from kakehashi.store.layout import replacing, sync_folder
from kakehashi.store.receive.entry import Receipt, read_receipt

if TYPE_CHECKING:
    from pathlib import Path

_ID = re.compile(r"[0-9a-f]{12}-[0-9a-f]{12}")
_OBJECT, _SIDECAR = ".dcm", ".json"
_LOG = logging.getLogger(__name__)

INTERRUPTED = "put into quarantine by a run that ended before it could say why"


@dataclass(frozen=True, slots=True)
class Held:
    """An object in quarantine.

    Attributes
    ----------
    id : str
        By which a person names it.
    reason : str
    held_at : datetime
    receipt : Receipt
    path : Path
        Its file.
    """

    id: str
    reason: str
    held_at: dt.datetime
    receipt: Receipt
    path: Path

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return {
            "id": self.id,
            "reason": self.reason,
            "held_at": self.held_at.isoformat(),
            **self.receipt.as_json(),
        }


def identify(receipt: Receipt) -> str:
    """Return the id of an object: the same for the same content under the same UID."""
    return f"{receipt.name[:12]}-{receipt.sha256[:12]}"


class Quarantine:
    """The folder of held objects; the journal's lock is held by whoever changes it.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._size, self._as_of = 0, -1

    def list(self) -> list[Held]:
        """Return all, the oldest first."""
        held = [self._read(path) for path in self._folder.glob(f"*{_SIDECAR}")]
        return sorted(held, key=lambda one: (one.held_at, one.id))

    def get(self, identifier: str) -> Held:
        """Return one.

        Raises
        ------
        StoreError
            There is none of that id.
        """
        path = self._folder / f"{identifier}{_SIDECAR}"
        if not _ID.fullmatch(identifier) or not path.exists():
            raise StoreError(
                f"nothing in quarantine is called {identifier!r}; `kakehashi store quarantine` "
                "lists what is there"
            )
        return self._read(path)

    def holds(self, receipt: Receipt) -> bool:
        """Say whether an object is here."""
        return (self._folder / f"{identify(receipt)}{_SIDECAR}").exists()

    def size(self) -> int:
        """Return the bytes that lie here."""
        changed = self._folder.stat().st_mtime_ns
        if changed != self._as_of:
            with os.scandir(self._folder) as found:
                self._size = sum(one.stat().st_size for one in found)
            self._as_of = changed
        return self._size

    def take(self, path: Path, receipt: Receipt, reason: str) -> str:
        """Move a file in, durably.

        Returns
        -------
        str
            Its id; empty if the same content was held already.

        Raises
        ------
        OSError
            It cannot be moved, or its reason cannot be written.
        """
        identifier = identify(receipt)
        target = self._folder / f"{identifier}{_OBJECT}"
        sidecar = target.with_suffix(_SIDECAR)
        if target.exists() and sidecar.exists():
            path.unlink()
            return ""
        known = self._as_of == self._folder.stat().st_mtime_ns
        path.replace(target)
        sync_folder(self._folder)
        self._write(Held(identifier, reason, dt.datetime.now(dt.UTC), receipt, target))
        if known:
            self._size += target.stat().st_size
            self._as_of = self._folder.stat().st_mtime_ns
        return identifier

    def forget(self, held: Held) -> None:
        """Remove an object and its reason."""
        held.path.unlink(missing_ok=True)
        held.path.with_suffix(_SIDECAR).unlink()
        sync_folder(self._folder)

    def torn(self) -> bool:
        """Say whether a run ended in the midst of a change, or is in the midst of one."""
        names = {path.stem for path in self._folder.glob(f"*{_OBJECT}")}
        return names != {path.stem for path in self._folder.glob(f"*{_SIDECAR}")}

    def mend(self) -> None:
        """Finish what a run left half done."""
        for path in self._folder.glob("*.part"):
            path.unlink()
        for sidecar in self._folder.glob(f"*{_SIDECAR}"):
            if not sidecar.with_suffix(_OBJECT).exists():
                sidecar.unlink()
        for path in self._folder.glob(f"*{_OBJECT}"):
            if not path.with_suffix(_SIDECAR).exists():
                try:
                    receipt = read_receipt(path)
                except StoreError as error:
                    _LOG.error("%s: not ours, left alone", error)
                else:
                    now = dt.datetime.now(dt.UTC)
                    self._write(Held(path.stem, INTERRUPTED, now, receipt, path))

    def _write(self, held: Held) -> None:
        with replacing(held.path.with_suffix(_SIDECAR), mode=0o600) as file:
            text = json.dumps(held.as_json(), ensure_ascii=False, indent=2)
            file.write(text.encode() + b"\n")

    def _read(self, sidecar: Path) -> Held:
        try:
            values = json.loads(sidecar.read_text(encoding="utf-8"))
            return Held(
                sidecar.stem,
                str(values["reason"]),
                dt.datetime.fromisoformat(values["held_at"]),
                Receipt.from_json(values),
                sidecar.with_suffix(_OBJECT),
            )
        except (KeyError, TypeError, ValueError, StoreError) as error:
            raise StoreError(f"{sidecar} is damaged; its object lies beside it") from error
