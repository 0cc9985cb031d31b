"""Which processes make up a running store."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from kakehashi.errors import StoreError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Services:
    """Pids, as the store's processes see them; 0 for one that does not run now."""

    supervisor: int
    sshd: int = 0
    authority: int = 0
    guard: int = 0
    catalogue: int = 0

    def pids(self) -> frozenset[int]:
        """Return the pids of those that run."""
        return frozenset(asdict(self).values()) - {0}

    def write(self, folder: Path) -> None:
        """Put the pids where the guard looks."""
        part = folder / "services.json.part"
        part.write_text(json.dumps(asdict(self)), encoding="ascii")
        part.chmod(0o644)
        part.rename(folder / "services.json")

    @classmethod
    def read(cls, folder: Path) -> Services:
        """Read the pids.

        Raises
        ------
        StoreError
            No store runs here.
        """
        try:
            return cls(**json.loads((folder / "services.json").read_text(encoding="ascii")))
        except (OSError, ValueError, TypeError) as error:
            raise StoreError(f"{folder}: no store runs from here") from error
