"""What a grant says of a project's view: the manifest's hash, and how many series it has."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kakehashi.errors import RefusedError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Seen:
    """A manifest as it lay in the view: its SHA-256 (hexadecimal) and its number of files."""

    sha256: str
    series: int


class Manifests:
    """Reads manifests, and keeps what it read until the file is replaced."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[tuple[int, ...], Seen]] = {}

    def read(self, view: Path) -> Seen:
        """Return what the view's manifest is now.

        Raises
        ------
        RefusedError
            ``no-view``: there is none, or it is none.
        """
        path = view / "manifest.json"
        try:
            with path.open("rb") as file:
                # Of the open file, since the name may be given to a new one meanwhile.
                status = os.fstat(file.fileno())
                version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
                known = self._seen.get(path)
                if known and known[0] == version:
                    return known[1]
                data = file.read()
            seen = Seen(hashlib.sha256(data).hexdigest(), len(json.loads(data)["files"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RefusedError(
                "no-view",
                f"the project {view.name!r} has no readable manifest at the store; its data "
                "manager has to build the view (`kakehashi store view`)",
            ) from error
        self._seen[path] = (version, seen)
        return seen
