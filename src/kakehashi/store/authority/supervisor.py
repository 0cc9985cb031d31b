"""``kakehashi store serve``: runs sshd, authority, guard and catalogue, and holds them together.

The supervisor is the first process of a pid namespace of its own. When it ends, however it
ends, the kernel ends everything in that namespace: no connection outlives its guard. It also
inherits what a dead sshd leaves behind, so that each connection stays its descendant.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING

from kakehashi.config import Config, load
from kakehashi.errors import ConfigError, KakehashiError, StoreError
from kakehashi.store.authority.accounts import acting_as, check_runnable, find_account
from kakehashi.store.authority.book import Book
from kakehashi.store.authority.layout import Layout, names
from kakehashi.store.authority.processes import processes, tree
from kakehashi.store.authority.services import Services
from kakehashi.store.authority.sshd import PRIVSEP
from kakehashi.store.authority.sshdlog import LogWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import FrameType

SILENCE_S = 5.0
"""Seconds without a finished round of the guard after which every connection is closed."""

GUARD_START_S = 20.0
"""Seconds that a guard may take for its first round before it is started anew."""

LONGEST_WAIT_S = 5.0
"""Longest back-off, in seconds, before a service that keeps dying is started again."""

STOP_S = 5.0
"""Seconds that the services get to stop by themselves."""

_TICK_S = 0.1
_CLONE_NEWNS = 0x00020000
_CLONE_NEWPID = 0x20000000
_MS_NOSUID_NODEV_NOEXEC = 2 | 4 | 8
_MS_REC_SLAVE = 0x4000 | (1 << 19)
_PR_SET_PDEATHSIG = 1


@dataclass
class _Service:
    name: str
    arguments: list[str]
    account: str | None
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    failures: int = 0
    start_at: float = 0.0
    ready: bool = False
    pending: bytes = field(default=b"")

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0


def serve(config_path: Path) -> None:
    """Run the store until SIGTERM; SIGHUP reads the configuration anew.

    Prints one line beginning with ``ready`` when everything listens.

    Raises
    ------
    ConfigError, StoreError
        Not root, not initialised, already running, or namespaces are forbidden here.
    """
    config = load(config_path)
    store = config.need_store()
    layout = Layout(store.root)
    if os.geteuid() != 0:
        raise ConfigError("`kakehashi store serve` supervises sshd and must be run as root")
    for path in (
        layout.sshd / "sshd_config",
        layout.principals,
        layout.book,
        layout.host_certificate,
    ):
        if not path.exists():
            raise StoreError(f"{path}: is missing; run `kakehashi store init` first")
    account = find_account(names(store).authority)
    check_runnable(account)
    with _sole(layout):
        (layout.run / "serve.pid").write_text(f"{os.getpid()}\n", encoding="ascii")
        _no_connection_lives(layout, account.pw_name)
        try:
            if os.getpid() == 1:
                # A container: this process is the first of a pid namespace already.
                _Supervisor(config, config_path).run()
            else:
                _in_namespace(lambda: _Supervisor(config, config_path).run())
        finally:
            for name in ("serve.pid", "services.json", "ready", "sshd.pid"):
                (layout.run / name).unlink(missing_ok=True)


def _no_connection_lives(layout: Layout, account: str) -> None:
    """Note in the book that whatever it takes for open is closed.

    Never called inside the namespace: a change of credentials, even for a moment, makes the
    kernel forget that the supervisor is to die with the process that started it.
    """
    with acting_as(account):
        try:
            book = Book(layout.book)
            book.close_all(time.time())
            book.close()
        except sqlite3.Error as error:
            raise StoreError(f"{layout.book}: cannot be written ({error})") from error


class _Supervisor:
    def __init__(self, config: Config, config_path: Path) -> None:
        self._config = config
        self._config_path = config_path
        self._store = config.need_store()
        self._layout = Layout(self._store.root)
        self._account = names(self._store).authority
        python = [sys.executable, "-I", "-m"]
        sshd = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin:/usr/bin")
        if sshd is None:
            raise ConfigError("there is no sshd on this machine; install openssh-server")
        sshd_config = str(self._layout.sshd / "sshd_config")
        self._guard = _Service("guard", [*python, "kakehashi.store.authority.guard"], self._account)
        self._authority = _Service(
            "authority", [*python, "kakehashi.store.authority.service"], self._account
        )
        self._sshd = _Service("sshd", [sshd, "-D", "-e", "-f", sshd_config], None)
        self._catalogue = (
            None
            if self._store.catalogue_port is None
            else _Service("catalogue", [*python, "kakehashi.store.service"], self._account)
        )
        self._services = tuple(
            service
            for service in (self._guard, self._authority, self._sshd, self._catalogue)
            if service is not None
        )
        self._sshd_log = LogWriter(self._layout.sshd_log, find_account(self._account).pw_gid)
        self._shown = self._host_certificate()
        self._guard_ok = time.monotonic()
        self._stop = False
        self._reload = False
        self._told = False

    def run(self) -> None:
        if os.getpid() != 1:
            raise StoreError("the supervisor must be the first process of its pid namespace")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        PRIVSEP.mkdir(mode=0o755, exist_ok=True)
        (self._layout.run / "sshd.pid").unlink(missing_ok=True)
        try:
            while not self._stop:
                self._round()
        finally:
            self._stop_all()

    def _round(self) -> None:
        if self._reload:
            self._reload = False
            self._read_configuration()
        for service in self._services:
            self._start(service)
        self._listen()
        self._reap()
        if time.monotonic() - self._guard_ok > SILENCE_S:
            # Nobody confirms the leases any more; without that, no connection may stand.
            self._close_everything()
            silent = time.monotonic() - max(self._guard_ok, self._guard.started)
            if self._guard.process and silent > GUARD_START_S:
                self._guard.process.kill()
        if not self._sshd.ready and self._sshd.pid:
            self._sshd.ready = self._sshd_listens()
        self._show_host_certificate()
        if not self._told and all(service.ready for service in self._services):
            self._told = True
            (self._layout.run / "ready").touch()
            store = self._store
            sys.stdout.write(
                f"ready: sshd on {store.bind}:{store.bind_port}, authority on "
                f"{store.authority_bind}:{store.authority_port}\n"
            )
            sys.stdout.flush()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGHUP:
            self._reload = True
        else:
            self._stop = True

    def _read_configuration(self) -> None:
        try:
            config = load(self._config_path)
            if config.need_store() != self._store:
                raise ConfigError(
                    "[store] changed; that takes a restart, which closes every connection"
                )
        except KakehashiError as error:
            _warn(f"the configuration is kept as it was: {error}")
            return
        self._config = config
        # Projects and sites concern these alone; connections go on.
        for service in (self._authority, self._catalogue):
            if service is not None and service.process:
                service.process.terminate()

    # Services

    def _start(self, service: _Service) -> None:
        if service.process or time.monotonic() < service.start_at:
            return
        if service is self._sshd and not self._guard.ready:
            # Nobody comes in before somebody watches.
            return
        log = self._layout.log / f"{service.name}.log"
        account = find_account(service.account) if service.account else None
        with contextlib.ExitStack() as stack:
            error_log = (
                stack.enter_context(_append_private(log)).fileno()
                if account
                else self._sshd_log.sender.fileno()
            )
            standard_input = stack.enter_context(_memory_file(self._config.model_dump_json()))
            service.process = subprocess.Popen(
                service.arguments,
                stdin=standard_input if account else subprocess.DEVNULL,
                stdout=subprocess.PIPE if account else error_log,
                stderr=error_log,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
                cwd="/",
                umask=0o077,
                user=account.pw_uid if account else None,
                group=account.pw_gid if account else None,
                extra_groups=os.getgrouplist(account.pw_name, account.pw_gid) if account else None,
            )
        if service.process.stdout:
            os.set_blocking(service.process.stdout.fileno(), False)
        service.started = time.monotonic()
        service.pending = b""
        self._publish()

    def _listen(self) -> None:
        streams = {
            service.process.stdout: service
            for service in self._services
            if service.process and service.process.stdout
        }
        waiting = [*(stream.fileno() for stream in streams), self._sshd_log.fileno()]
        readable, _, _ = select.select(waiting, [], [], _TICK_S)
        self._sshd_log.write()
        for stream, service in streams.items():
            if stream.fileno() in readable:
                self._hear(service, stream)

    def _hear(self, service: _Service, stream: IO[bytes]) -> None:
        data = os.read(stream.fileno(), 65536)
        if not data:
            # Its end is dealt with when it is reaped; until then there is nothing to hear.
            time.sleep(_TICK_S)
            return
        *lines, rest = (service.pending + data).split(b"\n")
        service.pending = rest[-4096:]
        for line in lines:
            match line.split():
                case [b"ok"] if service is self._guard:
                    self._guard_ok = time.monotonic()
                    service.ready = True
                case [b"kill", pid, start_time] if service is self._guard:
                    self._close(int(pid), int(start_time))
                case [b"ready"] if service is self._authority or service is self._catalogue:
                    service.ready = True
                case _:
                    _warn(f"{service.name} said something that is not understood")

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for service in self._services:
                if service.pid == pid:
                    self._ended(service, os.waitstatus_to_exitcode(status))

    def _ended(self, service: _Service, status: int) -> None:
        if service.process:
            service.process.returncode = status
            if service.process.stdout:
                service.process.stdout.close()
        service.process = None
        service.ready = False
        lived = time.monotonic() - service.started
        service.failures = 0 if lived > 2 * LONGEST_WAIT_S else service.failures + 1
        service.start_at = time.monotonic() + min(
            LONGEST_WAIT_S, _TICK_S * 2 ** (service.failures - 1) if service.failures else 0
        )
        if service is self._sshd:
            (self._layout.run / "sshd.pid").unlink(missing_ok=True)
        if not self._stop:
            log = self._layout.log / f"{service.name}.log"
            _warn(f"{service.name} ended with status {status} and is started again; see {log}")
        self._publish()

    def _publish(self) -> None:
        Services(
            supervisor=os.getpid(),
            sshd=self._sshd.pid,
            authority=self._authority.pid,
            catalogue=self._catalogue.pid if self._catalogue else 0,
            guard=self._guard.pid,
        ).write(self._layout.run)

    def _sshd_listens(self) -> bool:
        # sshd writes this file once its sockets are bound.
        try:
            text = (self._layout.run / "sshd.pid").read_text(encoding="ascii")
        except OSError:
            return False
        return text.strip() == str(self._sshd.pid)

    def _host_certificate(self) -> tuple[int, int]:
        status = self._layout.host_certificate.stat()
        return status.st_ino, status.st_mtime_ns

    def _show_host_certificate(self) -> None:
        """Have sshd read its host key anew once that was replaced."""
        found = self._host_certificate()
        if found == self._shown or not self._sshd.ready:
            return
        self._shown = found
        # Only the listener starts anew, in the same process; what it has accepted goes on.
        self._sshd.ready = False
        (self._layout.run / "sshd.pid").unlink(missing_ok=True)
        _signal(self._sshd.pid, signal.SIGHUP)

    # Connections

    def _close(self, pid: int, start_time: int) -> None:
        process = processes().get(pid)
        if process is None or process.start_time != start_time:
            return
        if not self._is_connection(process.pid, process.parent, process.name):
            _warn(f"the guard named process {pid}, which is no connection; it is left alone")
            return
        _kill_tree(pid)

    def _close_everything(self) -> None:
        for process in processes().values():
            if self._is_connection(process.pid, process.parent, process.name):
                _kill_tree(process.pid)

    def _is_connection(self, pid: int, parent: int, name: str) -> bool:
        return (
            pid not in {service.pid for service in self._services}
            and parent in {self._sshd.pid, os.getpid()}
            and name.startswith("sshd")
        )

    def _stop_all(self) -> None:
        self._stop = True
        for service in self._services:
            if service.process:
                service.process.terminate()
        deadline = time.monotonic() + STOP_S
        while any(service.process for service in self._services):
            self._reap()
            # Who waits to write a last line cannot end.
            self._sshd_log.write()
            if time.monotonic() > deadline:
                break
            time.sleep(_TICK_S / 10)
        # Being the first process of the namespace, this reaches all of it and nothing else.
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()
        self._sshd_log.write()


def _kill_tree(pid: int) -> None:
    """Kill a connection with all its processes, so that none slips away by forking."""
    stopped: set[int] = set()
    while True:
        members = tree(pid, processes())
        fresh = [member.pid for member in members if member.pid not in stopped]
        if not fresh:
            break
        for running in fresh:
            _signal(running, signal.SIGSTOP)
            stopped.add(running)
    # The root last: it is what the guard watches, and its end must mean the end of all.
    for member in reversed(tree(pid, processes())):
        _signal(member.pid, signal.SIGKILL)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _in_namespace(inner: Callable[[], None]) -> None:
    """Run ``inner`` as the first process of a new pid namespace; end when it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWPID) != 0:
        raise StoreError(
            "a pid namespace cannot be made here "
            f"({os.strerror(ctypes.get_errno())}); the store needs it to end its connections "
            "for sure. In a container, run `kakehashi store serve` as its first process"
        )
    child = 0

    def forward(number: int, frame: FrameType | None) -> None:
        del frame
        if child:
            _signal(child, signal.Signals(number))

    wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
    alive, held = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(held)
            _enter(libc, alive)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, wanted)
            inner()
            status = 0
        except KakehashiError as error:
            _warn(str(error))
        except BaseException:
            traceback.print_exc()
        finally:
            # Nothing of the parent's clean-up may run here.
            sys.stderr.flush()
            os._exit(status)
    for number in wanted:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, wanted)
    os.close(alive)
    _, result = os.waitpid(child, 0)
    child = 0
    os.close(held)
    status = os.waitstatus_to_exitcode(result)
    if status != 0:
        raise StoreError(f"the store's supervisor ended with status {status}")


def _enter(libc: ctypes.CDLL, alive: int) -> None:
    def call(name: str, *arguments: object) -> None:
        if getattr(libc, name)(*arguments) != 0:
            raise StoreError(f"{name} failed: {os.strerror(ctypes.get_errno())}")

    call("prctl", _PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    # The parent may have died before the wish was heard; then its end of the pipe is closed.
    if select.select([alive], [], [], 0)[0]:
        raise StoreError("the process that started the supervisor is gone")
    os.close(alive)
    call("unshare", _CLONE_NEWNS)
    call("mount", b"none", b"/", None, ctypes.c_ulong(_MS_REC_SLAVE), None)
    call("mount", b"proc", b"/proc", b"proc", ctypes.c_ulong(_MS_NOSUID_NODEV_NOEXEC), None)


@contextlib.contextmanager
def _sole(layout: Layout) -> Iterator[None]:
    with (layout.run / "serve.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(f"{layout.root}: a store is being served from here already") from error
        yield


def _append_private(path: Path) -> IO[bytes]:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    return os.fdopen(descriptor, "ab")


def _memory_file(text: str) -> IO[bytes]:
    # Unlike a pipe it never blocks, and the service need not be able to read the file's folder.
    file = os.fdopen(os.memfd_create("kakehashi-config"), "w+b")
    file.write(text.encode())
    file.seek(0)
    return file


def _warn(message: str) -> None:
    sys.stderr.write(f"kakehashi store: {message}\n")
    sys.stderr.flush()
