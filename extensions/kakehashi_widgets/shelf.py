"""The series that the lab's server has open, read through the session's verified link."""

from __future__ import annotations

import socket
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from kakehashi.errors import KakehashiError
from kakehashi.imaging.ozip import open_pack
from kakehashi.link import Reader, Session
from kakehashi_widgets.planes import window_hint

if TYPE_CHECKING:
    from kakehashi.imaging.ozip import Pack

# An open pack is a directory and a few descriptions; its blocks are in the reader's own cache.
_OPEN_PACKS = 16
# A person looks at one plane at a time; more threads would only queue at the link.
_THREADS = 4


class UnknownSeriesError(KakehashiError):
    """A series that the session's cohort does not hold."""


class Shelf:
    """Opens the link when it is first needed, and keeps the packs used last.

    All methods but the constructor may wait for the link: call them in :attr:`threads`.
    """

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="kakehashi-planes")
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._reader: Reader | None = None
        self._packs: OrderedDict[str, Pack] = OrderedDict()

    def rows(self) -> list[dict[str, Any]]:
        """Return the cohort's rows, as the manifest has them, each with its ``uid``.

        Raises
        ------
        SessionError
            This is not inside a session.
        LinkError
            The manifest cannot be read, or is not the one that was granted.
        """
        return [
            {**entry.series, "uid": entry.uid}
            for entry in self._open_reader().manifest.files.values()
        ]

    def pack(self, uid: str) -> Pack:
        """Return an open pack.

        Raises
        ------
        UnknownSeriesError
            The cohort has no such series.
        LinkError, StoreError
            The pack cannot be read, or is not one.
        """
        with self._lock:
            if uid in self._packs:
                self._packs.move_to_end(uid)
                return self._packs[uid]
        reader = self._open_reader()
        path = f"series/{uid}.ozx"
        if path not in reader.manifest.files:
            raise UnknownSeriesError(
                f"the series {uid} is not in this session's cohort; choose one of the cohort table"
            )
        # Two requests may open the same pack at once; that costs a read and does no harm.
        pack = open_pack(reader.open(path))
        with self._lock:
            self._packs[uid] = pack
            while len(self._packs) > _OPEN_PACKS:
                self._packs.popitem(last=False)
        return pack

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
        pack = self.pack(uid)
        row = self._open_reader().manifest.files[f"series/{uid}.ozx"].series
        return {
            "uid": uid,
            "modality": pack.modality,
            "description": str(row.get("description") or ""),
            "shape": list(pack.shape),
            "spacing_mm": list(pack.spacing_mm),
            "affine_lps": pack.affine_lps.tolist(),
            "unit": pack.unit,
            "rescale": pack.rescale.to_meta(),
            "window": window_hint(pack),
        }

    def _open_reader(self) -> Reader:
        with self._opening:
            if self._reader is None:
                session = Session.current()

                def connect() -> socket.socket:
                    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                    try:
                        channel.connect(str(session.socket))
                    except BaseException:
                        channel.close()
                        raise
                    return channel

                self._reader = Reader.connect(
                    connect,
                    manifest_path=session.manifest.path,
                    sha256=session.manifest.sha256,
                )
            return self._reader
