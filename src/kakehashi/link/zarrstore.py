"""A packed series as a zarr store: ``zarr.open(ZarrStore(uid))`` is its OME-Zarr group."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)

from kakehashi.imaging.ozip import ZipStore
from kakehashi.link.manifest import series_path
from kakehashi.link.processstore import ProcessStore, naming

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from zarr.core.buffer import Buffer, BufferPrototype

    from kakehashi.link.reader import Reader
    from kakehashi.link.session import Session


class ZarrStore(Store):
    """A series of the session's cohort, read-only; only the ranges asked for are fetched.

    It can be pickled, and used in processes that were forked: each opens its own channels.

    Parameters
    ----------
    uid : str
        SeriesInstanceUID.
    session : Session, Path or str, optional
        As for :class:`kakehashi.link.Store`.

    Raises
    ------
    NotInManifestError
        The cohort has no such series.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, uid: str, session: Session | Path | str | None = None) -> None:
        super().__init__(read_only=True)
        self._stores = ProcessStore(session)
        self.uid = self._stores.series(uid).uid
        self._opened: tuple[Reader, ZipStore] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"uid": self.uid, "session": self._stores.session, "open": self._is_open}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["uid"], state["session"])  # type: ignore[misc] # nothing else is kept
        self._is_open = state["open"]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ZarrStore)
            and self.uid == other.uid
            and self._stores.session == other._stores.session
        )

    __hash__ = None  # type: ignore[assignment] # as zarr's own stores: equal by content

    def __repr__(self) -> str:
        return f"ZarrStore({self.uid!r})"

    def close(self) -> None:
        """Close the channels of this process."""
        super().close()
        self._stores.close()

    def _zip(self) -> ZipStore:
        """Return the pack with its directory read; anew in a process that was forked."""
        reader = self._stores.get().reader
        opened = self._opened
        if opened is None or opened[0] is not reader:
            with naming(self.uid):
                opened = (reader, ZipStore(reader.open(series_path(self.uid))))
            self._opened = opened
        return opened[1]

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """Return a member or a part of it, None if there is none of that name."""
        if not isinstance(
            byte_range, RangeByteRequest | OffsetByteRequest | SuffixByteRequest | None
        ):
            raise TypeError(f"Unexpected byte_range, got {byte_range}")
        pack = await asyncio.to_thread(self._zip)
        with naming(self.uid):
            return await pack.get(key, prototype, byte_range)

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        """Return several parts, read at the same time."""
        return list(
            await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges))
        )

    async def exists(self, key: str) -> bool:
        """Say whether there is a member of that name."""
        return await (await asyncio.to_thread(self._zip)).exists(key)

    async def getsize(self, key: str) -> int:
        """Return a member's size, without reading it.

        Raises
        ------
        FileNotFoundError
            There is none of that name.
        """
        size = (await asyncio.to_thread(self._zip)).size_of(key)
        if size is None:
            raise FileNotFoundError(key)
        return size

    async def set(self, key: str, value: Buffer) -> None:  # noqa: ARG002 - the interface's name
        """Refuse: a pack is never changed."""
        self._check_writable()

    async def delete(self, key: str) -> None:  # noqa: ARG002 - the interface's name
        """Refuse: a pack is never changed."""
        self._check_writable()

    async def list(self) -> AsyncIterator[str]:
        """Yield all names."""
        async for name in (await asyncio.to_thread(self._zip)).list():
            yield name

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names that begin with `prefix`."""
        async for name in (await asyncio.to_thread(self._zip)).list_prefix(prefix):
            yield name

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield what lies directly under `prefix`."""
        async for name in (await asyncio.to_thread(self._zip)).list_dir(prefix):
            yield name
