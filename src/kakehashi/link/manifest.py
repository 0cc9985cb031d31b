"""The manifest: what a session may read, with size and hash of everything.

It is made at the store; its SHA-256 is in the grant. So whoever holds the hash needs to trust
nobody on the way: a manifest with another hash is not parsed at all.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import posixpath
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from kakehashi.errors import BlockMismatchError, LinkClosedError, LinkError
from kakehashi.link.sftp import MAX_READ, Data, Sftp, StatusError

if TYPE_CHECKING:
    import socket

MAX_MANIFEST_BYTES = 1 << 30
MAX_FILE_BYTES = 1 << 42

_FORMAT = 1
_BLOCK_SIZES = range(4096, 131072 + 1)
_PATH = re.compile(r"series/([0-9]+(?:\.[0-9]+)*)\.ozx")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UID_LENGTH = 64
_MISMATCHES = 4
_DEPTH = 16
_PAUSE_S = (0.05, 2.0)

Connect = Callable[[], "socket.socket"]
"""Opens one channel: a connected stream socket with an SFTP server behind it."""


class NotInManifestError(LinkError, FileNotFoundError):
    """A path that the manifest does not name."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One packed series.

    Attributes
    ----------
    path : str
        Relative path, ``series/UID.ozx``.
    uid : str
        SeriesInstanceUID, as in the path.
    size : int
        Bytes.
    blocks : str
        SHA-256 (hexadecimal) of the file with the blocks' hashes.
    series : Mapping
        The catalogue's row.
    """

    path: str
    uid: str
    size: int
    blocks: str
    series: Mapping[str, Any]

    @property
    def blocks_path(self) -> str:
        """Relative path of the file with the blocks' hashes, 32 bytes each."""
        return self.path.removesuffix(".ozx") + ".blocks"


@dataclass(frozen=True)
class Manifest:
    """A parsed and checked manifest.

    Attributes
    ----------
    project : str
        The project that it was made for.
    cohort : Mapping
        Version and hash of the frozen cohort.
    block_size : int
        Bytes a block; a file's last block may be shorter.
    files : Mapping of str to Entry
        By path, in the manifest's order.
    raw : bytes
        The text itself, as hashed.
    """

    project: str
    cohort: Mapping[str, Any]
    block_size: int
    files: Mapping[str, Entry]
    raw: bytes = field(repr=False)

    @classmethod
    def parse(cls, raw: bytes, sha256: str) -> Self:
        """Check the hash, then parse and check every field.

        Parameters
        ----------
        raw : bytes
            Text of ``manifest.json``.
        sha256 : str
            Its hash according to the grant, 64 hexadecimal digits.

        Raises
        ------
        BlockMismatchError
            The text has another hash.
        LinkError
            The text has the right hash, but breaks a rule; the store made it wrongly.
        """
        found = hashlib.sha256(raw).hexdigest()
        if found != sha256:
            raise BlockMismatchError(
                f"the manifest's SHA-256 is {found}, the grant names {sha256}: it was changed on "
                "the way or at the store; start a new session, and tell the store's operators"
            )
        try:
            data = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise LinkError("the manifest is not valid JSON; tell the store's operators") from error
        if not isinstance(data, dict) or data.get("kakehashi_manifest") != _FORMAT:
            raise LinkError(
                f"the manifest is not of format {_FORMAT}, which this version of Kakehashi reads; "
                "the software at store and node must have the same version"
            )
        project, cohort, block_size = (data.get(k) for k in ("project", "cohort", "block_size"))
        rows = data.get("files")
        if not isinstance(project, str) or not isinstance(cohort, dict):
            raise _bad("project must be a string and cohort an object")
        if type(block_size) is not int or block_size not in _BLOCK_SIZES:
            raise _bad(f"block_size must be {_BLOCK_SIZES.start} to {_BLOCK_SIZES.stop - 1}")
        if not isinstance(rows, list):
            raise _bad("files must be a list")
        files: dict[str, Entry] = {}
        for number, row in enumerate(rows):
            entry = _entry(number, row)
            if entry.path in files:
                raise _bad(f"files[{number}]: {entry.path} stands there twice")
            files[entry.path] = entry
        return cls(project, MappingProxyType(cohort), block_size, MappingProxyType(files), raw)

    @classmethod
    def fetch(
        cls,
        connect: Connect | Sequence[Connect],
        path: str,
        sha256: str,
        *,
        give_up_s: float = 60.0,
    ) -> Self:
        """Read the manifest from the store and parse it.

        Parameters
        ----------
        connect : callable or sequence of callable
            Opens a channel to the store; several are endpoints with the same files, tried in
            turn.
        path : str
            Path of the manifest at the store, as in the grant.
        sha256 : str
            Its hash, as in the grant.
        give_up_s : float
            Seconds of trying after which a store out of reach is an error.

        Raises
        ------
        BlockMismatchError
            What the store has is another text, also when read again.
        LinkClosedError
            The link is closed.
        LinkError
            The store cannot be reached, or the manifest breaks a rule.
        """
        started = time.monotonic()
        pause, longest = _PAUSE_S
        mismatches = 0
        for one in itertools.cycle([connect] if callable(connect) else connect):
            try:
                raw = _read_whole(one, path)
                return cls.parse(raw, sha256)
            except LinkClosedError:
                raise
            except BlockMismatchError:
                mismatches += 1
                if mismatches == _MISMATCHES:
                    raise
            except StatusError as error:
                raise LinkError(f"the store has no manifest for this session: {error}") from error
            except (LinkError, OSError) as error:
                if time.monotonic() - started > give_up_s:
                    raise LinkError(
                        f"the manifest could not be read within {give_up_s:g} s: {error}"
                    ) from error
            time.sleep(pause)
            pause = min(pause * 2, longest)
        raise ValueError("the store needs at least one endpoint")

    def entry(self, path: str) -> Entry:
        """Return what the manifest says about a path.

        Raises
        ------
        NotInManifestError
            Nothing: the session was not granted such a file.
        """
        try:
            return self.files[path]
        except KeyError:
            raise NotInManifestError(
                f"{path!r} is not in this session's manifest; "
                f"it names {len(self.files)} files like series/UID.ozx"
            ) from None


def series_path(uid: str) -> str:
    """Return what the manifest calls a series's packed file."""
    return f"series/{uid}.ozx"


def remote_path(manifest_path: str, path: str) -> str:
    """Return where a file of the manifest lies at the store: beside the manifest."""
    return posixpath.join(posixpath.dirname(manifest_path), path)


def _bad(what: str) -> LinkError:
    return LinkError(f"the manifest breaks a rule: {what}; tell the store's operators")


def _entry(number: int, row: object) -> Entry:
    if not isinstance(row, dict):
        raise _bad(f"files[{number}] must be an object")
    path, size, blocks, series = (row.get(k) for k in ("path", "size", "blocks", "series"))
    match = _PATH.fullmatch(path) if isinstance(path, str) else None
    if match is None or len(match[1]) > _UID_LENGTH:
        raise _bad(f"files[{number}].path must be series/UID.ozx")
    if type(size) is not int or not 0 <= size <= MAX_FILE_BYTES:
        raise _bad(f"files[{number}].size must be 0 to {MAX_FILE_BYTES}")
    if not isinstance(blocks, str) or not _SHA256.fullmatch(blocks):
        raise _bad(f"files[{number}].blocks must be 64 hexadecimal digits")
    if not isinstance(series, dict):
        raise _bad(f"files[{number}].series must be an object")
    return Entry(match[0], match[1], size, blocks, MappingProxyType(series))


def _read_whole(connect: Connect, path: str) -> bytes:
    with Sftp(connect()) as sftp:
        sftp.greet()
        handle = sftp.open(path)
        size = sftp.size(handle)
        if size > MAX_MANIFEST_BYTES:
            raise _bad(f"{size} bytes, at most {MAX_MANIFEST_BYTES} are read")
        text = bytearray(size)
        for at, piece in _pieces(sftp, handle, size):
            text[at : at + len(piece)] = piece
    return bytes(text)


def _pieces(sftp: Sftp, handle: bytes, size: int) -> Iterator[tuple[int, bytearray | memoryview]]:
    todo = deque(range(0, size, MAX_READ))
    flying: dict[int, tuple[int, int]] = {}
    while todo or flying:
        while todo and len(flying) < _DEPTH:
            at = todo.popleft()
            length = min(MAX_READ, size - at)
            flying[sftp.ask_read(handle, at, length)] = (at, length)
        sftp.flush()
        reply = sftp.receive()
        at, length = flying.pop(reply.request)
        if not isinstance(reply, Data) or len(reply.data) != length:
            raise LinkError("the manifest changed while it was read, or its end was cut off")
        yield at, reply.data
