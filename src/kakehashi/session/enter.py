"""``python -I -m kakehashi.session.enter``: one session, started by a site's agent.

Reads one JSON document on standard input (docs/architecture.md, ``enter``) and runs until
the session ends. Exit status: 0 ended as asked for, 1 failed, 2 the document is not
understood, 3 the node lacks something (the portal has been told what), 4 the portal refused.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kakehashi import __version__
from kakehashi.errors import KakehashiError, RefusedError, SessionError
from kakehashi.session import (
    check,
    keys,
    leave,
    libraries,
    payload,
    syscalls,
    warden,
)
from kakehashi.session.hubclient import HubClient
from kakehashi.session.keeper import Keeper
from kakehashi.session.plan import Document

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kakehashi.session.plan import Plan

DOCUMENT_LIMIT = 256 * 1024
EXIT_FAILED, EXIT_DOCUMENT, EXIT_NODE, EXIT_REFUSED = 1, 2, 3, 4


def main() -> int:
    """Run a session and return the exit status."""
    try:
        _harden()
        handle = warden.start()
        try:
            document = Document.parse(sys.stdin.read(DOCUMENT_LIMIT))
        except KakehashiError as error:
            sys.stderr.write(f"kakehashi: {error}\n")
            return EXIT_DOCUMENT
        return _session(document, handle)
    except RefusedError as error:
        sys.stderr.write(f"kakehashi: the portal refused the session ({error.code}): {error}\n")
        return EXIT_REFUSED
    except KakehashiError as error:
        sys.stderr.write(f"kakehashi: {error}\n")
        return EXIT_FAILED


def _harden() -> None:
    """Close this process to others before it reads a secret."""
    # Both are inherited, and the filter's file is out of reach for a process not dumpable.
    payload.limit_core_dumps()
    Path("/proc/self/coredump_filter").write_text("0", encoding="ascii")
    syscalls.set_dumpable(dumpable=False)
    os.umask(0o077)
    parent = os.getppid()
    # Process 1 has adopted what a detached start left behind; it does not end.
    if parent != 1:
        syscalls.die_with_parent()
        if os.getppid() != parent:
            raise SessionError("the process that started this session has ended")
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    if "TracerPid:\t0\n" not in status:
        raise SessionError("this process is being traced; a session cannot start like that")
    syscalls.adopt_orphans()


def job_id(environment: Mapping[str, str]) -> str:
    """Return the name that the scheduler, or else the site's agent, has for this job."""
    for name in ("SLURM_JOB_ID", "PJM_JOBID", "KAKEHASHI_JOB"):
        if environment.get(name):
            return environment[name]
    return str(os.getpid())


def _session(document: Document, handle: warden.WardenHandle) -> int:
    hub = HubClient(document.portal_url, document.portal_ca, document.session)
    home = str(Path.home())
    before = leave.look_before(home)
    checks, plan, built = _check(document, handle)
    failures = [{"check": one.check, "message": one.message} for one in checks if not one.ok]
    library = libraries.find(document.node.software, libraries.NODUMP)
    if failures or plan is None or built is None or library is None:
        for failure in failures:
            sys.stderr.write(f"kakehashi: {failure['check']}: {failure['message']}\n")
        with contextlib.suppress(KakehashiError):
            hub.refuse(document.ticket, failures)
        return EXIT_NODE
    key = keys.SigningKey()
    facts: dict[str, Any] = {
        "port": built.port,
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "job": job_id(os.environ),
        "software": __version__,
        "walls": document.node.walls,
        "hub_port": built.hub_port,
        "checks": [one.to_json() for one in checks],
    }
    enrolment = hub.enrol(document.ticket, key, facts)
    keeper = Keeper(
        document,
        plan,
        handle,
        built=built,
        hub=hub,
        key=key,
        enrolment=enrolment,
        library=library,
        before=before,
        use_view=document.node.walls == "namespaces" and check.has_view(document.node),
    )
    return keeper.run()


def _check(
    document: Document, handle: warden.WardenHandle
) -> tuple[list[check.Check], Plan | None, warden.Built | None]:
    """Look at the node, build the payload's world, and probe it from inside."""
    checks = check.quick(document.node)
    same = document.software == __version__
    checks.append(
        check.Check(
            "version",
            ok=same,
            message=__version__
            if same
            else f"this node has {__version__}, the portal expects {document.software}; install "
            f"the same in {document.node.software}",
        )
    )
    if not all(one.ok for one in checks):
        return checks, None, None
    try:
        plan = check.plan_for(
            document.node, stand_ins=False, session=document.session, job=job_id(os.environ)
        )
        built = handle.build(plan)
        checks += check.from_probe(handle.probe(check.facts_for(plan)))
    except KakehashiError as error:
        checks.append(check.Check("payload", ok=False, message=str(error)))
        return checks, None, None
    return checks, plan, built


if __name__ == "__main__":
    sys.exit(main())
