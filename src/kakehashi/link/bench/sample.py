"""What is read: some series of the cohort, over the link, and the same bytes in memory."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from kakehashi.errors import LinkError
from kakehashi.link import door
from kakehashi.link.bench.results import Cohort
from kakehashi.link.manifest import Manifest, remote_path
from kakehashi.link.pinned import Pins
from kakehashi.link.processstore import ProcessStore
from kakehashi.link.reader import CHANNELS, Reader
from kakehashi.link.sftp import Sftp

if TYPE_CHECKING:
    from collections.abc import Callable

    from kakehashi.link.manifest import Entry
    from kakehashi.link.pinned import Held
    from kakehashi.link.session import Session

_MEMORY_SHARE = 4
_LOOK_S = 0.2
_TELL_S = 5.0


class Sample:
    """Some series of the cohort, each in the store, and in memory without a name.

    Parameters
    ----------
    session : Session
        The session that this process runs in.
    limit_bytes : int
        Bound of what is held; the series are taken in the cohort's order.

    Raises
    ------
    LinkError
        The cohort is empty, or its smallest series is more than fits.
    """

    def __init__(self, session: Session, limit_bytes: int) -> None:
        self.session = session
        self.stores = ProcessStore(session)
        self.manifest: Manifest = self.stores.get().reader.manifest
        limit = min(limit_bytes, _memory_bytes() // _MEMORY_SHARE)
        self.entries = _chosen(list(self.manifest.files.values()), limit)
        self.uids = [entry.uid for entry in self.entries]
        self.paths = [entry.path for entry in self.entries]
        self.bytes = sum(entry.size for entry in self.entries)
        self._turn = itertools.cycle(self.entries)
        self._pins: Pins | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the memory and the channels."""
        if self._pins is not None:
            self._pins.unpin()
        self.stores.close()

    def hold(self, tell: Callable[[str], None]) -> None:
        """Read all of it into memory; the session's end drops it, too."""
        self._pins = Pins(self.stores, self.uids)
        told = time.monotonic()
        while not self._pins.wait(_LOOK_S):
            if time.monotonic() - told > _TELL_S:
                told = time.monotonic()
                tell(f"  {self._pins.progress()}")

    @property
    def held(self) -> Held:
        """The series in memory."""
        if self._pins is None:
            raise LinkError("the series are not in memory yet; hold() reads them")
        return self._pins.held

    @property
    def cohort(self) -> Cohort:
        """Say how much there is."""
        files = self.manifest.files.values()
        return Cohort(
            series=len(files),
            bytes=sum(entry.size for entry in files),
            series_used=len(self.entries),
            bytes_used=self.bytes,
        )

    def next(self) -> Entry:
        """Return a series, another one at each call until all had their turn."""
        return next(self._turn)

    def channel(self) -> Sftp:
        """Open one channel, as the reader does: a connection of ssh by itself."""
        sftp = Sftp(door.to_store(self.session)[0]())
        try:
            sftp.greet()
        except BaseException:
            sftp.close()
            raise
        return sftp

    def remote(self, path: str) -> str:
        """Return where a file lies at the store."""
        return remote_path(self.session.manifest.path, path)

    def reader(self, channels: int = CHANNELS) -> Reader:
        """Return a reader that has read nothing yet, and keeps nothing that it reads."""
        return Reader(
            door.to_store(self.session),
            self.manifest,
            manifest_path=self.session.manifest.path,
            channels=channels,
            cache_bytes=1,
        )

    def fresh_reader(self) -> Reader:
        """Return a reader as a program opens it: the manifest is fetched, too."""
        reference = self.session.manifest
        return Reader.connect(
            door.to_store(self.session), manifest_path=reference.path, sha256=reference.sha256
        )

    def mounted(self) -> list[Path]:
        """Return the files in the session's view; none where the node mounts nothing."""
        view = self.session.view
        return [] if view is None else [view / path for path in self.paths]


def _chosen(entries: list[Entry], limit: int) -> list[Entry]:
    if not entries:
        raise LinkError("this session's cohort is empty; there is nothing to measure with")
    chosen: list[Entry] = []
    left = limit
    for entry in entries:
        if entry.size <= left:
            chosen.append(entry)
            left -= entry.size
    if not chosen:
        least = min(entry.size for entry in entries)
        raise LinkError(
            f"the smallest series has {least / 1e6:.0f} MB, and {limit / 1e6:.0f} MB may be held "
            "in memory; ask for a session with more memory"
        )
    return chosen


def _memory_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 30
