"""``kakehashi store receive``: one process for each association, and one that gives objects places.

An association's process writes its object and makes it durable; then it asks this one for the
object's place. Requests that came while the disk was busy share the next round of waiting for
it, however many associations there are.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import os
import re
import resource
import select
import signal
import socket
import ssl
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from kakehashi.errors import StoreError
from kakehashi.store.layout import locked
from kakehashi.store.receive.association import Association, Host, Stopped
from kakehashi.store.receive.entry import Receipt
from kakehashi.store.receive.inbox import Inbox
from kakehashi.store.receive.offer import Offer, Verdict
from kakehashi.store.receive.senders import Senders

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import FrameType

    from kakehashi.store.receive.settings import Receive

_BACKLOG = 128
_REFUSING = 8
"""Associations beyond the limit that are told so; still more are closed without a word."""
_MESSAGE = 1 << 16
_PART = re.compile(r"[0-9]+-[0-9]+\.part")
_PR_SET_PDEATHSIG = 1
_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class _Child:
    """A process that serves one association."""

    pid: int
    address: str
    channel: socket.socket
    refusing: bool


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
    inbox = Inbox(root)
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

    def run(self, ready: Callable[[], None]) -> None:
        self._inbox.recover()
        woken, waker = socket.socketpair()
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
        asking = []
        ready = self._poll.poll(None if timeout_s is None else timeout_s * 1000)
        for descriptor, _ in ready:
            if child := self._children.get(descriptor):
                message = child.channel.recv(_MESSAGE)
                if message:
                    asking.append((child, message))
                else:
                    self._ended(child)
            elif not self._stopping and descriptor == self._server.fileno():
                self._accept()
        if asking:
            self._admit(asking)

    def _admit(self, asking: list[tuple[_Child, bytes]]) -> None:
        offers: list[Offer] = []
        children: list[_Child] = []
        for child, message in asking:
            try:
                offers.append(_offer(message))
            except (StoreError, ValueError):
                _LOG.exception("%s: the association's process is out of its mind", child.address)
                os.kill(child.pid, signal.SIGKILL)
            else:
                children.append(child)
        verdicts = self._inbox.admit(offers)
        for child, verdict in zip(children, verdicts, strict=True):
            # One that died in between will be asked to by its sender again.
            with contextlib.suppress(OSError):
                child.channel.send(verdict.encode())

    def _accept(self) -> None:
        try:
            connection, (address, *_) = self._server.accept()
        except OSError as error:
            # The caller may be gone again; or there are too many open files, which will pass.
            _LOG.warning("a call could not be answered (%s)", error)
            return
        with connection:
            if not self._senders.knows(address):
                _LOG.warning("%s: closed, no sender calls from this address", address)
                return
            if len(self._children) >= self._settings.max_associations + _REFUSING:
                _LOG.warning("%s: closed, too many associations", address)
                return
            served = sum(not child.refusing for child in self._children.values())
            try:
                self._fork(connection, address, full=served >= self._settings.max_associations)
            except OSError as error:
                _LOG.error("%s: closed, no process for it (%s)", address, error)

    def _fork(self, connection: socket.socket, address: str, *, full: bool) -> None:
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
        self._children[ours.fileno()] = _Child(pid, address, ours, full)
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
            self._server.close()
            for child in self._children.values():
                child.channel.close()
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
            if self._tls is not None:
                connection.settimeout(self._settings.idle_s)
                connection = self._tls.wrap_socket(connection, server_side=True)
            host = Host(
                self._settings, self._senders, self._inbox.folders.incoming, _asker(channel)
            )
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
            logging.shutdown()
            os._exit(status)

    def _ended(self, child: _Child) -> None:
        self._poll.unregister(child.channel)
        del self._children[child.channel.fileno()]
        child.channel.close()
        _, status = os.waitpid(child.pid, 0)
        if status:
            _LOG.error("%s: the association's process ended with %d", child.address, status)
        for path in self._inbox.folders.incoming.glob(f"{child.pid}-*"):
            path.unlink()


def _offer(message: bytes) -> Offer:
    part, receipt, reason = json.loads(message)
    if not _PART.fullmatch(part):
        raise StoreError(f"{part!r} is no name of an object that arrives")
    return Offer(part, Receipt.from_json(receipt), reason)


def _asker(channel: socket.socket) -> Callable[[Offer], Verdict]:
    def place(offer: Offer) -> Verdict:
        channel.send(json.dumps([offer.part, offer.receipt.as_json(), offer.reason]).encode())
        # Nothing comes where the listener is gone; then this process goes too.
        return Verdict(channel.recv(_MESSAGE).decode())

    return place


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
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - no path of ours
        own = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    most = own + (memory_mb << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    # What lies in memory is identifiable.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
