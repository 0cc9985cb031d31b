"""The warden of a session without namespaces: for nodes that forbid them, or have no FUSE.

It speaks the same messages as :mod:`kakehashi.session.warden`, and keeps the weaker promise of
``node.walls = "account"``: one private folder in memory instead of mounts, Landlock and a system
call filter instead of namespaces, channels to the store instead of a view. What the payload
leaves is taken away here, also when the keeper was killed; the site's epilog does it once more.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import shutil
import signal
import socket
import struct
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kakehashi.errors import SessionError
from kakehashi.session import syscalls
from kakehashi.session.init import MESSAGE_LIMIT, Init
from kakehashi.session.plan import JOB_FILE
from kakehashi.session.processes import descendants
from kakehashi.session.relay import Relay

if TYPE_CHECKING:
    from kakehashi.session.plan import Plan

# In this order the descriptors come with the answer "built".
DESCRIPTORS = ("auth", "run", "store_listener", "agent_listener", "work_listener")
PRIVATE = ("auth", "run", "run/server", "home", "tmp", "rt", "shm")
SENTINEL_S = 5.0
CHANNEL_PATIENCE_S = 20.0
KILL_PATIENCE_S = 5.0
_SIOCGIFADDR = 0x8915
_PORT_TRIES = 16
# SFTP version 3: INIT, and STAT of a path.
_SFTP_INIT = struct.pack(">IBI", 5, 1, 3)


def addresses() -> list[str]:
    """Return the IPv4 addresses by which other hosts reach this node."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            # An interface without an address, or one that is down.
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, request)
                address = socket.inet_ntoa(answer[20:24])
                if not address.startswith("127."):
                    found.append(address)
    return found


class AccountWarden:
    """Owns the folder, the sockets and the payload of one session.

    Parameters
    ----------
    control : socket.socket
        To the keeper; its end is this one's.
    plan : Plan
        With a folder.
    """

    def __init__(self, control: socket.socket, plan: Plan) -> None:
        assert plan.folder is not None  # noqa: S101 - the caller has chosen by it
        self._control = control
        self._plan = plan
        self._folder = plan.folder
        self._init_pid = 0
        self._deadline: float | None = None
        self._ended = False

    def run(self) -> NoReturn:
        """Build, and follow the keeper's orders; whatever happens, clean up."""
        # It outlives a keeper that was killed for as long as it takes to clean up.
        syscalls.outlive_parent()
        syscalls.adopt_orphans()
        with contextlib.suppress(PermissionError):
            # A session's keeper has done so before it became unreadable; inherited.
            Path("/proc/self/coredump_filter").write_text("0", encoding="ascii")
        try:
            self._build()
            self._follow()
        except BaseException as error:  # the last frame of this process
            self._tell_error(error)
        finally:
            self._clean()
            os._exit(0)

    def _tell_error(self, error: BaseException) -> None:
        text = str(error) if isinstance(error, SessionError) else f"{type(error).__name__}: {error}"
        self._say({"error": text})

    def _say(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._control.send(json.dumps(message).encode())

    # ------------------------------------------------------------------ setting up

    def _build(self) -> None:
        try:
            Path(self._folder).mkdir(mode=0o700)
        except OSError as error:
            raise SessionError(
                f"{self._folder} cannot be made ({error.strerror}); is /dev/shm a memory file "
                "system that every account may write?"
            ) from error
        for name in PRIVATE:
            Path(self._folder, name).mkdir(mode=0o700)
        Path(self._folder, JOB_FILE).write_text(self._plan.job, encoding="utf-8")
        port = self._reserve_port()
        # The hub as the payload sees it; loopback, so that no other host can use the relay.
        self._hub_listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        hub_port = self._hub_listener.getsockname()[1]
        self._plan = replace(self._plan, server_port=port, hub_port=hub_port)
        store, work = self._listen("run/store.sock"), self._listen("run/work.sock")
        agent = self._listen("auth/agent")
        self._fork_init()
        folders = [
            os.open(f"{self._folder}/{name}", os.O_RDONLY | os.O_DIRECTORY)
            for name in ("auth", "run")
        ]
        descriptors = [*folders, store.fileno(), agent.fileno(), work.fileno()]
        message = {"built": port, "hub_port": hub_port, "init": self._init_pid}
        socket.send_fds(self._control, [json.dumps(message).encode()], descriptors)
        for listener in (store, agent, work):
            listener.close()
        for descriptor in folders:
            os.close(descriptor)

    def _reserve_port(self) -> int:
        """Listen on one port of each of the node's addresses; the loopback one is the server's."""
        outside = addresses()
        for _ in range(_PORT_TRIES):
            self._listeners: list[socket.socket] = []
            with socket.create_server(("127.0.0.1", 0)) as own:
                port = int(own.getsockname()[1])
            try:
                for address in outside:
                    self._listeners.append(socket.create_server((address, port), backlog=128))
            except OSError:
                for listener in self._listeners:
                    listener.close()
            else:
                return port
        raise SessionError(f"no port of this node was free in {_PORT_TRIES} tries")

    def _listen(self, name: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{self._folder}/{name}")
        listener.listen(64)
        return listener

    def _fork_init(self) -> None:
        self._init, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._init_pid = syscalls.fork_bound()
        if self._init_pid == 0:
            for other in (self._control, self._init, self._hub_listener, *self._listeners):
                other.close()
            syscalls.adopt_orphans()
            Init(self._plan, lambda: None, theirs).run()
        theirs.close()
        self._init.send(b'{"build": true}')
        answer = json.loads(self._init.recv(MESSAGE_LIMIT) or b'{"error": "it ended at once"}')
        if "error" in answer:
            raise SessionError(f"this node refuses to confine the payload: {answer['error']}")

    # ------------------------------------------------------------------ orders

    def _follow(self) -> None:
        """Follow the keeper's orders until it, or the payload, has ended."""
        selector = selectors.DefaultSelector()
        for item in (self._control, self._init):
            selector.register(item, selectors.EVENT_READ)
        while True:
            timeout = None if self._deadline is None else self._deadline - time.monotonic()
            ready = {key.fileobj for key, _ in selector.select(timeout)}
            if self._init in ready:
                data = self._init.recv(MESSAGE_LIMIT)
                if data:
                    self._control.send(data)
                else:
                    # None of the payload's programs has the other end: its init has ended.
                    selector.unregister(self._init)
                    _, status = os.waitpid(self._init_pid, 0)
                    self._ended = True
                    self._kill_all()
                    self._say({"ended": os.waitstatus_to_exitcode(status)})
            if self._control in ready:
                data = self._control.recv(MESSAGE_LIMIT)
                order = json.loads(data) if data else {"stop": 0}
                if not data or (self._ended and "stop" in order):
                    return
                self._obey(order)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                return

    def _obey(self, order: dict[str, Any]) -> None:
        if "probe" in order:
            facts = order["probe"] | {
                "port": self._plan.server_port,
                "hub_port": self._plan.hub_port,
                "folder": self._folder,
                "warden": os.getpid(),
            }
            self._init.send(json.dumps({"probe": facts}).encode())
            self._control.send(self._init.recv(MESSAGE_LIMIT) or b'{"error": "the probe ended"}')
        elif "relay" in order:
            self._start_relays(order["relay"])
        elif "watch" in order:
            for name, path in (("store", "/manifest.json"), ("work", "/work")):
                threading.Thread(target=self._watch, args=(name, path), daemon=True).start()
        elif "stop" in order:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._init_pid, signal.SIGTERM)
            self._deadline = time.monotonic() + float(order["stop"])
        elif "start" in order:
            self._init.send(json.dumps(order).encode())

    def _start_relays(self, hub: dict[str, Any]) -> None:
        host, _, outside = hub["address"].rpartition(":")

        def to_server() -> socket.socket:
            return socket.create_connection(("127.0.0.1", self._plan.server_port))

        def to_hub() -> socket.socket:
            far = socket.create_connection((host.strip("[]"), int(outside)), timeout=10)
            # The limit is for connecting; a quiet connection may stay.
            far.settimeout(None)
            return far

        for listener in self._listeners:
            Relay(listener, to_server).start()
        Relay(self._hub_listener, to_hub).start()
        self._say({"relayed": True})

    # ------------------------------------------------------------------ watching

    def _watch(self, name: str, path: str) -> None:
        """Ask the store at intervals, over a channel as the payload has, and tell the keeper."""
        channel: socket.socket | None = None
        while True:
            problem = None
            try:
                channel = channel or self._open_channel(name)
                _stat(channel, path)
            except (OSError, SessionError) as error:
                problem = str(error)
                if channel is not None:
                    channel.close()
                    channel = None
            self._say({"seen": name, "problem": problem})
            time.sleep(SENTINEL_S)

    def _open_channel(self, name: str) -> socket.socket:
        channel = socket.socket(socket.AF_UNIX)
        channel.settimeout(CHANNEL_PATIENCE_S)
        try:
            channel.connect(f"{self._folder}/run/{name}.sock")
            channel.sendall(_SFTP_INIT)
            _packet(channel)
        except BaseException:
            channel.close()
            raise
        return channel

    # ------------------------------------------------------------------ the end

    def _clean(self) -> None:
        """End every process of the payload, and take the folder away."""
        self._kill_all()
        deadline = time.monotonic() + KILL_PATIENCE_S
        # Files that appear while it is being emptied are of processes that are ending.
        while os.path.lexists(self._folder) and time.monotonic() < deadline:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _kill_all(self) -> None:
        deadline = time.monotonic() + KILL_PATIENCE_S
        while (left := descendants(os.getpid())) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG) != (0, 0):
                    pass
            time.sleep(0.002)


def _stat(channel: socket.socket, path: str) -> None:
    name = path.encode()
    body = struct.pack(">BII", 17, 1, len(name)) + name
    channel.sendall(struct.pack(">I", len(body)) + body)
    answer = _packet(channel)
    if answer[:1] != bytes([105]):
        raise SessionError(f"the store does not show {path}")


def _packet(channel: socket.socket) -> bytes:
    (length,) = struct.unpack(">I", _take(channel, 4))
    if not 1 <= length <= 65536:
        raise SessionError("the store gave no SFTP answer")
    return _take(channel, length)


def _take(channel: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = channel.recv(count - len(data))
        if not piece:
            raise SessionError("the store does not answer")
        data += piece
    return data
