"""TCP relays between the node's network and the payload's empty one.

A socket of the node's network must never reach the payload: it could be disconnected and
connected anew to any host. So bytes are copied here, between one socket of each network.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from typing import TYPE_CHECKING, TypeVar

from kakehashi.session import syscalls

if TYPE_CHECKING:
    from collections.abc import Callable

CONNECTIONS = 512
_CHUNK = 1 << 18

_Made = TypeVar("_Made")


class NetworkThread:
    """A thread inside another network namespace, which makes sockets there for others.

    Parameters
    ----------
    namespace : int
        File descriptor of the network namespace; closed once entered.

    Raises
    ------
    OSError
        The namespace cannot be entered.
    """

    def __init__(self, namespace: int) -> None:
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()
        try:
            self.make(lambda: syscalls.setns(namespace, syscalls.CLONE_NEWNET))
        finally:
            with contextlib.suppress(OSError):
                socket.close(namespace)

    def _work(self) -> None:
        while True:
            self._orders.get()()

    def make(self, maker: Callable[[], _Made]) -> _Made:
        """Run ``maker`` in the namespace and return what it gives."""
        answers: queue.SimpleQueue[tuple[_Made | None, BaseException | None]] = queue.SimpleQueue()

        def order() -> None:
            try:
                answers.put((maker(), None))
            except BaseException as error:  # handed to the caller below
                answers.put((None, error))

        self._orders.put(order)
        value, error = answers.get()
        if error is not None:
            raise error
        return value  # type: ignore[return-value]  # None only where maker returns None


class Relay:
    """Accepts connections on one side and opens one on the other side for each.

    Parameters
    ----------
    listener : socket.socket
        Listening socket; the relay owns it.
    connect : callable
        Opens the connection to the other side.
    """

    def __init__(self, listener: socket.socket, connect: Callable[[], socket.socket]) -> None:
        self._listener = listener
        self._connect = connect
        self._free = threading.BoundedSemaphore(CONNECTIONS)

    def start(self) -> None:
        """Begin to accept."""
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if not self._free.acquire(blocking=False):
                near.close()
                continue
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        try:
            with near:
                try:
                    far = self._connect()
                except OSError:
                    return
                with far:
                    for end in (near, far):
                        with contextlib.suppress(OSError):
                            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    back = threading.Thread(target=_copy, args=(far, near), daemon=True)
                    back.start()
                    _copy(near, far)
                    back.join()
        finally:
            self._free.release()


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Copy until the end of ``source``, and pass the end on."""
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with contextlib.suppress(OSError):
        while count := source.recv_into(buffer):
            target.sendall(view[:count])
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
    # Where the copy broke, the other direction must not wait for ever either.
    with contextlib.suppress(OSError):
        source.shutdown(socket.SHUT_RD)
