"""What ``fsck`` says of a thing that is not as it should be, and how it reads files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kakehashi.store.layout import BLOCK_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kakehashi.store.pace import Pace

YOUNG_S = 3600
"""Seconds for which a file without a row may be one that is being added."""

STALE_S = 86400
"""Seconds after which nobody writes to a ``.part`` any more."""

_CHUNK = 8 * BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be.

    Attributes
    ----------
    kind : str
        ``pack-missing``, ``pack-unreadable``, ``pack-damaged``, ``pack-other`` (whole, but not
        what the row says), ``blocks``, ``row``, ``kept-missing``, ``kept-damaged``,
        ``orphan``, ``part``, ``stray``, ``view-manifest``, ``view-link``, ``view-extra``,
        ``view-unowned``, ``received-lost``, ``received-unknown``, ``received-damaged``,
        ``quarantine``, ``staged``, ``facets``, ``facets-row``.
    path : str
        Relative to the store's root.
    what, todo : str
        What is wrong, and what to do about it.
    """

    kind: str
    path: str
    what: str
    todo: str


def blocks_of(path: Path, pace: Pace) -> Iterator[bytes]:
    """Read a file once, at a pace, and leave nothing of it in the page cache."""
    with path.open("rb") as file:
        descriptor, offset = file.fileno(), 0
        while chunk := file.read(_CHUNK):
            pace.take(len(chunk))
            offset += len(chunk)
            os.posix_fadvise(descriptor, 0, offset, os.POSIX_FADV_DONTNEED)
            for start in range(0, len(chunk), BLOCK_SIZE):
                yield chunk[start : start + BLOCK_SIZE]
