"""The series that the lab's server has open, read through the session's verified link."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from kakehashi.link import Store
from kakehashi_widgets.planes import window_hint

if TYPE_CHECKING:
    from kakehashi.link import Series

# An open series is a directory and a few descriptions; its blocks are in the store's own cache.
_OPEN_SERIES = 16
# A person looks at one plane at a time; more threads would only queue at the link.
_THREADS = 4


class Shelf:
    """Opens the store when it is first needed, and keeps the series used last.

    All methods may wait for the link: call them in :attr:`threads`. Errors are those of
    :class:`kakehashi.Store`.

    Attributes
    ----------
    threads : ThreadPoolExecutor
        Where reads run, off the server's event loop.
    """

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="kakehashi-planes")
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._store: Store | None = None
        self._open: OrderedDict[str, Series] = OrderedDict()

    def rows(self) -> list[dict[str, Any]]:
        """Return the cohort's rows, as the manifest has them, each with its ``uid``."""
        return self._get_store().table()

    def series(self, uid: str) -> Series:
        """Return a series of the cohort, opened once.

        Raises
        ------
        NotInManifestError
            The cohort has no such series.
        """
        with self._lock:
            if uid in self._open:
                self._open.move_to_end(uid)
                return self._open[uid]
        series = self._get_store().series(uid)
        with self._lock:
            kept = self._open.setdefault(uid, series)
            while len(self._open) > _OPEN_SERIES:
                self._open.popitem(last=False)
        return kept

    def describe(self, uid: str) -> dict[str, Any]:
        """Return what a viewer must know of a series.

        Returns
        -------
        dict
            ``uid``, ``modality``, ``description``, ``shape`` (slices, rows, columns),
            ``spacing_mm`` (z, y, x), ``affine_lps`` (4 x 4: column, row, slice, 1 to mm),
            ``unit`` of the values, ``rescale`` as in the pack, ``window`` (width and level to
            begin with).
        """
        series = self.series(uid)
        pack = series.pack
        return {
            "uid": uid,
            "modality": pack.modality,
            "description": series.description,
            "shape": list(pack.shape),
            "spacing_mm": list(pack.spacing_mm),
            "affine_lps": pack.affine_lps.tolist(),
            "unit": pack.unit,
            "rescale": pack.rescale.to_meta(),
            "window": window_hint(pack),
        }

    def _get_store(self) -> Store:
        with self._opening:
            if self._store is None:
                self._store = Store()
            return self._store
