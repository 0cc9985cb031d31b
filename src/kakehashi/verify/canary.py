"""One canary session, its end, and the search of every host for what it may have left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from kakehashi.errors import KakehashiError
from kakehashi.session.plan import FOLDER_PREFIX
from kakehashi.session.plan import MEMORY as SESSION_MEMORY
from kakehashi.verify import inside, profile
from kakehashi.verify.pattern import INTERCEPT, Pattern, masked
from kakehashi.verify.search import marker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from kakehashi.verify.visitor import Kernel, Visitor

GONE_S = 120.0
PENDING_S = 15.0
POLL_S = 0.5
BROWSER = "browser"
NOTEBOOK = "canary.ipynb"
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
MEMORY = ("/tmp", "/var/tmp", "/dev/shm", "/home/session", "/run/user")  # noqa: S108 - names inside the payload
MAY_BE_LEFT = frozenset(
    {"POSIX shared memory", "System V segment", "memory file", "deleted, but open",
     "command line", "core dump"}
)  # fmt: skip
"""What a program may do in its session, besides writing to :data:`MEMORY`: all of it lies in
memory that goes with the session."""


class VerifyError(KakehashiError):
    """The canary could not be run; nothing is known of the site."""


class Access(Protocol):
    """Root on one host of the deployment.

    Attributes
    ----------
    name, role : str
        Its name, and ``hub``, ``store``, ``node`` or ``head``.
    skip : tuple of str
        Paths where the canary's data may lie, since they are inside.
    """

    @property
    def name(self) -> str:
        """Return its name."""

    @property
    def role(self) -> str:
        """Return what it does."""

    @property
    def skip(self) -> tuple[str, ...]:
        """Return the paths that are not searched."""

    def python(self, module: str, *arguments: str, stdin: str = "") -> str:
        """Run a module of the host's own installation as root; returns what it printed."""


@dataclass(frozen=True)
class Deployment:
    """Where the canary flies.

    Attributes
    ----------
    visitor : Visitor
        The canary's person, logged in.
    site : str
    project : str
        One that shows the canary's series, and that the person may use at the site.
    options : mapping
        Further options of the spawn page: queue, gpus, hours.
    hosts : sequence of Access
        All that is searched.
    ways : mapping
        How a session may be ended, besides ``stop``: each gets this deployment and the session.
    browser : Browser or None
        The person's own, which is searched too.
    """

    visitor: Visitor
    site: str
    project: str
    options: Mapping[str, Any]
    hosts: Sequence[Access]
    ways: Mapping[str, Callable[[str], None]] = field(default_factory=dict)
    browser: profile.Browser | None = None

    def host(self, role: str) -> Access:
        """Return the first host of a role."""
        found = next((host for host in self.hosts if host.role == role), None)
        if found is None:
            raise VerifyError(f"no host with the role {role!r} is named; it cannot be searched")
        return found


def tell(words: str) -> None:
    """Show progress."""
    sys.stderr.write(f"{words}\n")
    sys.stderr.flush()


@dataclass
class Canary:
    """One run.

    Parameters
    ----------
    deployment : Deployment
    way : str
        How the session ends.
    """

    deployment: Deployment
    way: str = "stop"
    pattern: Pattern = field(default_factory=Pattern.new)
    since: dict[str, int] = field(default_factory=dict)
    kept: profile.Control = field(default_factory=profile.Control)

    def run(self) -> dict[str, Any]:
        """Fly the canary; returns the report.

        Raises
        ------
        VerifyError, VisitError
            It could not be flown. A session that was begun is stopped.
        """
        where = self.deployment
        if self.way != "stop" and self.way not in where.ways:
            known = ", ".join(["stop", *where.ways])
            raise VerifyError(f"there is no way {self.way!r} to end a session here; known: {known}")
        tell("the canary's series is packed at the store")
        uid = self._series()
        self.since = {host.name: self._since(host) for host in where.hosts}
        tell(f"a session at {where.site}")
        with contextlib.ExitStack() as open_until_quiet:
            session, attempts, during = self._live(uid, open_until_quiet)
            tell("waiting until it is quiet")
            receipt = self._settled(session)
        tell("every host is searched")
        after = self.search_all()
        if where.browser is not None:
            after[BROWSER] = self._search_browser(where.browser)
        return self._report(session, attempts, during, after, receipt)

    # Steps

    def _live(
        self, uid: str, open_until_quiet: contextlib.ExitStack
    ) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """Do all that the canary does from its session's start to its end.

        Returns
        -------
        session : str
        attempts : dict
            What was tried inside, and what came of it.
        during : dict
            What the search of the nodes found meanwhile.
        """
        where, visitor = self.deployment, self.deployment.visitor
        try:
            visitor.start({"site": where.site, "project": where.project, **where.options}, 300)
            with visitor.kernel() as kernel:
                session = self._session()
                _act(kernel, inside.READ.format(uid=uid, intercept=INTERCEPT))
                printed = _act(kernel, inside.PRINT)
                _act(kernel, inside.LEAVE)
                raised = kernel.run(inside.RAISE).error or ""
                attempts = kernel.value(inside.RESULT)
                self._notebook(uid, printed + raised)
                if where.browser is not None:
                    tell("a browser at the canary's notebook")
                    open_until_quiet.enter_context(self._browsing(where.browser))
                tell("while it runs: the search must find it")
                during = self.search_all(frozenset({"node"}))
                tell(f"the session ends by: {self.way}")
                if self.way != "stop":
                    where.ways[self.way](session)
        except BaseException:
            with contextlib.suppress(Exception):
                visitor.stop()
            raise
        if self.way == "stop":
            visitor.stop(GONE_S)
        return session, attempts, during

    def _cover(self) -> tuple[bytes, str]:
        mask = os.urandom(61)
        return mask, mask.hex()

    def _series(self) -> str:
        mask, text = self._cover()
        request = {"mask": text, "plain": masked(self.pattern.plain, mask).hex()}
        store = self.deployment.host("store")
        project = self.deployment.project
        told = store.python("kakehashi.verify.series", project, stdin=json.dumps(request))
        return told.split()[-1]

    def _since(self, host: Access) -> int:
        answer = host.python("kakehashi.verify.search", stdin=json.dumps({"marker": True}))
        return int(json.loads(answer)["since_ns"])

    def _session(self) -> str:
        visitor = self.deployment.visitor
        answer = visitor.call("GET", f"/user/{visitor.name}/kakehashi/session")
        if answer.status_code != 200:
            raise VerifyError(f"the session does not tell its name: {answer.status_code}")
        return str(answer.json()["session"])

    def _notebook(self, uid: str, text: str) -> None:
        """Save a notebook whose output holds the pattern: at the store, where it may lie."""
        output = {"output_type": "stream", "name": "stdout", "text": text}
        printing = inside.READ.format(uid=uid, intercept=INTERCEPT) + inside.PRINT
        cells: list[dict[str, Any]] = [
            {"cell_type": "code", "execution_count": None, "metadata": {}, "source": source,
             "outputs": outputs, "id": name}
            for name, source, outputs in (
                ("print", printing, [output]), ("view", inside.VIEW, []),
            )
        ]  # fmt: skip
        notebook = {"cells": cells, "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5}
        answer = self.deployment.visitor.call(
            "PUT", self._contents(), {"type": "notebook", "format": "json", "content": notebook}
        )
        if answer.status_code not in {200, 201}:
            raise VerifyError(f"the notebook could not be saved: {answer.status_code}")

    def _contents(self) -> str:
        name = self.deployment.visitor.name
        return f"/user/{name}/api/contents/{name}/{NOTEBOOK}"

    @contextlib.contextmanager
    def _browsing(self, browser: profile.Browser) -> Iterator[None]:
        """Have the person's browser show the notebook until the session is over."""
        visitor = self.deployment.visitor
        address = f"{visitor.url}/user/{visitor.name}/lab/tree/{visitor.name}/{NOTEBOOK}"
        self.since[BROWSER] = marker()
        with (
            self.kept.serving(address, visitor.name) as control,
            browser.visiting(control, self._worked),
        ):
            yield

    def _worked(self) -> bool:
        """Tell whether somebody ran the notebook's cells and saved it."""
        answer = self.deployment.visitor.call("GET", self._contents())
        if answer.status_code != 200:
            return False
        return all(cell["execution_count"] for cell in answer.json()["content"]["cells"])

    def _search_browser(self, browser: profile.Browser) -> dict[str, Any]:
        tell("the browser's profile is searched")
        portal = self.deployment.visitor.url
        return profile.search(browser.folders, self.since[BROWSER], self.pattern, self.kept, portal)

    def _settled(self, session: str) -> dict[str, Any]:
        """Wait until the hub knows of the end and the receipt stands; returns the receipt."""
        visitor = self.deployment.visitor
        deadline = time.monotonic() + GONE_S
        quiet = None
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                if visitor.server() is None:
                    quiet = quiet or time.monotonic()
                    answer = visitor.call("GET", f"/hub/api/kakehashi/receipts/{session}")
                    receipt = answer.json() if answer.status_code == 200 else {}
                    if receipt.get("state") == "complete":
                        return dict(receipt)
                    if receipt and time.monotonic() - quiet > PENDING_S:
                        return dict(receipt)
            time.sleep(POLL_S)
        raise VerifyError(f"the hub still shows the session after {GONE_S:.0f} s")

    def _at_store(self, session: str) -> list[dict[str, Any]]:
        """Return the session where the store still has it, with lease and connections."""
        told = self.deployment.host("store").python("kakehashi.cli", "sessions", "--json")
        return [one for one in json.loads(told) if one["session"] == session]

    # The search

    def search_all(self, roles: frozenset[str] | None = None) -> dict[str, Any]:
        """Search all hosts, or those of some roles; returns each one's answer."""
        hosts = [host for host in self.deployment.hosts if roles is None or host.role in roles]
        with ThreadPoolExecutor(max_workers=4) as pool:
            answers = list(pool.map(lambda host: self._search(host, self.since[host.name]), hosts))
        return {host.name: found for host, found in zip(hosts, answers, strict=True)}

    def _search(self, host: Access, since_ns: int) -> dict[str, Any]:
        mask, text = self._cover()
        needles = {name: masked(data, mask).hex() for name, data in self.pattern.needles().items()}
        request = {"mask": text, "needles": needles, "since_ns": since_ns, "skip": list(host.skip)}
        try:
            answer = host.python("kakehashi.verify.search", stdin=json.dumps(request))
            return dict(json.loads(answer))
        except (KakehashiError, OSError, ValueError) as error:
            reason = str(error)[-500:]
            return {
                "findings": [],
                "looked": {},
                "unseen": [{"place": "the host", "reason": reason}],
                "live": {"mounts": [], "processes": []},
            }

    def _report(
        self,
        session: str,
        attempts: dict[str, Any],
        during: dict[str, Any],
        after: dict[str, Any],
        receipt: dict[str, Any],
    ) -> dict[str, Any]:
        findings = [
            {"host": name, **one} for name, answer in after.items() for one in answer["findings"]
        ]
        live: dict[str, Any] = {
            kind: [
                f"{name}: {one}" for name, answer in after.items() for one in answer["live"][kind]
            ]
            for kind in ("mounts", "processes")
        }
        live["sessions"] = self._at_store(session)
        control = {
            "findings": sum(len(answer["findings"]) for answer in during.values()),
            "mounts": sum(len(answer["live"]["mounts"]) for answer in during.values()),
            "processes": sum(len(answer["live"]["processes"]) for answer in during.values()),
        }
        if not attempts["mounted"]:
            # A session without namespaces has no mounts either.
            del control["mounts"]
        kept = after.get(BROWSER, {}).get("control", {})
        control |= {f"{BROWSER}: {name}": count for name, count in kept.items()}
        memory = _memory(attempts)
        allowed = [one for one in attempts["left"] if _may_be_left(one, memory)]
        wrong = sorted(set(attempts["left"]) - set(allowed)) + attempts["dumps"]
        state = receipt.get("state")
        left = [item for item in receipt.get("items", []) if item["result"] == "left"]
        return {
            "ok": not findings
            and not any(live.values())
            and all(control.values())
            and not wrong
            and not left
            and state in {"complete", "pending"},
            "site": self.deployment.site,
            "end": self.way,
            "session": session,
            "receipt": state,
            "walls": receipt.get("walls"),
            "pending": [
                item["detail"]
                for item in receipt.get("items", [])
                if item["detail"].startswith("pending")
            ],
            "left": left,
            "findings": findings,
            "live": live,
            "control": control,
            "allowed_in_session": allowed,
            "not_allowed_but_done": wrong,
            "refused_in_session": attempts["refused"],
            "not_observable": [
                {"host": name, **one} for name, answer in after.items() for one in answer["unseen"]
            ],
            "looked": {name: answer["looked"] for name, answer in after.items()},
            "browser_searched": BROWSER in after,
            "skipped": {host.name: list(host.skip) for host in self.deployment.hosts},
        }


def self_test_of(deployment: Deployment) -> dict[str, Any]:
    """Plant the pattern on every host, in every place and form, and have the search find it."""
    needles = Pattern.new().needles()
    controls: list[dict[str, Any]] = []
    for host in deployment.hosts:
        tell(f"self-test on {host.name}")
        mask = os.urandom(61)
        covered = {name: masked(data, mask).hex() for name, data in needles.items()}
        request = {"mask": mask.hex(), "needles": covered, "skip": list(host.skip)}
        answer = host.python("kakehashi.verify.selftest", stdin=json.dumps(request))
        controls += [{"host": host.name, **one} for one in json.loads(answer)["controls"]]
    green = [one for one in controls if not one["found"]]
    return {"ok": bool(controls) and not green, "controls": len(controls), "stayed_green": green}


def _memory(attempts: dict[str, Any]) -> tuple[str, ...]:
    """Return the folders that are the session's own memory, where it may write."""
    if attempts["mounted"]:
        return MEMORY
    home = str(attempts["home"])
    if not re.fullmatch(f"{SESSION_MEMORY}/{FOLDER_PREFIX}[0-9a-f]+/home", home):
        raise VerifyError(f"the session's home is at an odd place: {home}")
    return (home.removesuffix("/home"),)


def _may_be_left(attempt: str, memory: Sequence[str]) -> bool:
    place = attempt.removeprefix("write ")
    return attempt in MAY_BE_LEFT or any(
        place == folder or place.startswith(f"{folder}/") for folder in memory
    )


def _act(kernel: Kernel, code: str) -> str:
    ran = kernel.run(code)
    if ran.error is not None:
        raise VerifyError(f"the canary could not act: {ran.error}")
    return ran.text
