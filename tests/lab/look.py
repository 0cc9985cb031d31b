"""What can be seen of a session from outside: on its node, and at the store."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab import portal as services
from tests.lab.hosts import Host
from tests.lab.lab import NODES, Lab

# What a real node's own daemons write at any time.
DAEMONS = ("var/log/", "var/spool/slurmd", "run/slurmd", "run/munge", "var/lib/munge")


def node_of(lab: Lab, account: str) -> Host | None:
    """Return the node on which an account's wrapper runs."""
    for name in NODES:
        if processes(lab[name], account):
            return lab[name]
    return None


def processes(host: Host, account: str) -> list[str]:
    """Return the command lines of an account's processes on a host."""
    answer = host.run(["ps", "-u", account, "-o", "pid=,args="], check=False)
    return [line for line in answer.stdout.splitlines() if line.strip()]


def keeper(host: Host, account: str) -> int:
    """Return the pid, on its host, of the session's keeper: the oldest of the account."""
    answer = host.run(["pgrep", "--oldest", "-u", account, "-f", "kakehashi.session.enter"])
    return int(answer.stdout)


def mounts(host: Host) -> list[str]:
    """Return the mounts of any process of a host that a session could have made."""
    found = set()
    for folder in host.path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            lines = (folder / "mountinfo").read_text().splitlines()
        except OSError:
            continue
        found |= {line.split(" - ")[1] for line in lines if "fuse" in line.split(" - ")[1]}
    return sorted(found)


def files(host: Host) -> dict[str, tuple[int, int]]:
    """Return every file that a host holds beyond the machine's own: path to size and mtime.

    The host's upper layer is all that was ever written to its root; /tmp, /var/tmp, /run and
    /dev/shm are file systems of their own, and the site's homes are shared.
    """
    found: dict[str, tuple[int, int]] = {}
    roots = {
        "": host.base / "upper",
        "tmp/": host.path("/tmp"),
        "var/tmp/": host.path("/var/tmp"),
        "dev/shm/": host.path("/dev/shm"),
        "run/": host.path("/run"),
        "home/": host.path("/home"),
    }
    for prefix, root in roots.items():
        for folder, _, names in os.walk(root):
            for name in names:
                path = Path(folder) / name
                key = prefix + str(path.relative_to(root))
                if key.startswith(DAEMONS):
                    continue
                try:
                    seen = path.lstat()
                except FileNotFoundError:
                    continue
                if not stat.S_ISCHR(seen.st_mode):
                    found[key] = (seen.st_size, seen.st_mtime_ns)
    return found


def shared_memory(host: Host) -> list[str]:
    """Return the System V segments of a host."""
    return host.path("/proc/sysvipc/shm").read_text().splitlines()[1:]


def store_connections(lab: Lab) -> list[str]:
    """Return the established connections to the store's sshd."""
    answer = lab["store"].run(
        ["ss", "--no-header", "--numeric", "--tcp", "state", "established", "sport", "=", ":22"]
    )
    return answer.stdout.splitlines()


def audit(lab: Lab) -> list[dict[str, Any]]:
    """Return the audit trail's records."""
    path = lab["store"].path("/srv/kakehashi/authority/audit.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def receipts(lab: Lab) -> list[dict[str, Any]]:
    """Return the list of receipts as the store's command gives it."""
    listed = services.kakehashi(lab["store"], ["receipt", "list", "--json"]).stdout
    return list(json.loads(listed))


def receipt(lab: Lab, session: str) -> dict[str, Any]:
    """Return a receipt, verified by the store's command."""
    shown = services.kakehashi(lab["store"], ["receipt", "show", session, "--json"]).stdout
    return dict(json.loads(shown))


def open_sessions(lab: Lab) -> list[str]:
    """Return the sessions that the store's book holds as not ended."""
    return store_book(lab, "SELECT id FROM sessions WHERE state != 'ended'").split()


def store_book(lab: Lab, query: str) -> str:
    """Return what the store's book answers to a query."""
    command = ["sqlite3", "-readonly", "/srv/kakehashi/authority/book.sqlite", query]
    return lab["store"].run(command, user="kakehashi").stdout.strip()


@dataclass(frozen=True)
class Traces:
    """What of sessions is there on the nodes and at the store."""

    processes: list[str]
    mounts: list[str]
    files: dict[str, set[str]]
    shared_memory: list[str]
    connections: list[str]
    sessions: list[str]


def traces(lab: Lab, before: dict[str, dict[str, tuple[int, int]]], account: str) -> Traces:
    """Look for whatever a session may have left."""
    return Traces(
        processes=[line for name in NODES for line in processes(lab[name], account)],
        mounts=[line for name in NODES for line in mounts(lab[name])],
        files={
            name: {
                path for path, seen in files(lab[name]).items() if before[name].get(path) != seen
            }
            for name in NODES
        },
        shared_memory=[line for name in NODES for line in shared_memory(lab[name])],
        connections=store_connections(lab),
        sessions=open_sessions(lab),
    )


def nothing() -> Traces:
    """Return what must be left."""
    return Traces([], [], {name: set() for name in NODES}, [], [], [])
