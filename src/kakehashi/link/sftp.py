"""SFTP version 3 over one connected stream socket: the conversation, and what reading needs.

One thread owns a client. Requests are queued with ``ask_*`` and leave together with
:meth:`Sftp.flush`; :meth:`Sftp.receive` gives the answers in the order in which the server
sends them, so many reads can be on their way at once. Every answer is checked against the
request it belongs to before memory is set aside for it; what does not fit is a
:class:`~kakehashi.errors.LinkError`, after which the client is of no further use.

What writing needs on top is :mod:`kakehashi.link.sftpwrite`.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Self

from kakehashi.errors import LinkError

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_PACKET = 1 << 20
MAX_READ = 255 * 1024
"""Longest read that OpenSSH's server answers in full."""

PATIENCE_S = 60.0
"""How long a server may stay silent in the middle of an answer."""

STATUS_EOF = 1
STATUS_NO_SUCH_FILE = 2
STATUS_PERMISSION_DENIED = 3

_MAX_HANDLE = 256
_MAX_REQUEST_ID = 0xFFFFFFFF
_VERSION = 3

_INIT, _VERSION_REPLY, _OPEN, _CLOSE, _READ, _FSTAT = 1, 2, 3, 4, 5, 8
STATUS_REPLY, HANDLE_REPLY, _DATA, NAMES_REPLY, ATTRIBUTES_REPLY = 101, 102, 103, 104, 105
_FLAG_READ = 1
_ATTR_SIZE, _ATTR_OWNER, _ATTR_MODE, _ATTR_TIMES, _ATTR_EXTENDED = 1, 2, 4, 8, 1 << 31

_HEAD = struct.Struct(">IB")
_HEAD_ID = struct.Struct(">IBI")
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")
_RANGE = struct.Struct(">QI")


class Opened(NamedTuple):
    """Answer to an open: the handle."""

    request: int
    handle: bytes


class Data(NamedTuple):
    """Answer to a read: at most the bytes asked for, possibly fewer."""

    request: int
    data: bytearray | memoryview


class Stat(NamedTuple):
    """What a server says of a file; ``None`` is what it did not say.

    Attributes
    ----------
    size : int or None
        Bytes.
    mode : int or None
        Kind and rights, as in ``st_mode``.
    modified : int or None
        Seconds since 1970.
    """

    size: int | None
    mode: int | None
    modified: int | None


class Attributes(NamedTuple):
    """Answer to a stat."""

    request: int
    stat: Stat


class Names(NamedTuple):
    """Answer to the reading of a folder, or to the question for a path: names as bytes."""

    request: int
    names: tuple[tuple[bytes, Stat], ...]


class Status(NamedTuple):
    """Answer that is only a status; 0 means done."""

    request: int
    code: int
    message: str


Reply = Opened | Data | Attributes | Names | Status


class StatusError(LinkError):
    """The server refused a request.

    Attributes
    ----------
    code : int
        SFTP status code, e.g. 2 for no such file.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Sftp:
    """A client on a connected stream socket, which it owns from then on.

    The conversation begins with :meth:`greet`.

    Parameters
    ----------
    sock : socket.socket
        Connected stream socket; the server's first word has not been read yet.
    patience_s : float
        Seconds of silence in the middle of an answer after which the server counts as lost.
    """

    def __init__(self, sock: socket.socket, *, patience_s: float = PATIENCE_S) -> None:
        self._sock = sock
        self._patience_s = patience_s
        self._out = bytearray()
        self._next_id = 0
        self._expected: dict[int, tuple[int, int, Callable[[], memoryview | None] | None]] = {}
        self.extensions: frozenset[bytes] = frozenset()
        """Names of what the server can do beyond version 3, known after the greeting."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def greet(self) -> None:
        """Agree on the protocol's version.

        Raises
        ------
        LinkError
            The other side does not speak SFTP version 3, or is gone.
        """
        try:
            # The kernel's own time-out, so that one call can wait for a whole block; a
            # time-out of the socket object would turn each call into a poll and a piece.
            self._sock.settimeout(None)
            limit = struct.pack("ll", int(self._patience_s), int(self._patience_s % 1 * 1e6))
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        except OSError as error:
            raise LinkError(f"the channel to the store failed: {error}") from error
        self._out += struct.pack(">IBI", 5, _INIT, _VERSION)
        self.flush()
        length, kind = _HEAD.unpack(self._take(_HEAD.size))
        if kind != _VERSION_REPLY or not 5 <= length <= MAX_PACKET:
            self._broken("something else than the greeting of an SFTP server")
        body = _Body(bytes(self._take(length - 1)))
        version = body.number()
        if version != _VERSION:
            self._broken(f"protocol version {version} where {_VERSION} was asked for")
        self.extensions = frozenset(body.pairs())

    def close(self) -> None:
        """Close the socket; handles end with it."""
        with contextlib.suppress(OSError):
            self._sock.close()

    def abort(self) -> None:
        """End the conversation from another thread: whoever waits in it gets a LinkError."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def fileno(self) -> int:
        """Return the socket's descriptor, for polling."""
        return self._sock.fileno()

    @property
    def outstanding(self) -> int:
        """Number of requests without an answer."""
        return len(self._expected)

    def ask_open(self, path: str) -> int:
        """Queue the opening of a file for reading; return the request's number."""
        body = as_string(path.encode()) + struct.pack(">II", _FLAG_READ, 0)
        return self._ask(_OPEN, body, HANDLE_REPLY)

    def ask_read(
        self,
        handle: bytes,
        offset: int,
        length: int,
        place: Callable[[], memoryview | None] | None = None,
    ) -> int:
        """Queue a read of ``length`` bytes (at most ``MAX_READ``); return its number.

        ``place`` is asked, when the answer comes, for ``length`` bytes of memory to put it
        into; with ``None``, from it or in its stead, the answer gets memory of its own.
        """
        if not 0 < length <= MAX_READ or offset < 0:
            raise ValueError(f"a read must ask for 1 to {MAX_READ} bytes from 0 on")
        body = as_string(handle) + _RANGE.pack(offset, length)
        return self._ask(_READ, body, _DATA, length, place)

    def ask_size(self, handle: bytes) -> int:
        """Queue the question for an open file's size; return the request's number."""
        return self._ask(_FSTAT, as_string(handle), ATTRIBUTES_REPLY)

    def ask_close(self, handle: bytes) -> int:
        """Queue the closing of a handle; return the request's number."""
        return self._ask(_CLOSE, as_string(handle), STATUS_REPLY)

    def flush(self) -> None:
        """Send what is queued.

        Raises
        ------
        LinkError
            The other side is gone, or does not take anything.
        """
        if not self._out:
            return
        try:
            self._sock.sendall(self._out)
        except OSError as error:
            raise LinkError(f"the channel to the store is lost: {error}") from error
        self._out.clear()

    def receive(self) -> Reply:
        """Return the next answer.

        Raises
        ------
        LinkError
            The channel is lost, silent for too long, or the answer breaks the protocol.
        """
        head = self._take(_HEAD_ID.size)
        length, kind, request = _HEAD_ID.unpack(head)
        if not 5 <= length <= MAX_PACKET:
            self._broken(f"a packet of {length} bytes (5 to {MAX_PACKET} are possible)")
        if request not in self._expected:
            self._broken(f"an answer to request {request}, which is not open")
        wanted, limit, place = self._expected[request]
        if kind not in (wanted, STATUS_REPLY):
            self._broken(f"an answer of type {kind} where {wanted} was due")
        rest = length - 5
        reply: Reply
        if kind == _DATA:
            reply = Data(request, self._data(rest, limit, place))
        else:
            body = _Body(bytes(self._take(rest)))
            if kind == HANDLE_REPLY:
                reply = Opened(request, body.handle())
            elif kind == ATTRIBUTES_REPLY:
                reply = Attributes(request, body.stat())
            elif kind == NAMES_REPLY:
                reply = Names(request, body.names())
            else:
                reply = body.status(request)
                if reply.code == 0 and wanted != STATUS_REPLY:
                    self._broken("a bare success where a result was due")
        del self._expected[request]
        return reply

    def open(self, path: str) -> bytes:
        """Open a file for reading and return its handle; nothing else may be under way.

        Raises
        ------
        StatusError
            The server refused, e.g. there is no such file.
        LinkError
            As for :meth:`receive`.
        """
        reply = self._answer(self.ask_open(path))
        return reply.handle if isinstance(reply, Opened) else self._refused(reply, path)

    def size(self, handle: bytes) -> int:
        """Return an open file's size in bytes; nothing else may be under way.

        Raises
        ------
        LinkError
            As for :meth:`open`; also if the server does not tell the size.
        """
        reply = self._answer(self.ask_size(handle))
        if not isinstance(reply, Attributes):
            self._refused(reply, "stat")
        if reply.stat.size is None:
            self._broken("attributes without a size")
        return reply.stat.size

    def _answer(self, request: int) -> Reply:
        if self.outstanding > 1:
            raise RuntimeError("a question with one answer, while others are under way")
        self.flush()
        reply = self.receive()
        assert reply.request == request  # noqa: S101 - only one request was open
        return reply

    @staticmethod
    def _refused(reply: Reply, what: str) -> NoReturn:
        if isinstance(reply, Status):
            raise StatusError(reply.code, f"{what}: the store refused: {reply.message}")
        raise LinkError(f"{what}: the store gave another kind of answer")

    def _ask(
        self,
        kind: int,
        body: bytes,
        answer: int,
        limit: int = 0,
        place: Callable[[], memoryview | None] | None = None,
    ) -> int:
        self._next_id = (self._next_id + 1) & _MAX_REQUEST_ID
        self._expected[self._next_id] = (answer, limit, place)
        self._out += _HEAD_ID.pack(5 + len(body), kind, self._next_id)
        self._out += body
        return self._next_id

    def _data(
        self, rest: int, limit: int, place: Callable[[], memoryview | None] | None
    ) -> bytearray | memoryview:
        if rest < 4:
            self._broken("a data packet without a length")
        (count,) = _U32.unpack(self._take(4))
        if count != rest - 4 or not 0 < count <= limit:
            self._broken(f"{count} bytes of data, {limit} were asked for")
        room = place() if place is not None else None
        if room is None:
            return self._take(count)
        self._fill(room[:count])
        return room[:count]

    def _take(self, count: int) -> bytearray:
        buffer = bytearray(count)
        self._fill(memoryview(buffer))
        return buffer

    def _fill(self, view: memoryview) -> None:
        started = time.monotonic()
        while view:
            try:
                got = self._sock.recv_into(view, flags=socket.MSG_WAITALL)
            except BlockingIOError:
                got = None
            except OSError as error:
                raise LinkError(f"the channel to the store is lost: {error}") from error
            if got == 0:
                raise LinkError("the channel to the store is lost: the other side closed it")
            view = view[got or 0 :]
            if view and time.monotonic() - started >= self._patience_s:
                raise LinkError(
                    f"the store was silent for {self._patience_s:g} s in the middle of an answer"
                )

    @staticmethod
    def _broken(what: str) -> NoReturn:
        raise LinkError(f"the store broke the SFTP protocol: it sent {what}")


def as_string(data: bytes) -> bytes:
    """Return bytes as a field of a packet, with their length before them."""
    return _U32.pack(len(data)) + data


class _Body:
    """The rest of a packet, read field by field."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self) -> int:
        (value,) = _U32.unpack(self._bytes(4))
        return int(value)

    def _string(self) -> bytes:
        return self._bytes(self.number())

    def _bytes(self, count: int) -> bytes:
        piece = self._data[self._at : self._at + count]
        if len(piece) != count:
            raise LinkError("the store broke the SFTP protocol: it sent a packet with a cut field")
        self._at += count
        return piece

    def handle(self) -> bytes:
        handle = self._string()
        if not 0 < len(handle) <= _MAX_HANDLE or self._at != len(self._data):
            raise LinkError(
                f"the store broke the SFTP protocol: a handle has 1 to {_MAX_HANDLE} bytes"
            )
        return handle

    def pairs(self) -> list[bytes]:
        """Return the first of each two strings to the packet's end."""
        found = []
        while self._at < len(self._data):
            found.append(self._string())
            self._string()
        return found

    def names(self) -> tuple[tuple[bytes, Stat], ...]:
        found = []
        for _ in range(self.number()):
            name = self._string()
            self._string()  # the line that `ls -l` would show
            found.append((name, self.stat()))
        return tuple(found)

    def stat(self) -> Stat:
        flags = self.number()
        size = mode = modified = None
        if flags & _ATTR_SIZE:
            (size,) = _U64.unpack(self._bytes(8))
        if flags & _ATTR_OWNER:
            self._bytes(8)
        if flags & _ATTR_MODE:
            mode = self.number()
        if flags & _ATTR_TIMES:
            self.number()
            modified = self.number()
        if flags & _ATTR_EXTENDED:
            for _ in range(self.number()):
                self._string()
                self._string()
        return Stat(size, mode, modified)

    def status(self, request: int) -> Status:
        code = self.number()
        # Servers of version 3 may leave the text out.
        text = self._string() if self._at < len(self._data) else b""
        return Status(request, code, text[:200].decode("utf-8", "replace"))
