"""Where the receiver's files lie under ``store.root``."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kakehashi.errors import StoreError
from kakehashi.store.layout import sync_folder

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Folders:
    """Paths below ``ROOT/receive``; what lies there is identifiable.

    Attributes
    ----------
    root : Path
        ``store.root``.
    """

    root: Path

    @property
    def base(self) -> Path:
        """All of it."""
        return self.root / "receive"

    @property
    def incoming(self) -> Path:
        """Objects while they arrive."""
        return self.base / "incoming"

    @property
    def inbox(self) -> Path:
        """Objects that wait for their intake."""
        return self.base / "inbox"

    @property
    def quarantine(self) -> Path:
        """Objects that somebody must look at."""
        return self.base / "quarantine"

    @property
    def journal(self) -> Path:
        """One line for whatever happened to an object."""
        return self.base / "journal"

    @property
    def figures(self) -> Path:
        """What was received, by day."""
        return self.base / "figures"

    @property
    def expected(self) -> Path:
        """What hospitals say that they sent, by day."""
        return self.base / "expected"

    def make(self) -> None:
        """Make the folders, closed to all but their owner.

        Raises
        ------
        StoreError
            One cannot be made, or belongs to somebody else.
        """
        folders = (self.incoming, self.inbox, self.quarantine, self.journal)
        try:
            for folder in (self.base, *folders, self.figures, self.expected):
                folder.mkdir(mode=0o700, exist_ok=True)
                folder.chmod(0o700)
            sync_folder(self.base)
            # Who may not read the store's root did not make the folder in it either.
            with contextlib.suppress(PermissionError):
                sync_folder(self.root)
        except OSError as error:
            raise StoreError(
                f"{error.filename}: {error.strerror}; the receiver needs a folder of its own below "
                f"{self.root}, and must own it"
            ) from error
