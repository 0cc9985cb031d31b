"""The small init process of the payload: starts its programs, reaps, and ends them.

Forked (never exec'd) from the warden, so that no program of the same user can trace it. With
namespaces it is process 1 of the payload's own; without them it is confined as its programs are.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kakehashi.session import syscalls
from kakehashi.session.payload import ENDING_SIGNALS, confine, environment
from kakehashi.session.plan import WORK, Places, Plan
from kakehashi.session.processes import descendants

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

LOG_LIMIT = 16 << 20
MESSAGE_LIMIT = 192 * 1024
_PERSON = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


class Init:
    """Takes orders from the warden, starts programs, reaps.

    Messages are JSON objects on a sequenced-packet socket. Orders are ``build``, ``probe``
    and ``start``; answers ``built``, ``probe``, ``started`` and ``error``.

    Parameters
    ----------
    plan : Plan
    build : callable
        Makes the payload's world around this process.
    control : socket.socket
    """

    def __init__(self, plan: Plan, build: Callable[[], None], control: socket.socket) -> None:
        self._plan = plan
        self._build = build
        self._control = control
        self._places = Places.of(plan)

    def run(self) -> NoReturn:
        """Build, confine, and follow orders; the exit status is the server's."""
        try:
            # The warden first learns who this is, then says so; only then may this end answer.
            if not self._control.recv(MESSAGE_LIMIT):
                os._exit(1)
            self._build()
            syscalls.set_dumpable(dumpable="init" in self._plan.without)
            confine(self._plan)
            self._say({"built": True})
            while True:
                data = self._control.recv(MESSAGE_LIMIT)
                if not data:
                    os._exit(1)
                order = json.loads(data)
                if "probe" in order:
                    self._say({"probe": self._probe(order["probe"])})
                else:
                    os._exit(self._serve(order["start"]))
        except BaseException as error:  # the last frame of this process
            with contextlib.suppress(OSError):
                self._say({"error": f"{type(error).__name__}: {error}"})
            os._exit(1)

    def _say(self, message: dict[str, Any]) -> None:
        self._control.send(json.dumps(message).encode())

    def _probe(self, facts: dict[str, Any]) -> Any:
        """Run the probe program under exactly the payload's conditions."""
        here = str(Path(__file__).resolve().parents[2])
        script = (
            "import sys; sys.path.insert(0, sys.argv[1]);"
            "from kakehashi.session.probe import main; main(sys.argv[2])"
        )
        argv = [sys.executable, "-I", "-S", "-c", script, here, json.dumps(facts)]
        reading, writing = os.pipe()
        pid = self._spawn(argv, environment(self._plan, {}), self._places.home, writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as stream:
            text = stream.read(MESSAGE_LIMIT // 2)
        os.waitpid(pid, 0)
        try:
            return json.loads(text)
        except ValueError:
            lines = text.decode(errors="replace").strip().splitlines() or ["no output"]
            raise RuntimeError(f"the probe did not finish: {lines[-1]}") from None

    def _serve(self, order: dict[str, Any]) -> int:
        person = order["person"]
        if not _PERSON.fullmatch(person):
            raise ValueError(f"the name {person!r} cannot be a folder's name")
        logs, home = self._folders(person)
        log = os.open(
            logs / f"{order['session']}.log",
            os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC,
            0o600,
        )
        reading, writing = os.pipe()
        child = self._spawn(
            order["argv"], environment(self._plan, order["environment"]), str(home), writing
        )
        os.close(writing)
        signal.signal(signal.SIGTERM, self._ask_all_to_end)
        self._say({"started": True})
        writer = threading.Thread(target=_write_log, args=(reading, log), daemon=True)
        writer.start()
        while True:
            pid, status = os.wait()
            if pid == child:
                writer.join(timeout=1)
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code

    def _folders(self, person: str) -> tuple[Path, Path]:
        """Return the folder for the server's log, and where the server starts."""
        if self._plan.folder is not None:
            # No mount of the work folder; what is here ends with the session.
            return Path(self._places.temporary), Path(self._places.home)
        logs, home = Path(WORK, ".kakehashi", "logs"), Path(WORK, person)
        logs.mkdir(parents=True, exist_ok=True)
        home.mkdir(exist_ok=True)
        return logs, home

    def _ask_all_to_end(self, *_: object) -> None:
        # Only where all that can be seen is the payload's own may "all" be said.
        everyone = [-1] if self._plan.folder is None else descendants(os.getpid())
        for pid in everyone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def _spawn(self, argv: list[str], env: dict[str, str], folder: str, output: int) -> int:
        """Start a program with nothing but its three standard files.

        Raises
        ------
        OSError
            The program could not be started.
        """
        failed, report = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                for kind in (*ENDING_SIGNALS, signal.SIGPIPE):
                    signal.signal(kind, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, ())
                os.umask(0o077)
                os.chdir(folder)
                nothing = os.open("/dev/null", os.O_RDONLY)
                for source, target in ((nothing, 0), (output, 1), (output, 2)):
                    os.dup2(source, target)
                os.dup2(report, 3, inheritable=False)
                if "descriptors" not in self._plan.without:
                    os.closerange(4, 65536)
                else:
                    os.dup2(self._control.fileno(), 4)
                os.execvpe(argv[0], argv, env)  # noqa: S606 - an argument list, no shell
            except OSError as error:
                os.write(3, f"{argv[0]}: {error.strerror}".encode())
            finally:
                os._exit(127)
        os.close(report)
        with os.fdopen(failed, "rb") as stream:
            problem = stream.read(4096)
        if problem:
            os.waitpid(pid, 0)
            raise OSError(f"cannot start {problem.decode(errors='replace')}")
        return pid


def _write_log(source: int, log: int) -> None:
    """Copy the server's output into its log, up to a bound; read on beyond it."""
    left = LOG_LIMIT
    while data := os.read(source, 65536):
        kept = data[:left]
        left -= len(kept)
        # A work folder that does not answer costs the log, not the session.
        with contextlib.suppress(OSError):
            if kept:
                os.write(log, kept)
            if kept and not left:
                os.write(log, b"\n[the log ends here: it has reached its bound]\n")
