"""The warden: owner of the private mounts and sockets, and of the payload's namespaces.

It is forked from the keeper before there is any secret and never executes a program, so
that nothing in its namespaces can be traced by other processes of the same user. It copies
the payload's TCP bytes, and hands the file descriptors for everything else to the keeper.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kakehashi.errors import SessionError
from kakehashi.session import account, syscalls
from kakehashi.session.init import MESSAGE_LIMIT, Init
from kakehashi.session.payload import World, ignore_ending_signals
from kakehashi.session.plan import Plan
from kakehashi.session.relay import NetworkThread, Relay

if TYPE_CHECKING:
    from collections.abc import Iterator

# A folder that every node has, covered by private memory in the warden's own mount namespace
# alone: no mount point needs to be made on the node's file system.
BASE = "/dev/shm"  # noqa: S108 - covered, not used
SENTINEL_S = 5.0
PATIENCE_S = 30.0
FUSE_MAX_READ = 1 << 20
# In this order the descriptors come with the answer "built".
DESCRIPTORS = (*account.DESCRIPTORS, "store_fuse", "work_fuse")


@dataclass(frozen=True)
class Built:
    """What the warden hands over once the payload's world stands.

    Attributes
    ----------
    port : int
        TCP port on the node that leads to the payload's server.
    descriptors : dict of str to int
        By the names in :data:`DESCRIPTORS`, or :data:`kakehashi.session.account.DESCRIPTORS`
        without namespaces; the two last are missing with stand-ins.
    hub_port : int or None
        Port of the node's loopback that leads to the hub, where the payload has no network of
        its own.
    init : int or None
        Process whose descendants are the payload's, where these have no namespace of their own.
    """

    port: int
    descriptors: dict[str, int]
    hub_port: int | None = None
    init: int | None = None


class WardenHandle:
    """The keeper's end.

    Attributes
    ----------
    pid : int
        Direct child of the keeper that holds the warden; it ends when the warden ends.
    """

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        self.control = control

    def build(self, plan: Plan) -> Built:
        """Have the private mounts and the payload's world built.

        Raises
        ------
        SessionError
            Says which step the node refused.
        """
        self.send({"build": plan.to_json()})
        with _patience(self.control):
            data, descriptors, _, _ = socket.recv_fds(
                self.control, MESSAGE_LIMIT, len(DESCRIPTORS), socket.MSG_CMSG_CLOEXEC
            )
        answer = _message(data)
        names = DESCRIPTORS if plan.folder is None else account.DESCRIPTORS
        return Built(
            answer["built"],
            dict(zip(names, descriptors, strict=False)),
            hub_port=answer.get("hub_port"),
            init=answer.get("init"),
        )

    def probe(self, facts: dict[str, Any]) -> list[dict[str, Any]]:
        """Run the probe inside the payload's world; see :mod:`kakehashi.session.probe`."""
        self.send({"probe": facts})
        with _patience(self.control):
            data = self.control.recv(MESSAGE_LIMIT)
        results: list[dict[str, Any]] = _message(data)["probe"]
        return results

    def send(self, message: dict[str, Any]) -> None:
        """Give an order.

        Raises
        ------
        SessionError
            The warden has ended.
        """
        try:
            self.control.send(json.dumps(message).encode())
        except OSError as error:
            raise SessionError(f"the session's warden has ended ({error.strerror})") from error


@contextlib.contextmanager
def _patience(control: socket.socket) -> Iterator[None]:
    """Wait for an answer, but not for ever."""
    control.settimeout(PATIENCE_S)
    try:
        yield
    except TimeoutError:
        raise SessionError(
            f"the payload's world did not answer within {PATIENCE_S:.0f} s; is a path of "
            "node.read_only on a file system that hangs?"
        ) from None
    finally:
        control.settimeout(None)


def _message(data: bytes) -> dict[str, Any]:
    if not data:
        raise SessionError("the session's warden has ended before the session began")
    message: dict[str, Any] = json.loads(data)
    if "error" in message:
        raise SessionError(message["error"])
    return message


def start() -> WardenHandle:
    """Fork the warden; call it before this process holds any secret."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = syscalls.fork_bound()
    if pid == 0:
        ours.close()
        _hold(theirs)
    theirs.close()
    return WardenHandle(pid, ours)


def _hold(control: socket.socket) -> NoReturn:
    """Wait for the order to build, enter the private namespaces, and hold the warden there."""
    code = 1
    try:
        ignore_ending_signals()
        nothing = os.open("/dev/null", os.O_RDWR)
        # Standard input holds the document with the ticket; only the keeper reads it.
        for descriptor in (0, 1):
            os.dup2(nothing, descriptor)
        order = control.recv(MESSAGE_LIMIT)
        if not order:
            os._exit(0)
        plan = Plan.from_json(json.loads(order)["build"])
        if plan.folder is not None:
            account.AccountWarden(control, plan).run()
        with _step("a private user namespace"):
            _private(
                syscalls.CLONE_NEWNS
                | syscalls.CLONE_NEWPID
                | syscalls.CLONE_NEWIPC
                | syscalls.CLONE_NEWUTS
            )
        warden = syscalls.fork_bound()
        if warden == 0:
            _Warden(control, plan).run()
        control.close()
        _, status = os.waitpid(warden, 0)
        code = os.waitstatus_to_exitcode(status) & 255
    except BaseException as error:  # the last frame of this process
        _report(control, error)
    finally:
        os._exit(code)


def _private(others: int) -> None:
    """Enter a new user namespace, and others with it, as the same user."""
    uid, gid = os.getuid(), os.getgid()
    # The files of a process that is not dumpable belong to root, and maps could not be
    # written. No secret is here yet.
    syscalls.set_dumpable(dumpable=True)
    try:
        # Inherited by all that come from here: should a dump be made, no memory is in it.
        Path("/proc/self/coredump_filter").write_text("0", encoding="ascii")
        syscalls.unshare(syscalls.CLONE_NEWUSER | others)
        syscalls.map_user(uid, gid)
    finally:
        syscalls.set_dumpable(dumpable=False)


@contextlib.contextmanager
def _step(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SessionError(f"this node refuses {name}: {error}") from error


def _report(control: socket.socket, error: BaseException) -> None:
    text = str(error) if isinstance(error, SessionError) else f"{type(error).__name__}: {error}"
    with contextlib.suppress(OSError):
        control.send(json.dumps({"error": text}).encode())


class _Warden:
    def __init__(self, control: socket.socket, plan: Plan) -> None:
        self._control = control
        self._plan = plan
        self._deadline: float | None = None

    def run(self) -> NoReturn:
        try:
            self._build(self._plan)
            self._follow()
        except BaseException as error:  # the last frame of this process
            _report(self._control, error)
        os._exit(1)

    def _build(self, plan: Plan) -> None:
        self._port_listener = socket.create_server(("0.0.0.0", 0), backlog=128)  # noqa: S104 - the hub reaches it from another host
        with _step("private mounts"):
            self._mounts()
        fuse = self._fuse_mounts(plan)
        listeners = [
            self._listen(f"{BASE}/{name}")
            for name in ("run/store.sock", "auth/agent", "run/work.sock")
        ]
        folders = [
            os.open(f"{BASE}/{name}", os.O_RDONLY | os.O_DIRECTORY) for name in ("auth", "run")
        ]
        self._fork_payload(plan)
        answer = json.loads(self._init.recv(MESSAGE_LIMIT) or b'{"error": "it ended at once"}')
        if "error" in answer:
            raise SessionError(f"this node refuses the payload's world: {answer['error']}")
        descriptors = [*folders, *(listener.fileno() for listener in listeners), *fuse]
        message = {"built": self._port_listener.getsockname()[1]}
        socket.send_fds(self._control, [json.dumps(message).encode()], descriptors)
        for listener in listeners:
            listener.close()
        for descriptor in (*folders, *fuse):
            os.close(descriptor)

    def _mounts(self) -> None:
        # A slave, not private: what the node unmounts must not live on in here.
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_SLAVE)
        flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
        syscalls.mount("proc", "/proc", "proc", flags | syscalls.MS_NOEXEC)
        syscalls.mount("tmpfs", BASE, "tmpfs", flags, "mode=0700,size=32m")
        for name in ("auth", "run", "run/server", "points", "root", "scratch", "empty"):
            Path(BASE, name).mkdir(mode=0o700)
        # The payload's own folder; others of this user are kept out by the one above.
        Path(BASE, "empty").chmod(0o555)
        syscalls.mount(
            "tmpfs", f"{BASE}/points", "tmpfs", flags | syscalls.MS_NOEXEC, "mode=0755,size=64k"
        )
        for name in ("store", "work"):
            Path(BASE, "points", name).mkdir()
            # Nothing may be written here should the mount over it be gone.
            Path(BASE, "points", name).chmod(0o555)

    def _fuse_mounts(self, plan: Plan) -> list[int]:
        store, work = f"{BASE}/points/store", f"{BASE}/points/work"
        with _step("FUSE mounts (is /dev/fuse there, and open to every user?)"):
            read_only = syscalls.MS_RDONLY | syscalls.MS_NOEXEC
            descriptors = [
                _mount_fuse(store, "fuse.kakehashi", plan, read_only),
                _mount_fuse(work, "fuse.sshfs", plan, 0),
            ]
        if plan.stand_ins:
            for target, descriptor in zip((store, work), descriptors, strict=True):
                syscalls.unmount(target)
                os.close(descriptor)
                syscalls.mount(
                    "tmpfs",
                    target,
                    "tmpfs",
                    syscalls.MS_NOSUID | syscalls.MS_NODEV | (read_only if target == store else 0),
                    "mode=0700,size=1m",
                )
            descriptors = []
        syscalls.mount_attributes(f"{BASE}/points", syscalls.MOUNT_ATTR_RDONLY, recursive=False)
        return descriptors

    def _listen(self, path: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(64)
        return listener

    def _fork_payload(self, plan: Plan) -> None:
        self._init, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._middle = syscalls.fork_bound()
        if self._middle == 0:
            _hold_payload(plan, theirs)
        theirs.close()
        data, descriptors, _, _ = socket.recv_fds(
            self._init, MESSAGE_LIMIT, 1, socket.MSG_CMSG_CLOEXEC
        )
        answer = json.loads(data or b'{"error": "it ended at once"}')
        if "error" in answer:
            raise SessionError(f"this node refuses the payload's namespaces: {answer['error']}")
        self._init_pid = int(answer["init"])
        self._namespace = descriptors[0]
        self._init.send(b'{"build": true}')

    def _follow(self) -> None:
        """Follow the keeper's orders until the payload has ended."""
        ending = os.pidfd_open(self._middle)
        selector = selectors.DefaultSelector()
        for item in (self._control, self._init, ending):
            selector.register(item, selectors.EVENT_READ)
        while True:
            timeout = None if self._deadline is None else self._deadline - time.monotonic()
            ready = {key.fileobj for key, _ in selector.select(timeout)}
            if self._init in ready:
                data = self._init.recv(MESSAGE_LIMIT)
                if data:
                    self._control.send(data)
                else:
                    selector.unregister(self._init)
            if ending in ready:
                self._leave()
            if self._control in ready:
                data = self._control.recv(MESSAGE_LIMIT)
                if not data:
                    os._exit(0)
                self._obey(json.loads(data))
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._deadline = None
                _signal(self._init_pid, signal.SIGKILL)

    def _obey(self, order: dict[str, Any]) -> None:
        if "probe" in order:
            # A socket of the node that anybody may reach: the payload must not.
            decoy = socket.socket(socket.AF_UNIX)
            decoy.bind("")
            decoy.listen(1)
            name = decoy.getsockname()[1:].decode()
            facts = order["probe"] | {
                "port": self._port_listener.getsockname()[1],
                "abstract": name,
            }
            self._init.send(json.dumps({"probe": facts}).encode())
            self._control.send(self._init.recv(MESSAGE_LIMIT) or b'{"error": "the probe ended"}')
            decoy.close()
        elif "relay" in order:
            self._start_relays(order["relay"])
        elif "watch" in order:
            for name, path in (("store", "store/manifest.json"), ("work", "work")):
                threading.Thread(
                    target=self._watch, args=(name, f"{BASE}/points/{path}"), daemon=True
                ).start()
        elif "stop" in order:
            _signal(self._init_pid, signal.SIGTERM)
            self._deadline = time.monotonic() + float(order["stop"])
        elif "start" in order:
            self._init.send(json.dumps(order).encode())

    def _start_relays(self, hub: dict[str, Any]) -> None:
        port = self._port_listener.getsockname()[1]
        network = NetworkThread(self._namespace)

        def to_server() -> socket.socket:
            near = network.make(lambda: socket.socket(socket.AF_INET))
            try:
                near.connect(("127.0.0.1", port))
            except OSError:
                near.close()
                raise
            return near

        host, _, outside = hub["address"].rpartition(":")

        def to_hub() -> socket.socket:
            far = socket.create_connection((host.strip("[]"), int(outside)), timeout=10)
            # The limit is for connecting; a quiet connection may stay.
            far.settimeout(None)
            return far

        inside = network.make(lambda: socket.create_server(("127.0.0.1", hub["port"])))
        Relay(self._port_listener, to_server).start()
        Relay(inside, to_hub).start()
        self._control.send(b'{"relayed": true}')

    def _watch(self, name: str, path: str) -> None:
        """Look at a mount at intervals, and tell the keeper each time."""
        while True:
            problem = None
            try:
                os.stat(path)  # noqa: PTH116 - in a thread that may hang: as little as possible
            except OSError as error:
                problem = error.strerror
            with contextlib.suppress(OSError):
                self._control.send(json.dumps({"seen": name, "problem": problem}).encode())
            time.sleep(SENTINEL_S)

    def _leave(self) -> NoReturn:
        _, status = os.waitpid(self._middle, 0)
        code = os.waitstatus_to_exitcode(status)
        # Said before the mounts go, so that their end is not taken for the cause.
        with contextlib.suppress(OSError):
            self._control.send(json.dumps({"ended": code}).encode())
        for name in ("work", "store"):
            # Detached here, the file systems end of themselves, what was written flushed.
            with contextlib.suppress(OSError):
                syscalls.unmount(f"{BASE}/points/{name}")
        os._exit(0)


def _mount_fuse(target: str, kind: str, plan: Plan, flags: int) -> int:
    descriptor = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = (
        f"fd={descriptor},rootmode=40000,user_id={plan.uid},group_id={plan.gid},"
        # allow_other is the stricter choice here: without it, other processes of this user
        # could read the mount through /proc.
        f"allow_other,default_permissions,max_read={FUSE_MAX_READ}"
    )
    try:
        syscalls.mount(
            "kakehashi",
            target,
            kind,
            flags | syscalls.MS_NOSUID | syscalls.MS_NODEV,
            options,
        )
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _signal(pid: int, kind: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, kind)


def _hold_payload(plan: Plan, control: socket.socket) -> NoReturn:
    """Enter the payload's namespaces, fork its first process and wait for it."""
    code = 1
    try:
        # Above all the FUSE descriptors: held on to, a mount would hang instead of failing.
        os.closerange(3, control.fileno())
        os.closerange(control.fileno() + 1, 4096)
        network = 0 if "network" in plan.without else syscalls.CLONE_NEWNET
        _private(
            syscalls.CLONE_NEWNS
            | syscalls.CLONE_NEWPID
            | syscalls.CLONE_NEWIPC
            | syscalls.CLONE_NEWUTS
            | syscalls.CLONE_NEWCGROUP
            | network
        )
        # Opened before the fork, since a process that is not dumpable hides its namespaces.
        namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        init = syscalls.fork_bound()
        if init == 0:
            os.close(namespace)
            Init(plan, World(plan, BASE).build, control).run()
        message = json.dumps({"init": init}).encode()
        socket.send_fds(control, [message], [namespace])
        os.close(namespace)
        control.close()
        _, status = os.waitpid(init, 0)
        code = os.waitstatus_to_exitcode(status)
        code = code if code >= 0 else 128 - code
    except BaseException as error:  # the last frame of this process
        _report(control, error)
    finally:
        os._exit(code & 255)
