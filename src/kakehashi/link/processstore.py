"""The store in whichever process asks: each opens its own channels, once."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING

from kakehashi.errors import KakehashiError
from kakehashi.link.manifest import Manifest
from kakehashi.link.session import Session
from kakehashi.link.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kakehashi.link.pinned import Held
    from kakehashi.link.store import Series

_OPEN_SERIES = 64


@contextlib.contextmanager
def naming(uid: str) -> Iterator[None]:
    """Let errors of what is done with a series name it, if they do not yet."""
    try:
        yield
    except KakehashiError as error:
        if uid in str(error):
            raise
        raise type(error)(f"series {uid}: {error}") from error


class ProcessStore:
    """A store that may be pickled, and used in processes that were forked.

    Parameters
    ----------
    session : Session, Path or str, optional
        As for :class:`kakehashi.link.Store`.
    """

    def __init__(self, session: Session | Path | str | None = None) -> None:
        self.session = Session.of(session)
        # A forked process keeps what it got from its parent, and never uses or closes it: the
        # parent's channels are the same sockets.
        self._inherited: Store | None = None
        self._manifest: Manifest | None = None
        self._held: Held | None = None
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._store: Store | None = None
        self._series: OrderedDict[str, Series] = OrderedDict()
        _ALL.add(self)

    def __getstate__(self) -> tuple[Session, Held | None, tuple[bytes, str] | None]:
        if self._held is None:
            return self.session, None, None
        # With what is held goes the manifest, so that a process begins while the store is shut.
        raw = self.get().reader.manifest.raw
        return self.session, self._held, (raw, self.session.manifest.sha256)

    def __setstate__(self, state: tuple[Session, Held | None, tuple[bytes, str] | None]) -> None:
        session, held, manifest = state
        self.__init__(session)  # type: ignore[misc] # what is opened is of each process
        self._held = held
        self._manifest = None if manifest is None else Manifest.parse(*manifest)

    @property
    def held(self) -> Held | None:
        """What lies in memory of the store's files."""
        return self._held

    def hold(self, held: Held | None) -> None:
        """Read from memory what is held, from now on."""
        with self._lock:
            self._held = held
            self._series.clear()

    def get(self) -> Store:
        """Return this process's store, opened when it is first asked for.

        Raises
        ------
        LinkError
            As for :class:`kakehashi.link.Store`.
        """
        with self._lock:
            return self._get()

    def series(self, uid: str) -> Series:
        """Return a series; those used last stay open, so that their directory is read once.

        Raises
        ------
        NotInManifestError
            As for :meth:`kakehashi.link.Store.series`.
        """
        with self._lock:
            series = self._series.get(uid)
            if series is None:
                series = self._series[uid] = self._get().series(uid, held=self._held)
                if len(self._series) > _OPEN_SERIES:
                    self._series.popitem(last=False)
            else:
                self._series.move_to_end(uid)
            return series

    def close(self) -> None:
        """Close the channels of this process; new ones are opened when they are needed."""
        with self._lock:
            store, self._store = self._store, None
            self._series.clear()
        if store is not None:
            store.close()

    def _get(self) -> Store:
        if self._store is None:
            known = self._inherited.reader.manifest if self._inherited else self._manifest
            self._store = Store(self.session, manifest=known)
            # What was closed can be opened anew while the store is shut.
            self._manifest = self._store.reader.manifest
        return self._store

    def _forked(self) -> None:
        self._inherited = self._store or self._inherited
        # Also the lock: it may have been held by a thread that does not exist here.
        self._begin()


_ALL: weakref.WeakSet[ProcessStore] = weakref.WeakSet()


def _after_fork() -> None:
    for store in list(_ALL):
        store._forked()


os.register_at_fork(after_in_child=_after_fork)
