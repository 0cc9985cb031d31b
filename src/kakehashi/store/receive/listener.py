"""``kakehashi store receive``: one process for each association, and one that gives objects places.

An association's process writes its object and makes it durable; then it asks this one for the
object's place. Requests that came while the disk was busy share the next round of waiting for
it, however many associations there are.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import select
import signal
import socket
import ssl
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from kakehashi.errors import StoreError
from kakehashi.store.confine import limit_memory, memory_in_use
from kakehashi.store.layout import locked
from kakehashi.store.receive.asking import FULL, MESSAGE, WELCOME, Asker, understand
from kakehashi.store.receive.association import Association, Host, Stopped
from kakehashi.store.receive.inbox import Inbox
from kakehashi.store.receive.offer import Offer, Verdict
from kakehashi.store.receive.senders import Senders
from kakehashi.store.receive.walls import enclose, missing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import FrameType

    from kakehashi.store.receive.settings import Receive

_BACKLOG = 128
_REFUSING = 8
"""Associations beyond the limit that are told so; still more are closed without a word."""
_QUIET_S = 60
"""Time between two complaints about the same thing."""
_PR_SET_PDEATHSIG = 1
_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class _Child:
    """A process that serves one association."""

    pid: int
    address: str
    channel: socket.socket
    refusing: bool
    facilities: frozenset[str]
    """Whose it may be; one, as soon as the caller has said its name."""


def listen(settings: Receive) -> socket.socket:
    """Open the socket on which senders call.

    Raises
    ------
    StoreError
        The address or port cannot be had.
    """
    family = socket.AF_INET6 if ":" in settings.bind else socket.AF_INET
    try:
        return socket.create_server((settings.bind, settings.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise StoreError(
            f"cannot listen on {settings.bind}, port {settings.port}: {error.strerror}; see "
            "store.receive.bind and store.receive.port"
        ) from error


def serve(
    root: Path,
    settings: Receive,
    server: socket.socket,
    ready: Callable[[], None],
    become: Callable[[], None] = lambda: None,
) -> None:
    """Receive until SIGTERM or SIGINT.

    Parameters
    ----------
    root : Path
        ``store.root``.
    settings : Receive
    server : socket
        From :func:`listen`.
    ready : callable
        Called once, when all that was left half done is mended and senders may call.
    become : callable
        Gives up the rights that only the socket and the TLS files needed.

    Raises
    ------
    StoreError
        Another receiver has this folder, or it cannot be used.
    """
    tls = _tls(settings)
    become()
    inbox = Inbox(root, quarantine_bytes=settings.quarantine_mb << 20)
    with locked(inbox.folders.base / ".receiver", wait=False):
        _Listener(inbox, settings, server, tls).run(ready)


class _Listener:
    """The process that accepts, and gives objects their places."""

    def __init__(
        self,
        inbox: Inbox,
        settings: Receive,
        server: socket.socket,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._inbox = inbox
        self._settings = settings
        self._senders = Senders(settings)
        self._tls = tls
        self._server = server
        self._children: dict[int, _Child] = {}
        self._poll = select.poll()
        self._stopping = False
        self._quiet_until = 0.0

    def run(self, ready: Callable[[], None]) -> None:
        self._inbox.recover()
        if gaps := missing():
            _LOG.warning("associations are less confined here: no %s", ", no ".join(gaps))
        woken, waker = socket.socketpair()
        woken.settimeout(0)
        self._woken = woken
        waker.settimeout(0)
        previous = {
            number: signal.signal(number, self._on_stop)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        self._server.settimeout(0)
        self._poll.register(woken, select.POLLIN)
        self._poll.register(self._server, select.POLLIN)
        # What is there already need not be looked through in each association's process, which
        # would have to copy it first.
        gc.freeze()
        ready()
        try:
            while not self._stopping:
                self._round(None)
            self._drain()
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in previous.items():
                signal.signal(number, handler)
            for child in self._children.values():
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)
            woken.close()
            waker.close()

    def _on_stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stopping = True

    def _drain(self) -> None:
        """Let running transfers end, for as long as the settings give."""
        self._poll.unregister(self._server)
        self._server.close()
        for child in self._children.values():
            os.kill(child.pid, signal.SIGTERM)
        until = time.monotonic() + self._settings.stop_s
        while self._children and (left := until - time.monotonic()) > 0:
            self._round(left)

    def _round(self, timeout_s: float | None) -> None:
        asking: list[tuple[_Child, Offer]] = []
        ready = self._poll.poll(None if timeout_s is None else timeout_s * 1000)
        for descriptor, _ in ready:
            if child := self._children.get(descriptor):
                if (offer := self._hear(child)) is not None:
                    asking.append((child, offer))
            elif descriptor == self._woken.fileno():
                # One that is not read wakes us again and again.
                self._woken.recv(MESSAGE)
            elif not self._stopping and descriptor == self._server.fileno():
                self._accept()
        if asking:
            self._admit(asking)

    def _hear(self, child: _Child) -> Offer | None:
        """Take a message, answer it at once if that is possible, else return it."""
        try:
            message = child.channel.recv(MESSAGE)
        except OSError:
            # It was killed before it read our last answer.
            message = b""
        if not message:
            self._ended(child)
            return None
        try:
            incoming = self._inbox.folders.incoming
            asked = understand(message, child.pid, child.facilities, incoming)
        except Exception:  # whatever one process says must not end the others
            _LOG.exception("%s: the association's process is out of its mind", child.address)
            os.kill(child.pid, signal.SIGKILL)
            return None
        if isinstance(asked, Offer):
            return asked
        child.facilities = frozenset((asked,))
        full = self._served(asked) > self._settings.max_of_one_facility
        child.refusing |= full
        self._tell(child, FULL if full else WELCOME)
        return None

    def _admit(self, asking: list[tuple[_Child, Offer]]) -> None:
        try:
            verdicts = self._inbox.admit([offer for _, offer in asking])
        except OSError as error:
            _LOG.error("objects cannot be given their places (%s); they are refused", error)
            verdicts = [Verdict.FAILED] * len(asking)
        if Verdict.CROWDED in verdicts:
            self._say_crowded()
        for (child, _), verdict in zip(asking, verdicts, strict=True):
            self._tell(child, verdict.encode())

    def _say_crowded(self) -> None:
        """Log that the quarantine is full; not for each object that a sender tries again."""
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + _QUIET_S
            _LOG.error(
                "the quarantine is full: objects that belong there are refused. See `kakehashi "
                "store quarantine`; store.receive.quarantine_mb is %d",
                self._settings.quarantine_mb,
            )

    def _tell(self, child: _Child, answer: bytes) -> None:
        # One that died in between will be asked to by its sender again.
        with contextlib.suppress(OSError):
            child.channel.send(answer)

    def _served(self, facility: str) -> int:
        """Return how many associations a hospital has, or may have."""
        return sum(
            facility in child.facilities and not child.refusing for child in self._children.values()
        )

    def _accept(self) -> None:
        try:
            connection, (address, *_) = self._server.accept()
        except OSError as error:
            # The caller may be gone again; or there are too many open files, which will pass.
            _LOG.warning("a call could not be answered (%s)", error)
            return
        with connection:
            facilities = self._senders.facilities(address)
            if not facilities:
                _LOG.warning("%s: closed, no sender calls from this address", address)
                return
            refusing = sum(child.refusing for child in self._children.values())
            most = self._settings.max_of_one_facility
            full = len(self._children) - refusing >= self._settings.max_associations or all(
                self._served(facility) >= most for facility in facilities
            )
            if full and refusing >= _REFUSING:
                _LOG.warning("%s: closed, too many associations", address)
                return
            try:
                self._fork(connection, address, facilities, full=full)
            except OSError as error:
                _LOG.error("%s: closed, no process for it (%s)", address, error)

    def _fork(
        self, connection: socket.socket, address: str, facilities: frozenset[str], *, full: bool
    ) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        # Until the child has its own handlers, a signal must not run ours in it.
        held = {signal.SIGTERM, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, held)
        try:
            pid = os.fork()
            if pid == 0:
                self._child(parent, connection, address, theirs, full=full)
        except OSError:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
            theirs.close()
        # Nobody waits for a process that does not read.
        ours.settimeout(0)
        self._children[ours.fileno()] = _Child(pid, address, ours, full, facilities)
        self._poll.register(ours, select.POLLIN)

    def _child(
        self,
        parent: int,
        connection: socket.socket,
        address: str,
        channel: socket.socket,
        *,
        full: bool,
    ) -> NoReturn:
        """Serve one association in a process of its own; never returns."""
        status = 1
        try:
            _bind_to(parent)
            signal.set_wakeup_fd(-1)
            _limit(self._settings.memory_mb)
            incoming = self._inbox.folders.incoming
            self._server.close()
            for child in self._children.values():
                child.channel.close()
            enclose(incoming, {connection.fileno(), channel.fileno()})
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
            if self._tls is not None:
                connection.settimeout(self._settings.idle_s)
                connection = self._tls.wrap_socket(connection, server_side=True)
            asker = Asker(channel)
            host = Host(self._settings, self._senders, incoming, asker.enter, asker.place)
            association = Association(host, connection, address, full=full)
            signal.signal(signal.SIGTERM, lambda *_: association.stop())
            ended = association.run()
            counts = ", ".join(f"{n} {what}" for what, n in sorted(association.counts.items()))
            _LOG.info("%s: %s; %s", address, ended, counts or "no objects")
            status = 0
        except Stopped:
            status = 0
        except (OSError, ssl.SSLError) as error:
            _LOG.warning("%s: no connection (%s)", address, error)
        except BaseException:
            _LOG.exception("%s: the association failed", address)
        finally:
            # Whatever comes now, what lies above is the listener's and none of this process's.
            try:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                logging.shutdown()
            finally:
                os._exit(status)

    def _ended(self, child: _Child) -> None:
        self._poll.unregister(child.channel)
        del self._children[child.channel.fileno()]
        child.channel.close()
        # It ends, or says nothing more and goes on: nobody waits for that.
        os.kill(child.pid, signal.SIGKILL)
        _, status = os.waitpid(child.pid, 0)
        if status:
            _LOG.error("%s: the association's process ended with %d", child.address, status)
        try:
            for path in self._inbox.folders.incoming.glob(f"{child.pid}-*"):
                path.unlink()
        except OSError as error:
            _LOG.error("%s: half an object stays until the next start (%s)", child.address, error)


def _tls(settings: Receive) -> ssl.SSLContext | None:
    if settings.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
        if settings.tls_client_ca is not None:
            context.load_verify_locations(settings.tls_client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise StoreError(
            f"the receiver's TLS files cannot be used ({error}); see store.receive.tls_key, "
            "tls_cert and tls_client_ca"
        ) from error
    return context


def _bind_to(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(1)


def _limit(memory_mb: int) -> None:
    most = memory_in_use() + (memory_mb << 20)
    limit_memory(most, most)
