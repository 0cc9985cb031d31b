"""Whole protocol data units from a socket, through one buffer that is used again and again."""

from __future__ import annotations

import socket
import struct
import time

from kakehashi.store.receive.pdu import AbortReason, ProtocolError

MAX_LENGTH = 1 << 18
"""Longest body of a unit that we take, in bytes; said to the peer for P-DATA."""

_HEAD = struct.Struct(">BxI")
_BUFFER = 4 * MAX_LENGTH
_LINGER_S = 2.0
_LINGER_BYTES = 64 << 20


class Wire:
    """One end of an association.

    Parameters
    ----------
    connection : socket
        Plain or TLS.
    idle_s : float
        Time in which ``MAX_LENGTH`` bytes must come, or all up to the next :meth:`renew`; else
        a call raises ``TimeoutError``, after twice that time at the latest.
    """

    def __init__(self, connection: socket.socket, idle_s: float) -> None:
        self._socket = connection
        self._idle_s = idle_s
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self.renew()
        self._network = connection.family in {socket.AF_INET, socket.AF_INET6}
        connection.settimeout(idle_s)
        if self._network:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def renew(self) -> None:
        """Give the peer its full time again: it has brought something to an end."""
        self._until, self._due = time.monotonic() + self._idle_s, MAX_LENGTH

    def read(self) -> tuple[int, memoryview]:
        """Return type and body of the next unit; the body is good until the next call.

        Raises
        ------
        EOFError
            The peer closed the connection.
        TimeoutError
            It was silent, or as good as silent, for too long.
        ProtocolError
            The unit is longer than what may be sent.
        OSError
            The connection broke.
        """
        self._need(_HEAD.size)
        kind, length = _HEAD.unpack_from(self._buffer, self._start)
        if length > MAX_LENGTH:
            raise ProtocolError(
                f"a unit of type {kind} with {length} bytes is longer than {MAX_LENGTH}",
                AbortReason.INVALID_PARAMETER if kind else AbortReason.UNRECOGNIZED_PDU,
            )
        self._need(_HEAD.size + length)
        body = self._view[self._start + _HEAD.size : self._start + _HEAD.size + length]
        self._start += _HEAD.size + length
        return kind, body

    def send(self, units: bytes) -> None:
        """Send whole units."""
        self._socket.sendall(units)

    def finish(self) -> None:
        """Close, once the peer had time to read what was sent last.

        A connection that is closed while bytes lie unread in it is reset, and the peer may
        lose our last words.
        """
        until, taken = time.monotonic() + min(_LINGER_S, self._idle_s), 0
        try:
            plain = self._socket
            plain.shutdown(socket.SHUT_WR)
            while taken < _LINGER_BYTES and (left := until - time.monotonic()) > 0:
                plain.settimeout(left)
                got = plain.recv_into(self._view)
                if not got:
                    break
                taken += got
        except (OSError, ValueError):
            pass
        self._socket.close()

    def _need(self, count: int) -> None:
        """Have that many bytes in the buffer from where the next unit begins."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start + count > _BUFFER:
            left = self._end - self._start
            self._view[:left] = self._view[self._start : self._end]
            self._start, self._end = 0, left
        while self._end - self._start < count:
            got = self._socket.recv_into(self._view[self._end :])
            if not got:
                raise EOFError
            self._end += got
            if self._network:
                # Many senders send a unit's head and body apart, and wait in between for our
                # acknowledgement, which the kernel holds back for 40 ms. It forgets this soon.
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            # Whoever lets a byte drip now and then is never silent, and never done.
            self._due -= got
            if self._due <= 0:
                self.renew()
            elif time.monotonic() > self._until:
                raise TimeoutError
