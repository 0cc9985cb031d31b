"""The log of the store's sshd: who wrote each line is the kernel's word, not the line's.

sshd prints what strangers send, a line break in an account's name included, so the text alone
cannot tell a message from an imitation. Its standard error is therefore a socket that keeps one
message one message and names the process that wrote it. The supervisor writes the file, which
the authority's account may read and nobody else but root.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
import time
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LARGEST = 8 * 1024 * 1024
"""Bytes after which a log is put aside; one older log is kept."""

AT_ONCE = 256
"""Messages that are written down before others have their turn."""

_MESSAGE = 4096
_CREDENTIALS = struct.Struct("3i")
_CONTROL = re.compile(rb"[^\x20-\x7e]")
_LINE = re.compile(rb"([0-9]{1,10}\.[0-9]{3}) ([0-9]{1,10}) (.*)")
_CHUNK = 64 * 1024
_HEAD = 40


@dataclass(frozen=True)
class Entry:
    r"""One message of sshd.

    Attributes
    ----------
    time : float
        Seconds since 1970 at which it was written down.
    pid : int
        The process that wrote it, as the store's processes see it.
    text : str
        Printable ASCII; other bytes stand as ``\xNN``.
    """

    time: float
    pid: int
    text: str


@dataclass(frozen=True)
class Position:
    """A place in the log.

    Attributes
    ----------
    inode : int
        Which file.
    offset : int
        Bytes before the place.
    head : str
        How the file begins, as another one may have got its number.
    """

    inode: int
    offset: int
    head: str

    @classmethod
    def load(cls, path: Path) -> Position | None:
        """Read a place; ``None`` where none was kept."""
        try:
            found = cls(**json.loads(path.read_text(encoding="ascii")))
        except (OSError, ValueError, TypeError):
            return None
        sound = type(found.inode) is int and type(found.offset) is int and found.offset >= 0
        return found if sound and isinstance(found.head, str) else None

    def save(self, path: Path) -> None:
        """Keep the place."""
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(asdict(self)), encoding="ascii")
        part.rename(path)


def older(path: Path) -> Path:
    """Return where a log lies once it was put aside."""
    return path.with_name(path.name + ".1")


class LogWriter:
    """Takes sshd's messages from a socket and writes them down, as root.

    Parameters
    ----------
    path : Path
    group : int
        The group that may read the file.
    """

    def __init__(self, path: Path, group: int) -> None:
        self._path = path
        self._group = group
        self._receiver, self.sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._receiver.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._receiver.settimeout(0)
        self._torn = False
        self._file = self._open()

    def fileno(self) -> int:
        """Return what becomes readable when there is something to write down."""
        return self._receiver.fileno()

    def write(self) -> None:
        """Write down what has come, without waiting for more."""
        lines = []
        with contextlib.suppress(BlockingIOError):
            for _ in range(AT_ONCE):
                message, ancillary, _, _ = self._receiver.recvmsg(
                    _MESSAGE, socket.CMSG_SPACE(_CREDENTIALS.size)
                )
                lines.append(_line(_pid(ancillary), message))
        if not lines:
            return
        # Logging must never end the supervisor; a full disk is the operator's to see elsewhere.
        with contextlib.suppress(OSError):
            data = b"\n" * self._torn + b"".join(lines)
            self._torn = self._file.write(data) != len(data)
            if self._file.tell() > LARGEST:
                self._put_aside()

    def _put_aside(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._path.rename(older(self._path))
        full, self._file = self._file, self._open()
        full.close()

    def _open(self) -> IO[bytes]:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        file = os.fdopen(os.open(self._path, flags, 0o600), "r+b", buffering=0)
        os.fchown(file.fileno(), 0, self._group)
        os.fchmod(file.fileno(), 0o640)
        end = file.seek(0, os.SEEK_END)
        if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
            # The last writer died over a line; the next one must not become part of it.
            file.write(b"\n")
        return file


def _pid(ancillary: list[tuple[int, int, bytes]]) -> int:
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            return int(_CREDENTIALS.unpack_from(data)[0])
    return 0


def _line(pid: int, message: bytes) -> bytes:
    text = _CONTROL.sub(lambda found: b"\\x%02x" % found[0][0], message.rstrip(b"\r\n"))
    return b"%.3f %d %s\n" % (time.time(), pid, text)


class LogReader:
    """Reads the log from its beginning, over the change from one file to the next.

    Parameters
    ----------
    path : Path
        The file that is written now; what was put aside is found beside it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._offset = 0
        self._head = ""
        self.lost = False
        """Whether lines went before they were read: somebody shortened or took away a file."""

    def close(self) -> None:
        """Let go of the file."""
        if self._file:
            self._file.close()
            self._file = None

    def holds(self, position: Position) -> bool:
        """Return whether a place is still in one of the files."""
        for path in (older(self._path), self._path):
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                status = os.fstat(file.fileno())
                if (
                    status.st_ino == position.inode
                    and status.st_size >= position.offset
                    and _head(file, position.offset) == position.head
                ):
                    return True
        return False

    def entries(self) -> Iterator[tuple[Entry, Position]]:
        """Give what came, each with the place behind it, and end where nothing more is there.

        Raises
        ------
        OSError
            A file cannot be read.
        """
        while file := self._file or self._first():
            status = os.fstat(file.fileno())
            # Asked before reading: what was written before the change is read before it too.
            current = _number(self._path)
            if status.st_size < self._offset or _head(file, len(self._head)) != self._head:
                self.lost = True
                self._begin(file)
            file.seek(self._offset)
            data = file.read(_CHUNK)
            *lines, rest = data.split(b"\n")
            self._head = head = _head(file, self._offset + len(data) - len(rest))
            for line in lines:
                # Whoever stops here goes on behind this line.
                self._offset += len(line) + 1
                if entry := _entry(line):
                    yield entry, Position(status.st_ino, self._offset, head)
            if len(rest) == _CHUNK:
                # No line of ours is that long.
                self._offset += _CHUNK
            elif len(data) < _CHUNK:
                if current in {status.st_ino, None}:
                    return
                self._next(status.st_ino)

    def _first(self) -> BinaryIO | None:
        for path in (older(self._path), self._path):
            with contextlib.suppress(FileNotFoundError):
                return self._begin(path.open("rb", buffering=0))
        return None

    def _next(self, number: int) -> None:
        """Go on with the file that came after the one that was read to its end."""
        put_aside = _number(older(self._path))
        if put_aside != number:
            # More than one file came after it, and the first of them may be gone already.
            self.lost = True
        self.close()
        path = self._path if put_aside in {number, None} else older(self._path)
        with contextlib.suppress(FileNotFoundError):
            self._begin(path.open("rb", buffering=0))

    def _begin(self, file: BinaryIO) -> BinaryIO:
        self._file = file
        self._offset = 0
        self._head = ""
        return file


def _number(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _head(file: BinaryIO, offset: int) -> str:
    return os.pread(file.fileno(), min(_HEAD, offset), 0).decode("ascii", "replace")


def _entry(line: bytes) -> Entry | None:
    found = _LINE.fullmatch(line)
    if found is None:
        return None
    return Entry(float(found[1]), int(found[2]), found[3].decode("ascii", "replace"))
