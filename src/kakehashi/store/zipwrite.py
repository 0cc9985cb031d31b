"""A zarr store that writes each member once, uncompressed, into a zip file."""

from __future__ import annotations

import contextlib
import threading
import zipfile
from typing import TYPE_CHECKING, BinaryIO

from zarr.abc.store import ByteRequest, Store

from kakehashi.errors import PackError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from zarr.core.buffer import Buffer, BufferPrototype

# zarr looks at the groups above when it makes an array.
_DOCUMENT = "zarr.json"

# The same series gives the same bytes, whenever and wherever it is packed.
_EPOCH = (1980, 1, 1, 0, 0, 0)


class ZipWriter(Store):
    """Write-once: a key that is set twice is an error, never a second member.

    Parameters
    ----------
    file : BinaryIO
        Where the zip goes; it must be seekable.
    comment : bytes
        The zip's comment.
    """

    supports_writes = True
    supports_deletes = False
    supports_listing = False

    def __init__(self, file: BinaryIO, comment: bytes) -> None:
        super().__init__(read_only=False)
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)
        self._zip.comment = comment
        self._names: set[str] = set()
        self._documents: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._is_open = True

    @property
    def documents(self) -> dict[str, bytes]:
        """The descriptions of groups and arrays that were written, by their name."""
        return dict(self._documents)

    def put(self, key: str, data: bytes) -> None:
        """Write a member.

        Raises
        ------
        PackError
            There is one of that name already.
        """
        with self._lock:
            if key in self._names:
                raise PackError(f"member {key!r} would be written twice; this is a defect")
            self._names.add(key)
            if key.endswith(_DOCUMENT):
                self._documents[key] = data
            info = zipfile.ZipInfo(key, date_time=_EPOCH)
            info.external_attr = 0o644 << 16
            self._zip.writestr(info, data)

    def finish(self) -> None:
        """Write the central directory."""
        with self._lock:
            self._zip.close()

    def abandon(self) -> None:
        """Let go of the file after an error; what it holds by now is of no use."""
        with contextlib.suppress(OSError, ValueError):
            self.finish()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    async def get(
        self,
        key: str,
        prototype: BufferPrototype,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """Return a description that zarr wrote; chunks are never read back."""
        if key in self._documents and byte_range is None:
            return prototype.buffer.from_bytes(self._documents[key])
        if key in self._names:
            raise PackError(f"member {key!r} was written and is asked for; this is a defect")
        return None

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        """See :meth:`get`."""
        return [await self.get(key, prototype, part) for key, part in key_ranges]

    async def exists(self, key: str) -> bool:
        """Say whether a member was written."""
        return key in self._names

    async def set(self, key: str, value: Buffer) -> None:
        """Write a member."""
        self.put(key, value.to_bytes())

    async def delete(self, key: str) -> None:
        """Do nothing for a member that is not there; refuse for one that is.

        zarr deletes chunks that hold nothing but the fill value instead of writing them.
        """
        if key in self._names:
            raise PackError(f"member {key!r} was written and cannot be taken back")

    async def list(self) -> AsyncIterator[str]:
        """Yield the names written so far."""
        for name in sorted(self._names):
            yield name

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names that begin with `prefix`."""
        for name in sorted(self._names):
            if name.startswith(prefix):
                yield name

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield what lies directly under `prefix`."""
        base = prefix.rstrip("/") + "/" if prefix else ""
        heads = {n[len(base) :].split("/")[0] for n in self._names if n.startswith(base)}
        for name in sorted(heads):
            yield name
