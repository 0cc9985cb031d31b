"""What writing needs of SFTP version 3, on top of :mod:`kakehashi.link.sftp`.

Each method but two is one whole exchange: nothing else may be under way, and nothing is when it
returns, also where the server refused. With ``ask_write`` (and ``ask_read``) and ``turn`` much is
under way at once, both ways. After any other :class:`~kakehashi.errors.LinkError` than a refusal
the client is of no further use, and what was asked for last may have been done or not.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING

from kakehashi.errors import LinkClosedError, LinkError
from kakehashi.link.sftp import (
    ATTRIBUTES_REPLY,
    HANDLE_REPLY,
    NAMES_REPLY,
    PATIENCE_S,
    STATUS_EOF,
    STATUS_REPLY,
    Attributes,
    Data,
    Names,
    Opened,
    Reply,
    Sftp,
    Stat,
    Status,
    as_string,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

PIECE = 128 * 1024
"""Bytes in one request to read or to write."""

_DEPTH = 16
_MAX_PATH = 4095
# Buffers that are given to the kernel at once.
_BATCH = 16

_OPEN, _WRITE, _LSTAT, _FSETSTAT, _OPENDIR, _READDIR = 3, 6, 7, 10, 11, 12
_REMOVE, _MKDIR, _RMDIR, _REALPATH, _STAT, _EXTENDED = 13, 14, 15, 16, 17, 200
_FLAG_READ, _FLAG_WRITE, _FLAG_CREATE, _FLAG_EXCLUSIVE = 1, 2, 8, 32
_ATTR_MODE = 4
_NO_ATTRIBUTES = struct.pack(">I", 0)

_FSYNC, _RENAME = b"fsync@openssh.com", b"posix-rename@openssh.com"
_LINK = b"hardlink@openssh.com"


class WritingSftp(Sftp):
    """A client that reads and writes; as :class:`~kakehashi.link.sftp.Sftp` otherwise.

    Paths are text, in which bytes that are not UTF-8 stand as surrogates (as Python's own file
    names have them). All methods raise :class:`~kakehashi.link.sftp.StatusError` where the server
    refused, and :class:`~kakehashi.errors.LinkError` where it is gone or breaks the protocol.
    """

    def __init__(self, sock: socket.socket, *, patience_s: float = PATIENCE_S) -> None:
        super().__init__(sock, patience_s=patience_s)
        self._leaving: deque[memoryview] = deque()

    def greet(self) -> None:
        """Agree on the protocol's version; the server must flush and replace files."""
        super().greet()
        missing = {_FSYNC, _LINK, _RENAME} - self.extensions
        if missing:
            names = ", ".join(sorted(name.decode() for name in missing))
            raise LinkClosedError(
                f"the store's SFTP server does not offer {names}, without which no file can be "
                "replaced safely; the work folder needs OpenSSH 6.5 or newer at the store"
            )

    def stat(self, path: str, *, follow: bool = True) -> Stat:
        """Return what a path is; of a link itself without ``follow``."""
        kind = _STAT if follow else _LSTAT
        return self._stat(self._ask(kind, _path(path), ATTRIBUTES_REPLY), path)

    def fstat(self, handle: bytes) -> Stat:
        """Return what an open file is."""
        return self._stat(self.ask_size(handle), "stat")

    def real_path(self, path: str) -> str:
        """Return a path with every link in it followed."""
        reply = self._answer(self._ask(_REALPATH, _path(path), NAMES_REPLY))
        if not isinstance(reply, Names):
            self._refused(reply, path)
        if len(reply.names) != 1:
            self._broken(f"{len(reply.names)} names for one path")
        return _text(reply.names[0][0])

    def open_for_reading(self, path: str) -> bytes:
        """Open a file for reading and return its handle."""
        return self._open(path, _FLAG_READ, _NO_ATTRIBUTES)

    def open_for_writing(
        self, path: str, *, create: bool = False, exclusive: bool = False
    ) -> bytes:
        """Open a file for writing and reading and return its handle; nothing is cut off.

        Parameters
        ----------
        path : str
            The file.
        create, exclusive : bool
            Make it if it is not there; it must not be there.
        """
        flags = _FLAG_READ | _FLAG_WRITE
        flags |= (_FLAG_CREATE if create else 0) | (_FLAG_EXCLUSIVE if exclusive else 0)
        return self._open(path, flags, _NO_ATTRIBUTES)

    def check_writable(self, path: str) -> None:
        """Open a file for writing and close it, unchanged."""
        self.close_handle(self._open(path, _FLAG_WRITE, _NO_ATTRIBUTES))

    def close_handle(self, handle: bytes) -> None:
        """Close a handle."""
        self._done(self.ask_close(handle), "close")

    def write(self, handle: bytes, offset: int, data: bytes | memoryview) -> None:
        """Write all of ``data``, many requests on their way at once."""
        view = memoryview(data)
        refused: Status | None = None
        starts = iter(range(0, len(view), PIECE))
        while True:
            while refused is None and self.outstanding < _DEPTH:
                at = next(starts, None)
                if at is None:
                    break
                head = as_string(handle) + struct.pack(">Q", offset + at)
                self._ask(_WRITE, head + as_string(bytes(view[at : at + PIECE])), STATUS_REPLY)
                self.flush()
            if not self.outstanding:
                break
            reply = self.receive()
            if isinstance(reply, Status) and reply.code and refused is None:
                refused = reply
        if refused is not None:
            self._refused(refused, "write")

    def ask_write(self, handle: bytes, offset: int, data: memoryview) -> int:
        """Queue a write of at most :data:`PIECE` bytes, which must not change until it is answered.

        Sent by :meth:`turn`; return the request's number.
        """
        head = as_string(handle) + struct.pack(">QI", offset, len(data))
        start = len(self._out)
        request = self._ask(_WRITE, head, STATUS_REPLY)
        # What is not copied into the packet is part of it all the same.
        struct.pack_into(">I", self._out, start, 5 + len(head) + len(data))
        self._queue_out()
        self._leaving.append(data)
        return request

    def turn(self) -> Reply | None:
        """Send some of what is queued, or return an answer, whichever the server is ready for.

        A server that waits for its answers to be taken is not waited for in turn.
        """
        self._queue_out()
        poll = select.poll()
        poll.register(self, select.POLLIN | (select.POLLOUT if self._leaving else 0))
        ready = poll.poll(self._patience_s * 1000)
        if not ready:
            raise LinkError(f"the store was silent for {self._patience_s:g} s")
        _, events = ready[0]
        if events & ~select.POLLOUT:
            return self.receive()
        with contextlib.suppress(BlockingIOError):
            self._send_some()
        return None

    def _queue_out(self) -> None:
        if self._out:
            self._leaving.append(memoryview(bytes(self._out)))
            self._out.clear()

    def _send_some(self) -> None:
        batch = [self._leaving[number] for number in range(min(_BATCH, len(self._leaving)))]
        try:
            sent = self._sock.sendmsg(batch, (), socket.MSG_DONTWAIT)
        except BlockingIOError:
            raise
        except OSError as error:
            raise LinkError(f"the channel to the store is lost: {error}") from error
        while sent:
            first = self._leaving.popleft()
            if sent < len(first):
                self._leaving.appendleft(first[sent:])
                return
            sent -= len(first)

    def read(self, handle: bytes, offset: int, size: int) -> Iterator[bytes]:
        """Yield ``size`` bytes of an open file in order, or fewer where it ends before.

        Reads are on their way ahead of what was yielded: the iterator must be used up before
        anything else is asked.
        """
        asked: deque[tuple[int, int]] = deque()
        arrived: dict[int, bytes | Status] = {}
        at, ahead, end = offset, offset, offset + size
        while at < end:
            while len(asked) < _DEPTH and ahead < end:
                length = min(PIECE, end - ahead)
                asked.append((self.ask_read(handle, ahead, length), length))
                ahead += length
            self.flush()
            request, length = asked.popleft()
            piece = self._piece(request, arrived)
            if isinstance(piece, Status):
                self._drain(asked, arrived)
                if piece.code != STATUS_EOF:
                    self._refused(piece, "read")
                return
            at += len(piece)
            yield piece
            if len(piece) < length:
                # A short answer may be the end or not: what follows it is asked for again.
                self._drain(asked, arrived)
                ahead = at

    def fsync(self, handle: bytes) -> None:
        """Have everything that was written to a handle stand on the store's disk."""
        self._done(
            self._ask(_EXTENDED, as_string(_FSYNC) + as_string(handle), STATUS_REPLY), "flush"
        )

    def fsync_folder(self, path: str) -> None:
        """Have a folder's names stand on the store's disk."""
        handle = self.open_for_reading(path)
        flushed = self._ask(_EXTENDED, as_string(_FSYNC) + as_string(handle), STATUS_REPLY)
        reply = self._answer(flushed)
        self.close_handle(handle)
        if not isinstance(reply, Status) or reply.code:
            self._refused(reply, path)

    def rename(self, old: str, new: str) -> None:
        """Give a file or folder another name in one step; a file that has it is replaced."""
        body = as_string(_RENAME) + _path(old) + _path(new)
        self._done(self._ask(_EXTENDED, body, STATUS_REPLY), new)

    def link(self, old: str, new: str) -> None:
        """Give a file a second name, which nothing has yet."""
        body = as_string(_LINK) + _path(old) + _path(new)
        self._done(self._ask(_EXTENDED, body, STATUS_REPLY), new)

    def mkdir(self, path: str) -> None:
        """Make a folder."""
        self._done(self._ask(_MKDIR, _path(path) + _NO_ATTRIBUTES, STATUS_REPLY), path)

    def rmdir(self, path: str) -> None:
        """Remove an empty folder."""
        self._done(self._ask(_RMDIR, _path(path), STATUS_REPLY), path)

    def remove(self, path: str) -> None:
        """Remove a file or a link."""
        self._done(self._ask(_REMOVE, _path(path), STATUS_REPLY), path)

    def set_mode(self, handle: bytes, mode: int) -> None:
        """Set an open file's rights."""
        self._done(
            self._ask(
                _FSETSTAT, as_string(handle) + struct.pack(">II", _ATTR_MODE, mode), STATUS_REPLY
            ),
            "set rights",
        )

    def list(self, path: str) -> list[tuple[str, Stat]]:
        """Return a folder's entries, links as links, without ``.`` and ``..``."""
        reply = self._answer(self._ask(_OPENDIR, _path(path), HANDLE_REPLY))
        if not isinstance(reply, Opened):
            self._refused(reply, path)
        handle, found = reply.handle, []
        while True:
            reply = self._answer(self._ask(_READDIR, as_string(handle), NAMES_REPLY))
            if not isinstance(reply, Names):
                break
            if not reply.names:
                self._broken("a part of a folder without any names")
            for raw, stat in reply.names:
                if not raw or b"/" in raw or b"\0" in raw:
                    self._broken("a name that no file can have")
                if raw not in {b".", b".."}:
                    found.append((_text(raw), stat))
        self.close_handle(handle)
        if not isinstance(reply, Status) or reply.code != STATUS_EOF:
            self._refused(reply, path)
        return found

    def _open(self, path: str, flags: int, attributes: bytes) -> bytes:
        body = _path(path) + struct.pack(">I", flags) + attributes
        reply = self._answer(self._ask(_OPEN, body, HANDLE_REPLY))
        return reply.handle if isinstance(reply, Opened) else self._refused(reply, path)

    def _stat(self, request: int, what: str) -> Stat:
        reply = self._answer(request)
        return reply.stat if isinstance(reply, Attributes) else self._refused(reply, what)

    def _done(self, request: int, what: str) -> None:
        reply = self._answer(request)
        if not isinstance(reply, Status) or reply.code:
            self._refused(reply, what)

    def _piece(self, request: int, arrived: dict[int, bytes | Status]) -> bytes | Status:
        """Return the answer to one read, whichever order the server answers in."""
        while request not in arrived:
            reply = self.receive()
            if isinstance(reply, Data):
                arrived[reply.request] = bytes(reply.data)
            elif isinstance(reply, Status):
                arrived[reply.request] = reply
            else:
                self._refused(reply, "read")
        return arrived.pop(request)

    def _drain(self, asked: deque[tuple[int, int]], arrived: dict[int, bytes | Status]) -> None:
        while asked:
            self._piece(asked.popleft()[0], arrived)


def _path(path: str) -> bytes:
    raw = path.encode("utf-8", "surrogateescape")
    if not raw or b"\0" in raw or len(raw) > _MAX_PATH:
        raise ValueError(f"a path has 1 to {_MAX_PATH} bytes, none of them zero")
    return as_string(raw)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
