"""An SSH agent for one key, one certificate and the processes that the keeper started.

It answers two requests: which key there is, and a signature for logging in to one of the
session's own accounts. Who asks is decided by process, not by user: another process of the
same person gets nothing, and is put on record.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kakehashi.session import keys

if TYPE_CHECKING:
    from collections.abc import Callable

FAILURE = 5
REQUEST_IDENTITIES = 11
IDENTITIES_ANSWER = 12
SIGN_REQUEST = 13
SIGN_RESPONSE = 14

# A request to sign holds a session id, a certificate and little else.
MESSAGE_LIMIT = 32 * 1024
_USERAUTH_REQUEST = 50
_METHODS = frozenset({b"publickey", b"publickey-hostbound-v00@openssh.com"})
_CREDENTIALS = struct.Struct("3i")
_REFUSED = bytes([FAILURE])


@dataclass(frozen=True)
class Peer:
    """The process at the other end of a unix socket, as the kernel recorded it."""

    pid: int
    uid: int

    @classmethod
    def of(cls, connection: socket.socket) -> Peer:
        """Ask the kernel who connected."""
        data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(data)
        return cls(pid, uid)


def login_account(data: bytes, key_blobs: frozenset[bytes]) -> str:
    """Return the account that a signature over ``data`` would log in to.

    Parameters
    ----------
    data : bytes
        What an SSH client wants signed (RFC 4252, section 7).
    key_blobs : frozenset of bytes
        SSH forms of the keys and certificates that may stand in it.

    Raises
    ------
    WireError
        It is anything but a log-in with one of these keys.
    """
    reader = keys.Reader(data)
    reader.string()
    if reader.byte() != _USERAUTH_REQUEST:
        raise keys.WireError("not a log-in")
    account = reader.string()
    service, method = reader.string(), reader.string()
    if service != b"ssh-connection" or method not in _METHODS or reader.byte() != 1:
        raise keys.WireError("not a log-in by key")
    reader.string()
    if reader.string() not in key_blobs:
        raise keys.WireError("a log-in by another key")
    return account.decode("ascii", "replace")


class Agent:
    """Answers the agent protocol; the loop that owns the sockets is elsewhere.

    Parameters
    ----------
    key : SigningKey
    accounts : frozenset of str
        The accounts at the store that may be logged in to.
    is_ours : callable
        Tells whether a process id belongs to an ``ssh`` that the keeper started.
    """

    def __init__(
        self, key: keys.SigningKey, accounts: frozenset[str], is_ours: Callable[[int], bool]
    ) -> None:
        self._key = key
        self._accounts = accounts
        self._is_ours = is_ours
        self._blob = keys.public_blob(key.public)
        self._blobs = frozenset({self._blob})
        self.refused: list[str] = []

    def renew(self, certificate: bytes) -> None:
        """Take note of a new certificate; log-ins by an older one are still in flight."""
        self._blobs = frozenset({*self._blobs, certificate})

    def admits(self, peer: Peer) -> bool:
        """Tell whether a process may ask; a refusal is put on record."""
        if self._is_ours(peer.pid):
            return True
        self.refused.append(f"process {peer.pid} of uid {peer.uid}")
        return False

    def answer(self, request: bytes) -> bytes:
        """Return the answer to one request (both without their length).

        Anything that is not understood or not allowed is answered with a failure.
        """
        reader = keys.Reader(request)
        try:
            kind = reader.byte()
            if kind == REQUEST_IDENTITIES and not reader.rest():
                return (
                    bytes([IDENTITIES_ANSWER]) + struct.pack(">I", 1) + keys.pack(self._blob, b"")
                )
            if kind == SIGN_REQUEST:
                blob, data = reader.string(), reader.string()
                if blob == self._blob and login_account(data, self._blobs) in self._accounts:
                    signature = keys.pack(keys.ALGORITHM.encode(), self._key.sign(data))
                    return bytes([SIGN_RESPONSE]) + keys.pack(signature)
        except keys.WireError:
            pass
        return _REFUSED


class Conversation:
    """One connection's bytes, cut into requests.

    Raises
    ------
    WireError
        By :meth:`feed`: the peer announces more than a request may hold.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._pending = b""

    def feed(self, data: bytes) -> bytes:
        """Take bytes from the peer and return the bytes to send back."""
        self._pending += data
        answers = b""
        while len(self._pending) >= 4:
            length = int.from_bytes(self._pending[:4], "big")
            if not 0 < length <= MESSAGE_LIMIT:
                raise keys.WireError(f"a request of {length} bytes")
            if len(self._pending) < 4 + length:
                break
            answers += keys.pack(self._agent.answer(self._pending[4 : 4 + length]))
            self._pending = self._pending[4 + length :]
        return answers
