"""The keeper: holds the session's key, starts what needs it, and watches until the end.

One thread does everything but renewing the lease, since the kernel kills a program when the
thread that started it ends.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import os
import queue
import select
import selectors
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kakehashi.errors import KakehashiError, RefusedError, SessionError
from kakehashi.session import channels, keys, leave
from kakehashi.session.agent import Agent, Conversation, Peer
from kakehashi.session.hubclient import format_time
from kakehashi.session.init import MESSAGE_LIMIT
from kakehashi.session.lines import Lines
from kakehashi.session.plan import STORE, WORK, Places
from kakehashi.session.processes import descendants, descends
from kakehashi.session.watch import News, Renewer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kakehashi.session.hubclient import Enrolment, Grant, HubClient
    from kakehashi.session.plan import Document, Plan
    from kakehashi.session.warden import Built, WardenHandle

MOUNT_PATIENCE_S = 60.0
ABORT_PATIENCE_S = 2.0
END_PATIENCE_S = 10.0
FLUSH_PATIENCE_S = 3.0
# Said this long before the end that is known beforehand.
WARNING_S = 10.0
SILENT_S = 30.0
# A process's first channel is given beyond the bound, up to so many times it: those that came
# first may hold all of it, and one without any could not go on.
STORE_CHANNELS = 32
FIRST_TIMES = 4
WORK_CHANNELS = 16
VIEW_CHANNELS = 16
# The exit status by which ssh says that it was not the other side's program that failed.
SSH_FAILED = 255
REPORT_TRIES = 3
_SIGNALS = (signal.SIGTERM, signal.SIGXCPU, signal.SIGHUP, signal.SIGINT)
_DEAD_MOUNT = frozenset({os.strerror(errno.ENOTCONN), os.strerror(errno.ECONNABORTED)})


@dataclass(frozen=True)
class Ending:
    """Why a session ends, and how much time its programs are given."""

    reason: str
    status: int
    grace_s: float


class Keeper:
    """Runs one session from the redeemed ticket to the report.

    Parameters
    ----------
    document : Document
    plan : Plan
    warden : WardenHandle
        Its world is built.
    built : Built
        The keeper takes the descriptors over.
    hub : HubClient
    key : SigningKey
        Wiped at the end.
    enrolment : Enrolment
    library : Path
        ``nodump.so``.
    use_view : bool
        The verified view, not sshfs.
    before : Before
        The node as it was.
    """

    def __init__(
        self,
        document: Document,
        plan: Plan,
        warden: WardenHandle,
        *,
        built: Built,
        hub: HubClient,
        key: keys.SigningKey,
        enrolment: Enrolment,
        library: Path,
        before: leave.Before,
        use_view: bool,
    ) -> None:
        self._document = document
        self._plan = plan
        self._warden = warden
        self._files = built.descriptors
        self._payload = built.init
        self._hub = hub
        self._key = key
        self._enrolment = enrolment
        self._grant = enrolment.grant
        self._before = before
        self._use_view = use_view
        self._loop = selectors.DefaultSelector()
        self._complaints, complain = os.pipe()
        self._said: collections.deque[str] = collections.deque(maxlen=8)
        self._programs = channels.Programs(self._files["auth"], library, complain)
        self._agent = Agent(
            key,
            frozenset({self._grant.view_account, self._grant.work_account}),
            self._is_ours,
        )
        self._channels: dict[int, tuple[str, int]] = {}
        self._lines = Lines([self._grant.address, *self._grant.further_addresses])
        self._mounters: dict[int, str] = {}
        self._started = 0
        self._seen: dict[str, float] = {}
        self._view_ready = False
        self._running = False
        self._ending: Ending | None = None
        self._warden_gone = self._warden_lost = False
        self._state = ("live", "")
        self._news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._renewer = Renewer(hub, key, self._grant, enrolment.offline_max_s, self._tell)

    def run(self) -> int:
        """Run the session to its end.

        Returns
        -------
        int
            Exit status: 0 for an end that was asked for or the server's own, 1 otherwise.
        """
        try:
            self._prepare()
            self._follow()
        except KakehashiError as error:
            self._end(str(error), status=1)
        finally:
            self._renewer.stop()
            status = self._finish()
        return status

    # ------------------------------------------------------------------ setting up

    def _prepare(self) -> None:
        self._wake, waker = socket.socketpair()
        for end in (self._wake, waker):
            end.settimeout(0)
        self._waker = waker
        for kind in (*_SIGNALS, signal.SIGCHLD):
            signal.signal(kind, lambda *_: None)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        os.set_blocking(self._complaints, False)

        grant, auth = self._grant, self._files["auth"]
        channels.seal_programs(auth)
        channels.write_private(auth, "id.pub", keys.public_line(self._key.public) + "\n")
        self._take_certificate(grant)
        self._write_lease()

        self._on(self._wake.fileno(), self._on_wake)
        self._on(self._complaints, self._on_complaint)
        self._on(self._warden.control.fileno(), self._on_warden)
        self._agent_listener = socket.socket(fileno=self._files.pop("agent_listener"))
        self._on(self._agent_listener.fileno(), self._on_agent)
        self._listen("store", grant.view_account, STORE_CHANNELS)
        self._listen("work", grant.work_account, WORK_CHANNELS)
        if self._plan.folder is None:
            self._mount()
        else:
            self._on_view_ready()
        hub = {"address": self._enrolment.hub_address, "port": self._enrolment.hub_port}
        self._warden.send({"relay": hub})
        self._patience = time.monotonic() + MOUNT_PATIENCE_S
        self._renewer.start()

    def _listen(self, name: str, account: str, limit: int) -> None:
        """Make each connection to a socket of the payload's a channel of its own."""
        listener = socket.socket(fileno=self._files.pop(f"{name}_listener"))
        self._on(listener.fileno(), partial(self._on_client, listener, name, account, limit))

    def _mount(self) -> None:
        work = self._files.pop("work_fuse")
        self._mounters[self._programs.sshfs(self._grant, work, view=False)] = "the work folder"
        os.close(work)
        self._start_view()
        self._started += 2

    def _start_view(self) -> None:
        store, grant = self._files.pop("store_fuse"), self._grant
        if self._use_view:
            self._view, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            pid = self._programs.view(
                grant, self._document.node.software, sys.executable, store, theirs.fileno()
            )
            theirs.close()
            self._on(self._view.fileno(), self._on_view)
        else:
            pid = self._programs.sshfs(grant, store, view=True)
            self._on_view_ready()
        self._mounters[pid] = "the view of the store"
        os.close(store)

    def _on_view_ready(self) -> None:
        self._view_ready = True
        self._warden.send({"watch": True})

    def _start_server(self) -> None:
        grant, run = self._grant, self._files["run"]
        session = {
            "session": grant.session,
            "person": grant.person,
            "project": grant.project,
            "site": self._document.site,
            "ends_at": format_time(grant.by_own_clock(grant.ends_at)),
            "manifest": grant.manifest,
            **self._ways(),
            "software": grant.software,
        }
        channels.write_private(run, "session.json", json.dumps(session))
        server = os.open("server", os.O_RDONLY | os.O_DIRECTORY, dir_fd=run)
        try:
            for name, text in self._enrolment.files.items():
                if "/" in name or name in {"", ".", ".."}:
                    raise SessionError(f"the portal sent a file with the odd name {name!r}")
                channels.write_private(server, name, text)
        finally:
            os.close(server)
        self._running = True
        self._warden.send(
            {
                "start": {
                    "argv": list(self._enrolment.argv),
                    "environment": self._enrolment.environment,
                    "person": grant.person,
                    "session": grant.session,
                }
            }
        )

    def _ways(self) -> dict[str, str | list[str] | None]:
        """Return where the payload finds the data."""
        run = Places.of(self._plan).run
        mounted = self._plan.folder is None
        return {
            "view": STORE if mounted else None,
            "work": WORK if mounted else None,
            # Of what sshfs reads nobody keeps count.
            "traffic": [f"{STORE}/.traffic"] if mounted and self._use_view else [],
            "socket": f"{run}/store.sock",
            "work_socket": f"{run}/work.sock",
        }

    # ------------------------------------------------------------------ the loop

    def _on(self, descriptor: int, handler: Callable[[], object]) -> None:
        self._loop.register(descriptor, selectors.EVENT_READ, handler)

    def _off(self, descriptor: int) -> None:
        with contextlib.suppress(KeyError):
            self._loop.unregister(descriptor)

    def _turn(self, timeout: float) -> None:
        for key, _ in self._loop.select(max(0.0, timeout)):
            # A handler before this one may have closed it.
            if key.fd in self._loop.get_map():
                key.data()

    def _follow(self) -> None:
        """Turn until there is a reason to end."""
        margin = min(WARNING_S, max(self._grant.left_s, 0.0) / 10)
        while self._ending is None:
            left = self._grant.left_s - margin
            if left <= 0:
                self._end("the session's time is over", status=0)
                return
            if not self._running and time.monotonic() > self._patience:
                self._end(
                    f"the store could not be mounted in {MOUNT_PATIENCE_S:.0f} s"
                    + self._last_words(),
                    status=1,
                )
                return
            self._note_silence()
            self._turn(min(left, 1.0))

    def _end(self, reason: str, *, status: int, grace_s: float = 5.0) -> None:
        if self._ending is None:
            self._ending = Ending(reason, status, grace_s)
            sys.stderr.write(f"kakehashi: session ends: {reason}\n")
            self._set_state("ending", reason)

    def _tell(self, news: News) -> None:
        """Take news from the renewer's thread into the loop."""
        self._news.put(news)
        with contextlib.suppress(OSError):
            self._waker.send(b"\0")

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            received = self._wake.recv(4096)
            if set(received) & {int(kind) for kind in _SIGNALS}:
                self._end("the scheduler or the person asked for it", status=0)
        self._reap()
        while not self._news.empty():
            self._hear(self._news.get())

    def _hear(self, news: News) -> None:
        if self._ending is not None:
            # The folders for what it says may be gone.
            return
        if news.kind == "lost":
            self._end(f"the right to the data has ended: {news.message}", status=1, grace_s=0)
        elif news.grant is not None:
            self._grant = news.grant
            self._take_certificate(news.grant)
            self._set_state("live", "")
        else:
            self._set_state("offline", f"{news.message}; the session goes on for the time being")

    def _take_certificate(self, grant: Grant) -> None:
        self._agent.renew(keys.certificate_blob(grant.certificate, self._key.public))
        known = "".join(f"@cert-authority * {line}\n" for line in grant.host_ca.splitlines())
        channels.write_private(self._files["auth"], "known_hosts", known)
        channels.write_private(self._files["auth"], "cert", grant.certificate + "\n")

    def _set_state(self, state: str, message: str) -> None:
        if self._state[0] != "ending":
            self._state = (state, message)
        self._write_lease()

    def _write_lease(self) -> None:
        grant, (state, message) = self._grant, self._state
        lease = {
            "expires_at": format_time(grant.by_own_clock(grant.expires_at)),
            "ends_at": format_time(grant.by_own_clock(grant.ends_at)),
            "state": state,
            "message": message,
            "catalogue": grant.catalogue,
        }
        channels.write_private(self._files["run"], "lease.json", json.dumps(lease))

    def _note_silence(self) -> None:
        """Say so where a mount has not answered for long; a cut is ridden out."""
        if not self._running or self._state[0] == "ending":
            return
        silent = [
            name for name, moment in self._seen.items() if time.monotonic() - moment > SILENT_S
        ]
        message = f"the store does not answer ({', '.join(silent)})" if silent else ""
        if self._state == ("live", "") and message:
            self._set_state("offline", message)
        elif self._state[0] == "offline" and self._state[1].startswith("the store") and not silent:
            self._set_state("live", "")

    # ------------------------------------------------------------------ programs

    def _is_ours(self, pid: int) -> bool:
        """Tell whether a process is an ``ssh`` of ours: a child, or an orphan of sshfs.

        Only descendants of this process can become its children, and the warden's die with
        their namespace.
        """
        if self._plan.folder is not None:
            # An orphan of the payload could become a child of this process, and no channel.
            return pid in self._channels
        if pid in self._mounters or pid == self._warden.pid:
            return False
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
        return text[text.rindex(")") + 2 :].split()[1] == str(os.getpid())

    def _reap(self) -> None:
        # What the warden has said comes first: it knows the cause, this only what followed.
        while select.select([self._warden.control], [], [], 0)[0]:
            if not self._on_warden():
                break
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._channels.pop(pid, None)
            self._lines.ended(pid, failed=os.waitstatus_to_exitcode(status) == SSH_FAILED)
            if pid == self._warden.pid:
                self._warden_gone = True
                self._end("the session's warden was killed", status=1)
            elif pid in self._mounters:
                name = self._mounters.pop(pid)
                code = os.waitstatus_to_exitcode(status)
                self._turn_complaints()
                self._end(
                    f"{name} has gone (its program ended with {code}){self._last_words()}",
                    status=1,
                )

    def _on_complaint(self) -> None:
        self._turn_complaints()

    def _turn_complaints(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._complaints, 4096):
                lines = data.decode(errors="replace").splitlines()
                self._said.extend(line.strip()[:200] for line in lines if line.strip())

    def _last_words(self) -> str:
        return f": {' / '.join(self._said)}" if self._said else ""

    def _on_agent(self) -> None:
        connection, _ = self._agent_listener.accept()
        if not self._agent.admits(Peer.of(connection)):
            connection.close()
            return
        connection.settimeout(0)
        talk = Conversation(self._agent)
        self._on(connection.fileno(), partial(self._on_request, connection, talk))

    def _on_request(self, connection: socket.socket, talk: Conversation) -> None:
        try:
            data = connection.recv(65536)
            if data:
                connection.sendall(talk.feed(data))
                return
        except BlockingIOError:
            return
        except (OSError, keys.WireError):
            pass
        self._off(connection.fileno())
        connection.close()

    def _on_client(self, listener: socket.socket, kind: str, account: str, limit: int) -> None:
        """Make a connection from the payload the two ends of a new channel."""
        connection, _ = listener.accept()
        with connection:
            peer = Peer.of(connection)
            if self._may_read(peer):
                self._open_channel(kind, account, connection.fileno(), limit, peer.pid)

    def _may_read(self, peer: Peer) -> bool:
        """Tell whether a process is the payload's; with namespaces no other has the socket."""
        if self._payload is None or peer.pid == self._warden.pid:
            return True
        return descends(peer.pid, self._payload)

    def _open_channel(
        self, kind: str, account: str, stdio: int, limit: int, client: int = 0
    ) -> bool:
        users = [who for one, who in self._channels.values() if one == kind]
        if kind == "store" and client not in users:
            limit *= FIRST_TIMES
        if self._ending is not None or len(users) >= limit:
            return False
        try:
            address = self._lines.choose()
            pid = self._programs.ssh(self._grant, account, address, stdio)
            self._lines.opened(pid, address)
            self._channels[pid] = (kind, client)
        except SessionError as error:
            self._said.append(str(error))
            return False
        self._started += 1
        return True

    def _on_view(self) -> None:
        try:
            data = self._view.recv(4096)
            if data == b"c":
                self._give_channel()
            elif data == b"r":
                self._on_view_ready()
            elif data.startswith(b"e"):
                reason = data[1:].decode(errors="replace")
                self._end(f"the view of the store failed: {reason}", status=1)
            elif not data:
                # Its end as a process is what counts, and is told by the kernel.
                self._off(self._view.fileno())
        except ConnectionError:
            self._off(self._view.fileno())

    def _give_channel(self) -> None:
        near, far = socket.socketpair()
        with near, far:
            account = self._grant.view_account
            if self._open_channel("view", account, near.fileno(), VIEW_CHANNELS):
                socket.send_fds(self._view, [b"c"], [far.fileno()])
            else:
                self._view.send(b"" if self._ending is not None else b"n")

    # ------------------------------------------------------------------ the warden

    def _on_warden(self) -> bool:
        """Take one message; tell whether there may be more."""
        try:
            data = self._warden.control.recv(MESSAGE_LIMIT)
        except ConnectionError:
            data = b""
        if not data:
            self._warden_lost = True
            self._off(self._warden.control.fileno())
            self._end("the session's warden was killed", status=1)
            return False
        message = json.loads(data)
        if "seen" in message:
            self._on_seen(message["seen"], message["problem"])
        elif "ended" in message:
            code = int(message["ended"])
            self._end(f"the server has ended with {code}", status=0 if code == 0 else 1)
        elif "error" in message:
            self._end(f"the server could not be started: {message['error']}", status=1)
        return True

    def _on_seen(self, name: str, problem: str | None) -> None:
        if problem is None:
            self._seen[name] = time.monotonic()
            if not self._running and self._view_ready and self._seen.keys() >= {"store", "work"}:
                self._start_server()
        elif problem in _DEAD_MOUNT or not self._running:
            self._turn_complaints()
            self._end(f"the mount of {name} is dead ({problem}){self._last_words()}", status=1)
        else:
            self._set_state("offline", f"the store answers with an error ({name}: {problem})")

    # ------------------------------------------------------------------ the end

    def _finish(self) -> int:
        """Take everything down, look, report, and wipe the key."""
        ending = self._ending or Ending("an error of the wrapper", 1, 0)
        self._stop_warden(ending)
        self._stop_programs()
        if self._plan.folder is not None:
            # The warden has done so, unless it was killed.
            shutil.rmtree(self._plan.folder, ignore_errors=True)
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        items = leave.look_after(
            self._before,
            str(Path.home()),
            walls=self._document.node.walls,
            started=self._started,
            refused=self._agent.refused,
            key_expires=format_time(self._grant.expires_at),
        )
        items.append({"item": "end", "result": "seen", "detail": ending.reason})
        self._report(items)
        self._key.wipe()
        return ending.status

    def _stop_warden(self, ending: Ending) -> None:
        with contextlib.suppress(KakehashiError):
            self._warden.send({"stop": ending.grace_s})
        abort = time.monotonic() + ending.grace_s + ABORT_PATIENCE_S
        deadline = abort + END_PATIENCE_S
        while not self._warden_gone and time.monotonic() < deadline:
            if self._warden_lost or time.monotonic() > abort:
                # Who waits for an answer of a file system that hangs cannot even be killed;
                # the end of its program is an answer.
                self._kill(self._mounters)
            self._turn(0.1)
            self._reap()
        if not self._warden_gone:
            # The kernel ends what is in its namespaces with it.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._warden.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._warden.pid, 0)

    def _stop_programs(self) -> None:
        """End the programs; the file systems first get time to end of themselves."""
        deadline = time.monotonic() + FLUSH_PATIENCE_S
        while self._mounters and time.monotonic() < deadline:
            self._turn(0.05)
            self._reap()
        while left := descendants(os.getpid()):
            self._kill(left)
            self._turn(0.01)
            self._reap()
            if time.monotonic() > deadline + FLUSH_PATIENCE_S:
                return

    def _kill(self, pids: Iterable[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _report(self, items: list[dict[str, str]]) -> None:
        for attempt in range(REPORT_TRIES):
            try:
                self._hub.leave(self._key, items)
            except RefusedError as error:
                sys.stderr.write(f"kakehashi: the portal took no report: {error}\n")
                return
            except SessionError as error:
                sys.stderr.write(f"kakehashi: {error}\n")
                time.sleep(0.2 * 2**attempt)
            else:
                return
