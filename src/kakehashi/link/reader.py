"""The verified reader: ranges of files, each block checked before anyone sees a byte of it.

A file's list of block hashes is checked against the manifest, each block against that list. What
has been read stays in a small cache in memory, and a file that is read in sequence is read
ahead. Nothing is ever written to a disk.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from kakehashi.errors import BlockMismatchError, LinkError
from kakehashi.link.manifest import Connect, Entry, Manifest, remote_path
from kakehashi.link.pool import REREADS, Piece, Pool
from kakehashi.link.sftp import PATIENCE_S

if TYPE_CHECKING:
    from types import TracebackType

HASH_BYTES = 32
CACHE_BYTES = 64 << 20

_CHANNELS = 3
_DEPTH = 16
_OUT_OF_ORDER = 4
# One read, or a few side by side, is a slice or a box of a packed series, and what follows in the
# file is of no use to it: only who has read on for longer is likely to go on.
_RUN = 8
_HASH_LISTS = 256
_HASHES_AT_ONCE = 131072
_LOOK_S = 0.2


@dataclass(frozen=True)
class Stats:
    """What a reader has done so far.

    Attributes
    ----------
    bytes, blocks : int
        Verified bytes and pieces that came over the link.
    cached_blocks : int
        Blocks that a read found in memory or already on their way.
    retries : int
        Pieces read again because what came was wrong.
    reconnects : int
        Channels lost, and attempts to open one that failed.
    waiting_s : float
        Seconds that reads waited for the link, summed over threads.
    """

    bytes: int
    blocks: int
    cached_blocks: int
    retries: int
    reconnects: int
    waiting_s: float


_Key = tuple[str, int]
Interrupted = Callable[[], bool]


class Reader:
    """Reads the files of a manifest through a few channels.

    Parameters
    ----------
    connect : callable
        Opens a channel: returns a connected stream socket with an SFTP server behind it. It is
        called from several threads, again after a channel was lost, and for as long as it fails
        with ``OSError`` or ``LinkError``; ``LinkClosedError`` closes the reader.
    manifest : Manifest
        What may be read.
    manifest_path : str
        Path of the manifest at the store; files lie beside it.
    channels : int
        Channels at most; they are opened when they are needed.
    cache_bytes : int
        Bound of the cache in bytes.
    patience_s : float
        Seconds of silence after which a channel that owes answers is replaced.
    """

    def __init__(
        self,
        connect: Connect,
        manifest: Manifest,
        *,
        manifest_path: str = "/manifest.json",
        channels: int = _CHANNELS,
        cache_bytes: int = CACHE_BYTES,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.manifest = manifest
        self._manifest_path = manifest_path
        self._pool = Pool(connect, channels=channels, depth=_DEPTH, patience_s=patience_s)
        self._block_size = manifest.block_size
        self._cache_blocks = max(1, cache_bytes // manifest.block_size)
        self._window = max(1, min(channels * _DEPTH, self._cache_blocks // 2))
        self._lock = threading.Lock()
        self._blocks: OrderedDict[_Key, Piece] = OrderedDict()
        self._hashes: OrderedDict[str, bytes] = OrderedDict()
        self._cached_blocks = 0
        self._waiting_s = 0.0
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, self._pool.close)

    def __repr__(self) -> str:
        return (
            f"<Reader of {len(self.manifest.files)} files of project {self.manifest.project!r}, "
            f"{'open' if self._finalizer.alive else 'closed'}>"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @classmethod
    def connect(
        cls, connect: Connect, *, manifest_path: str, sha256: str, channels: int = _CHANNELS
    ) -> Self:
        """Fetch and check the manifest, then return a reader of it.

        Parameters
        ----------
        connect : callable
            As for the class.
        manifest_path, sha256 : str
            Where the manifest lies at the store, and its hash; both stand in the grant.
        channels : int
            As for the class.

        Raises
        ------
        BlockMismatchError, LinkError
            As for :meth:`Manifest.fetch`.
        """
        manifest = Manifest.fetch(connect, manifest_path, sha256)
        return cls(connect, manifest, manifest_path=manifest_path, channels=channels)

    def close(self) -> None:
        """Close every channel; reads under way end with ``LinkClosedError``."""
        self._finalizer()
        with self._lock:
            self._blocks.clear()
            self._hashes.clear()

    def stats(self) -> Stats:
        """Return the figures so far."""
        counts = self._pool.counts()
        with self._lock:
            return Stats(
                bytes=counts.bytes,
                blocks=counts.pieces,
                cached_blocks=self._cached_blocks,
                retries=counts.rereads,
                reconnects=counts.reconnects,
                waiting_s=self._waiting_s,
            )

    def open(self, path: str, *, interrupted: Interrupted | None = None) -> File:
        """Open a file of the manifest; reads and checks its list of block hashes.

        Parameters
        ----------
        path : str
            As in the manifest, ``series/UID.ozx``.
        interrupted : callable, optional
            Asked now and then while this waits; true ends it with ``InterruptedError``.

        Raises
        ------
        NotInManifestError
            The manifest has no such path.
        BlockMismatchError
            The list of hashes is not the one that the manifest names.
        LinkClosedError
            The link is closed.
        """
        entry = self.manifest.entry(path)
        return File(self, entry, self._hash_list(entry, interrupted))

    def _hash_list(self, entry: Entry, interrupted: Interrupted | None) -> bytes:
        with self._lock:
            known = self._hashes.get(entry.path)
            if known is not None:
                self._hashes.move_to_end(entry.path)
                return known
        size = -(-entry.size // self._block_size) * HASH_BYTES
        path = remote_path(self._manifest_path, entry.blocks_path)
        for _ in range(1 + REREADS):
            pieces = [
                Piece(path, at, min(_HASHES_AT_ONCE, size - at), None)
                for at in range(0, size, _HASHES_AT_ONCE)
            ]
            self._submit(pieces, urgent=True)
            hashes = b"".join(self._await(piece, interrupted) for piece in pieces)
            if hashlib.sha256(hashes).hexdigest() == entry.blocks:
                break
        else:
            raise BlockMismatchError(
                f"{entry.blocks_path}: the list of block hashes is not the one that the manifest "
                "names; it was changed or damaged at the store, tell the store's operators"
            )
        with self._lock:
            self._hashes[entry.path] = hashes
            while len(self._hashes) > _HASH_LISTS:
                self._hashes.popitem(last=False)
        return hashes

    def _submit(self, pieces: Sequence[Piece], *, urgent: bool) -> None:
        # The channels' threads do not live on in a child, so it would wait for ever.
        if os.getpid() != self._pid:
            raise LinkError(
                "this reader was opened before the process was forked and cannot be used here; "
                "open a Store() of your own in each worker process"
            )
        self._pool.submit(pieces, urgent=urgent)

    def _claim(self, file: File, indices: range, *, urgent: bool) -> list[Piece]:
        """Return these blocks, from the cache, on their way, or asked for now."""
        claimed: list[Piece] = []
        fresh: list[Piece] = []
        with self._lock:
            for index in indices:
                key = (file.path, index)
                piece = self._blocks.get(key)
                if piece is None or piece.error is not None:
                    piece = file._piece(index)
                    self._blocks[key] = piece
                    fresh.append(piece)
                else:
                    self._blocks.move_to_end(key)
                    self._cached_blocks += urgent
                    if urgent and not piece.done:
                        # It may wait among those read ahead; now somebody needs it.
                        fresh.append(piece)
                claimed.append(piece)
            self._trim()
        if fresh:
            self._submit(fresh, urgent=urgent)
        return claimed

    def _trim(self) -> None:
        surplus = len(self._blocks) - self._cache_blocks
        if surplus > 0:
            # What is on its way stays: it is bounded by the windows of those who read.
            oldest = (key for key, piece in self._blocks.items() if piece.done)
            for key in list(itertools.islice(oldest, surplus)):
                del self._blocks[key]

    def _await(self, piece: Piece, interrupted: Interrupted | None) -> bytearray:
        if not piece.done:
            started = time.monotonic()
            try:
                while not self._pool.wait(piece, _LOOK_S if interrupted else None):
                    if interrupted is not None and interrupted():
                        raise InterruptedError(errno.EINTR, "the read was interrupted")
            finally:
                with self._lock:
                    self._waiting_s += time.monotonic() - started
        if piece.data is None:
            error = piece.error or LinkError("the piece has neither data nor error")
            raise type(error)(*error.args)
        return piece.data


class File:
    """An open file of the manifest; made by :meth:`Reader.open`, safe to share by threads.

    Attributes
    ----------
    path : str
        As in the manifest.
    size : int
        Bytes.
    """

    def __init__(self, reader: Reader, entry: Entry, hashes: bytes) -> None:
        self.path = entry.path
        self.size = entry.size
        self._reader: Reader | None = reader
        self._hashes = hashes
        self._block_size = reader.manifest.block_size
        self._blocks = -(-entry.size // self._block_size)
        self._remote = remote_path(reader._manifest_path, entry.path)
        self._lock = threading.Lock()
        self._expected = -_OUT_OF_ORDER - 1
        self._run = 0
        self._ahead_until = 0

    def __repr__(self) -> str:
        return f"<File {self.path}, {self.size} bytes>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the reader; reading is an error from now on."""
        self._reader = None

    def read(self, offset: int, length: int, *, interrupted: Interrupted | None = None) -> bytes:
        """Return verified bytes.

        Parameters
        ----------
        offset, length : int
            The range in bytes; what lies behind the file's end is left out.
        interrupted : callable, optional
            As for :meth:`Reader.open`.

        Returns
        -------
        bytes
            ``length`` bytes, fewer only at the end of the file.

        Raises
        ------
        BlockMismatchError
            The bytes are not those that the manifest names, also when read again.
        LinkClosedError
            The link is closed.
        LinkError
            The store refuses to give the bytes.
        """
        reader = self._reader
        if reader is None:
            raise ValueError(f"{self.path} is closed; open it again")
        if offset < 0 or length < 0:
            raise ValueError(f"offset and length must not be negative: {offset}, {length}")
        end = min(offset + length, self.size)
        if offset >= end:
            return b""
        block = self._block_size
        first, stop = offset // block, -(-end // block)
        ahead = self._plan(first, stop, reader._window)
        out = io.BytesIO()
        flying: deque[Piece] = deque()
        claimed = first
        for index in range(first, stop):
            if claimed < stop and len(flying) <= reader._window // 2:
                until = min(stop, claimed + reader._window - len(flying))
                flying.extend(reader._claim(self, range(claimed, until), urgent=True))
                claimed = until
                if claimed == stop and ahead:
                    reader._claim(self, ahead, urgent=False)
            data = memoryview(reader._await(flying.popleft(), interrupted))
            at = index * block
            out.write(data[max(offset - at, 0) : end - at])
        return out.getvalue()

    def _piece(self, index: int) -> Piece:
        at = index * self._block_size
        digest = self._hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]
        return Piece(self._remote, at, min(self._block_size, self.size - at), digest)

    def _plan(self, first: int, stop: int, window: int) -> range:
        """Return the blocks to read ahead: none at first, more the longer the run."""
        with self._lock:
            # Several threads that share a sequence come in slightly out of order.
            if abs(first - self._expected) <= _OUT_OF_ORDER:
                self._run += max(0, stop - self._expected)
                self._expected = max(self._expected, stop)
            else:
                self._run = 0
                self._expected = stop
                self._ahead_until = 0
            if self._run < _RUN:
                return range(0)
            reach = min(window, self._run)
            begin = max(stop, self._ahead_until)
            if begin - stop > reach // 2:
                return range(0)
            self._ahead_until = min(stop + reach, self._blocks)
            return range(begin, self._ahead_until)
