"""The same from outside: sessions at a site, started through its portal, measured, and ended."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import ValidationError
from websocket import WebSocketException

from kakehashi.errors import ConfigError, KakehashiError
from kakehashi.link.bench.report import Iperf, Run, Study
from kakehashi.link.bench.results import Part, Report, without_names
from kakehashi.verify.visitor import VisitError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kakehashi.verify.canary import Deployment
    from kakehashi.verify.visitor import Kernel

AT_ONCE: tuple[Part, ...] = ("reader", "segmentation")
"""What is measured again in all sessions at once."""

FAILURES = (KakehashiError, OSError, ValueError, WebSocketException)
"""How a portal, or the way to it, fails a visitor; requests' own errors are of OSError."""

_START_S = 600.0
_END_S = 120.0
_STOP_S = 60.0
_ASK_S = 15.0
_POLL_S = 1.0
_IPERF_S = 120
_CONNECTIONS = 4

START = """
import os, signal, subprocess, sys, tempfile
_folder = tempfile.mkdtemp(prefix="kakehashi-bench-")
_said = os.path.join(_folder, "said")
_at = [0]
with open(_said, "wb") as _out:
    _bench = subprocess.Popen(
        [sys.executable, "-P", "-m", "kakehashi.link.bench",
         "--json", os.path.join(_folder, "report.json"), *{arguments!r}],
        stdin=subprocess.DEVNULL, stdout=_out, stderr=_out, start_new_session=True,
    )
def _look():
    code = _bench.poll()
    with open(_said, "rb") as said:
        said.seek(_at[0])
        new = said.read(1 << 16)
    _at[0] += len(new)
    return code, new.decode("utf-8", "replace")
def _report():
    with open(os.path.join(_folder, "report.json"), encoding="utf-8") as file:
        return file.read()
"""
LOOK = "_look()"
REPORT = "_report()"
STOP = "_bench.send_signal(signal.SIGINT)"


@dataclass
class Visit:
    """Sessions at a site, one for each person that was given.

    Parameters
    ----------
    deployments : sequence of Deployment
        Whose sessions, and with which options; the first one is measured alone as well.
    arguments : sequence of str
        Of ``python -m kakehashi.link.bench``.
    parts : sequence of str
        What is measured; everything if empty.
    """

    deployments: Sequence[Deployment]
    arguments: Sequence[str]
    parts: Sequence[Part] = ()
    runs: list[Run] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def study(self, iperf: Iperf | None = None) -> Study:
        """Start, measure, end; returns what there is, also when it was stopped (SIGINT)."""
        begun: list[Deployment] = []
        try:
            for deployment in self.deployments:
                _tell(f"a session of {deployment.visitor.name} at {deployment.site}")
                if deployment.visitor.server() is not None:
                    raise VisitError(
                        f"{deployment.visitor.name} has a session already; it is left alone: end "
                        "it first, or name another person in the plan"
                    )
                # One that does not become ready is ended, too.
                begun.append(deployment)
                options = {"site": deployment.site, "project": deployment.project}
                deployment.visitor.start({**options, **deployment.options}, _START_S)
            self._measure([("alone", begun[0], self.parts)])
            wanted = [part for part in AT_ONCE if not self.parts or part in self.parts]
            if len(begun) > 1 and wanted and not self._stop.is_set():
                self._measure(
                    [
                        (f"{number} of {len(begun)} at once", deployment, wanted)
                        for number, deployment in enumerate(begun, 1)
                    ]
                )
        except KeyboardInterrupt:
            self.problems.append("stopped by hand before everything was measured")
        except FAILURES as error:
            self.problems.append(without_names(str(error)))
        finally:
            for deployment in begun:
                self._end(deployment)
        return Study(runs=tuple(self.runs), iperf3=iperf, problems=tuple(self.problems))

    def _measure(self, stays: Sequence[tuple[str, Deployment, Sequence[Part]]]) -> None:
        with ThreadPoolExecutor(len(stays)) as pool:
            futures = [pool.submit(self._stay, *stay) for stay in stays]
            try:
                wait(futures)
            except KeyboardInterrupt:
                _tell("stopping: what was measured so far is fetched")
                self._stop.set()
            for (label, _, _), future in zip(stays, futures, strict=True):
                try:
                    self.runs.append(Run(label=label, report=future.result()))
                except FAILURES as error:
                    self.problems.append(f"{label}: {without_names(str(error))}")

    def _stay(self, label: str, deployment: Deployment, parts: Sequence[Part]) -> Report:
        arguments = [*self.arguments, *(word for part in parts for word in ("--part", part))]
        with deployment.visitor.kernel() as kernel:
            ran = kernel.run(START.format(arguments=arguments))
            if ran.error is not None:
                raise VisitError(f"the measurement could not be started: {ran.error[-500:]}")
            code, said = self._watch(label, kernel)
            if code != 0:
                raise VisitError(f"the measurement failed ({code}): {said[-500:]}")
            text = str(kernel.value(REPORT))
        try:
            return Report.model_validate_json(text)
        except ValidationError as error:
            raise VisitError(
                f"the session's report is not one of this version: {error.error_count()} errors; "
                "the node must run the same version of Kakehashi"
            ) from None

    def _watch(self, label: str, kernel: Kernel) -> tuple[int, str]:
        """Show progress until the measurement ends; returns its status and its last words."""
        last = ""
        until, ask_at = None, 0.0
        while True:
            code, new = kernel.value(LOOK)
            last = (last + str(new))[-2000:]
            for words in str(new).splitlines():
                _tell(f"{label}: {without_names(words)}")
            if code is not None and not new:
                return int(code), last
            if self._stop.wait(_POLL_S) and until is None:
                until = time.monotonic() + _STOP_S
            if until is not None:
                if time.monotonic() >= ask_at:
                    # More than once: an interrupt can get lost where Python swallows exceptions.
                    kernel.run(STOP)
                    ask_at = time.monotonic() + _ASK_S
                if time.monotonic() > until:
                    raise VisitError(f"the measurement did not stop within {_STOP_S:.0f} s")
                time.sleep(_POLL_S / 10)  # a poll with a deadline; the event is set, and no pause

    def _end(self, deployment: Deployment) -> None:
        name = deployment.visitor.name
        _tell(f"the session of {name} ends")
        try:
            deployment.visitor.stop(_END_S)
        except FAILURES as error:
            why = without_names(str(error))
            self.problems.append(f"the session of {name} may still run; stop it: {why}")


def iperf3(host: str) -> Iperf:
    """Measure plain TCP from here to a host where ``iperf3 -s`` runs.

    Raises
    ------
    ConfigError
        It is not a host's name, there is no iperf3, or its server does not answer.
    """
    if not host or host.startswith("-"):
        raise ConfigError(f"--iperf3 wants a host's name, not {host!r}")
    there, back = (_iperf(host, *extra) for extra in ((), ("-R",)))
    return Iperf(server=host, connections=_CONNECTIONS, to_server_mb_s=there, from_server_mb_s=back)


def _iperf(host: str, *extra: str) -> float:
    argv = ["iperf3", "-c", host, "-P", str(_CONNECTIONS), "-O", "1", "-t", "5", "-J", *extra]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_IPERF_S, check=False)
        found = json.loads(done.stdout)
        # With -J it may fail with the status 0.
        if done.returncode == 0 and "error" not in found:
            return float(found["end"]["sum_received"]["bits_per_second"]) / 8e6
        why = str(found.get("error", "it does not say why"))
    except (OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
        why = str(error)
    raise ConfigError(f"iperf3 to {host} failed: {why}; run `iperf3 -s` there, or leave it out")


def _tell(words: str) -> None:
    plain = "".join(character if character.isprintable() else " " for character in words)
    sys.stderr.write(plain + "\n")
    sys.stderr.flush()
